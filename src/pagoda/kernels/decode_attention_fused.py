"""A decode step's attention as one kernel, for few rows: QK norm, rope, log-n scale, the write of the new key and
value, attention over the cached blocks, the meeting of parts. Exact to `rope_and_write` followed by `decode_attention`.

Letters: R rows, H query heads, K kv heads, D head_dim, E = (H + 2K) * D, P rotated pairs, B blocks a row (table width).
"""

import torch
from torch import Tensor

from pagoda.kernels.cache_codes import capped, empty_state, softmax_step
from pagoda.kernels.decode_attention import decode_attention, kernel_takes
from pagoda.kernels.decode_parts import (
    TARGET_PROGRAMS,
    attend_blocks,
    cache_arrays,
    finish_part,
    load_tile,
    num_parts,
    padded_rows,
    part_buffers,
    plan_of,
    score_constants,
    tile_sizes,
)
from pagoda.kernels.kv_pack import LayerCache
from pagoda.kernels.rope_cache import rope_and_write
from pagoda.kernels.rope_rows import rope_rows, rotate_rows, store_row_codes
from pagoda.kernels.triton_env import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl


@jit
def whole(low, high):
    """Halves [rows, HP] -> rows [rows, 2 * HP]; D must be 2 * HP."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (low.shape[0], 2 * low.shape[1]))


@jit
def row_heads(
    qkv, cos, sin, q_gain, k_gain, q_scale, rotation, row, head, eps, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, HP: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, LOGN: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """One row's G queries of a kv head and, as row G, its key: (low, high) [BH, HP] in the cache's basis, float32."""
    rh = tl.arange(0, BH)
    is_k = rh == G
    x = qkv + tl.where(is_k, H + head, head * G + rh) * D
    low, high = rope_rows(x, rh <= G, cos, sin, rh * 0 + row, q_gain, k_gain, is_k, eps, D, HP, PAIRS, NORM)
    if LOGN:
        grow = tl.where(is_k, 1.0, tl.load(q_scale + row).to(tl.float32))[:, None]
        low *= grow
        high *= grow
    if ROTATE:
        low, high = rotate_rows(low, high, rotation, D, HP)
    return low, high


@jit
def attend_new(
    queries, state, k_low, k_high, v_low, v_high, score_scale, cap, SCHEME: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The step's own key and value [1, HP], as the cache holds them, into the running softmax of query halves."""
    q_low, q_high = queries
    m, l, acc, acc_high = state
    s = tl.sum(q_low.to(tl.float32) * k_low, 1) + tl.sum(q_high.to(tl.float32) * k_high, 1)
    s = capped(s, score_scale, cap, SOFTCAP)
    m_new = tl.maximum(m, s)
    fade = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new)
    l = l * fade + p
    if SCHEME != "none":
        p *= 256.0
    if SCHEME == "int4":
        acc = acc * fade[:, None] + p[:, None] * v_low
        acc_high = acc_high * fade[:, None] + p[:, None] * v_high
    else:
        acc = acc * fade[:, None] + p[:, None] * whole(v_low, v_high)
    return m_new, l, acc, acc_high


@jit(do_not_specialize=["R", "B"])
def _fused_kernel(
    qkv, cos, sin, slot, q_gain, k_gain, q_scale, rotation, k, v, k_scale, v_scale, k_zero, v_zero, table, kv_len, out,
    part_out, part_ml, counter, score_scale, cap, eps, R, B, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BL: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    BH: tl.constexpr, RP: tl.constexpr, PAIRS: tl.constexpr, SCHEME: tl.constexpr, STATIC: tl.constexpr,
    NORM: tl.constexpr, LOGN: tl.constexpr, ROTATE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr, TARGET: tl.constexpr, MERGE: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one row, one kv head, one part of the row's blocks; the last part takes the new token from
    registers. Before the wait it reads lengths, tables and old blocks alone: they may be several kernels ahead of the
    queries.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if EARLY == 1:
        gdc_launch_dependents()
    L, first, end, chunk = plan_of(row, kv_len, R, tl.num_programs(2), BL, K, RP, WINDOW, TARGET)
    num = tl.cdiv(end - first, chunk)
    tile = row * K + head
    out += tile.to(tl.int64) * (G * D)
    if part >= num:
        if EARLY:
            gdc_wait()
        if part == 0:  # an empty row
            rg, rd = tl.arange(0, GP), tl.arange(0, DP)
            inside = (rg < G)[:, None] & (rd < D)[None, :]
            tl.store(out + rg[:, None] * D + rd[None, :], tl.zeros([GP, DP], out.dtype.element_ty), mask=inside)
        return
    i0 = first + part * chunk
    i1 = tl.minimum(i0 + chunk, end)
    start = tl.maximum(L - WINDOW, 0) if WINDOW else 0
    table += row.to(tl.int64) * B
    arrays = (k, v, k_scale, v_scale, k_zero, v_zero)
    ahead = load_tile(arrays, table, head, i0, start, L - 1, K, BL, W, WP, SCHEME, STATIC)
    if EARLY:
        gdc_wait()
    if EARLY == 2:
        gdc_launch_dependents()
    HP: tl.constexpr = DP // 2
    qkv += row.to(tl.int64) * ((H + 2 * K) * D)
    low, high = row_heads(
        qkv, cos, sin, q_gain, k_gain, q_scale, rotation, row, head, eps, H, K, G, D, BH, HP, PAIRS, NORM, LOGN, ROTATE
    )
    wide: tl.constexpr = qkv.dtype.element_ty
    dtype: tl.constexpr = tl.float16 if SCHEME != "none" and wide != tl.float32 else wide
    q_low, q_high = low.to(wide).to(dtype), high.to(wide).to(dtype)
    q_sum = tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)
    queries = (q_low if SCHEME == "int4" else whole(q_low, q_high), q_high, q_sum)
    state = softmax_step(
        queries, ahead, empty_state(BH, WP, SCHEME), score_scale, cap, SCHEME, STATIC, SOFTCAP, True, FAST
    )
    state = attend_blocks(
        queries, arrays, table, head, i0 + 1, i1, start, L - 1, state, score_scale, cap,
        K, BL, W, WP, SCHEME, STATIC, SOFTCAP, STAGES, FAST,
    )  # fmt: skip
    if EARLY == 3:
        gdc_launch_dependents()
    if i1 == end:
        one = tl.arange(0, 1)
        place = tl.load(slot + row + one).to(tl.int64)
        is_k = (tl.arange(0, BH) == G)[:, None]
        k_low = tl.sum(tl.where(is_k, low, 0.0), 0)[None, :]
        k_high = tl.sum(tl.where(is_k, high, 0.0), 0)[None, :]
        x = qkv + (H + K + head) * D + one
        v_low, v_high = rope_rows(x, one < 1, cos, sin, one, q_gain, k_gain, one < 1, eps, D, HP, 0, False)
        key, value = (k, k_scale, k_zero, place, head, k_low, k_high), (v, v_scale, v_zero, place, head, v_low, v_high)
        k_low, k_high = store_row_codes(key, K, D, HP, BL, SCHEME, STATIC, False)
        v_low, v_high = store_row_codes(value, K, D, HP, BL, SCHEME, STATIC, True)
        state = attend_new((q_low, q_high), state, k_low, k_high, v_low, v_high, score_scale, cap, SCHEME, SOFTCAP)
    finish_part(state, out, part_out, part_ml, counter, tile, part, num, G, GP, BH, D, DP, W, WP, SCHEME, SPLIT, MERGE)


def decode_attention_fused_launch(
    qkv_RE: Tensor, cos_RP: Tensor, sin_RP: Tensor, slot_R: Tensor, cache: LayerCache, kv_len_R: Tensor,
    block_table_RB: Tensor, scale: float, window: int = 0, softcap: float = 0.0, q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None, norm_eps: float = 0.0, q_scale_R: Tensor | None = None, early_launch: int = 0,
    num_warps: int = 4, num_stages: int = 3, merge: int | None = None, target: int = TARGET_PROGRAMS,
) -> Tensor:  # fmt: skip
    """The Triton kernel; both gains or neither, head_dim a power of two from 32.

    merge: parts that are added at a time. Eight win (105 us of a one-row step of A) where the next kernel started at
    once; elsewhere only four was timed.
    """
    merge = merge or (8 if early_launch == 1 else 4)
    rows, width, kv_heads, dim = *block_table_RB.shape, cache.num_kv_heads, cache.head_dim
    heads = qkv_RE.shape[1] // dim - 2 * kv_heads
    out_RN = torch.empty(rows, heads * dim, dtype=qkv_RE.dtype, device=qkv_RE.device)
    if rows == 0:
        return out_RN
    sizes = tile_sizes(cache, heads // kv_heads)
    sizes["BH"] = max(16, next_power_of_2(sizes["G"] + 1))  # the key rides as one more row
    parts = num_parts(rows, kv_heads, width)
    _fused_kernel[(rows, kv_heads, parts)](
        qkv_RE,
        cos_RP,
        sin_RP,
        slot_R,
        qkv_RE if q_norm_D is None else q_norm_D,
        qkv_RE if k_norm_D is None else k_norm_D,
        cos_RP if q_scale_R is None else q_scale_R,
        qkv_RE if cache.rotation is None else cache.rotation,
        *cache_arrays(cache),
        block_table_RB,
        kv_len_R,
        out_RN,
        *part_buffers(parts, rows * kv_heads, sizes["BH"], cache),
        cache.counters,
        *score_constants(scale, softcap),
        norm_eps,
        rows,
        width,
        H=heads,
        **sizes,
        RP=padded_rows(rows),
        PAIRS=cos_RP.shape[-1],
        SCHEME=cache.scheme,
        STATIC=cache.static,
        NORM=q_norm_D is not None,
        LOGN=q_scale_R is not None,
        ROTATE=cache.rotation is not None,
        WINDOW=window,
        SOFTCAP=softcap > 0,
        SPLIT=parts > 1,
        TARGET=target,
        MERGE=merge,
        STAGES=num_stages if cache.k.dtype.itemsize * sizes["WP"] < 512 else min(num_stages, 2),
        FAST=not INTERPRETED,
        EARLY=early_launch,
        num_warps=num_warps,
        **({"launch_pdl": True} if early_launch and not INTERPRETED else {}),
    )
    return out_RN


def decode_attention_fused(
    qkv_RE: Tensor, cos_RP: Tensor, sin_RP: Tensor, slot_R: Tensor, cache: LayerCache, kv_len_R: Tensor,
    block_table_RB: Tensor, scale: float, window: int = 0, softcap: float = 0.0, q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None, norm_eps: float = 0.0, q_scale_R: Tensor | None = None, early_launch: int = 0,
) -> Tensor:  # fmt: skip
    """-> out [R, H * D] in qkv's dtype, new memory; the cache holds the new keys and values afterwards. Arguments as in
    `rope_and_write` and `decode_attention`: kv_len counts the new token, whose slot is slot_R[r] (< 0: attended to, not
    written). Where the kernel does not hold (CPU; head_dim no power of two; one gain alone) the two ops run in turn.

    early_launch (GPU): 0 off; start before the previous kernel has ended, and let the next one start 1: at once, 2:
    when the previous has ended, 3: after the blocks. Needs kv_len, block_table and the older blocks written before that
    previous kernel began.
    """
    dim = cache.head_dim
    fits = dim >= 32 and dim & (dim - 1) == 0 and (q_norm_D is None) == (k_norm_D is None)
    norms = (q_norm_D, k_norm_D, norm_eps, q_scale_R)
    how = (scale, window, softcap)
    if fits and kernel_takes(qkv_RE, cache):
        tensors = (qkv_RE, cos_RP, sin_RP, slot_R, cache, kv_len_R, block_table_RB)
        return decode_attention_fused_launch(*tensors, *how, *norms, early_launch)
    kv_heads = cache.num_kv_heads
    heads = qkv_RE.shape[1] // dim - 2 * kv_heads
    q_RHD = rope_and_write(qkv_RE, cos_RP, sin_RP, slot_R, cache, heads, kv_heads, dim, *norms)
    return decode_attention(q_RHD, cache, kv_len_R, block_table_RB, *how).flatten(1)
