"""Attention of one new query a sequence over its cached blocks.

Letters: R rows, H query heads, K kv heads, G = H/K, D head_dim, B blocks a row (table width), S = B * block_len.
"""

import torch
from torch import Tensor

from pagoda.kernels.cache_codes import empty_state
from pagoda.kernels.decode_parts import (
    TARGET_PROGRAMS,
    attend_blocks,
    cache_arrays,
    finish_part,
    num_parts,
    padded_rows,
    part_buffers,
    plan_of,
    score_constants,
    tile_sizes,
)
from pagoda.kernels.kv_pack import LayerCache, read_kv
from pagoda.kernels.triton_env import HAS_TRITON, INTERPRETED, gdc_launch_dependents, gdc_wait, jit, tl


def softcapped(score: Tensor, softcap: float) -> Tensor:
    """cap * tanh(score / cap); 0 is no cap."""
    return torch.tanh(score / softcap) * softcap if softcap else score


def gather_kv(cache: LayerCache, block_table_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole tables, float32 [R, K, S, D]."""
    k, v = read_kv(cache, block_table_RB)
    return k.transpose(1, 2).flatten(2, 3), v.transpose(1, 2).flatten(2, 3)


def decode_attention_reference(
    q_RHD: Tensor,
    cache: LayerCache,
    kv_len_R: Tensor,
    block_table_RB: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """`decode_attention` in plain torch: gathers the blocks, one batched product a kv head, float32 inside."""
    rows, heads, dim = q_RHD.shape
    if q_RHD.device.type == "cpu" and rows:  # no more blocks than the longest row has
        blocks = -(-int(kv_len_R.max()) // cache.block_len)
        block_table_RB = block_table_RB[:, : max(blocks, 1)]
    k, v = gather_kv(cache, block_table_RB)
    q = q_RHD.float().view(rows, cache.num_kv_heads, -1, dim)
    position_S = torch.arange(k.shape[2], device=q.device)
    seen_RS = position_S < kv_len_R[:, None]
    if window:
        seen_RS &= position_S >= kv_len_R[:, None] - window
    score = softcapped(q @ k.transpose(-1, -2) * scale, softcap)
    score = score.masked_fill(~seen_RS[:, None, None, :], float("-inf"))
    share = score.softmax(-1).masked_fill(kv_len_R[:, None, None, None] == 0, 0.0)
    out = share @ v.masked_fill(~seen_RS[:, None, :, None], 0.0)
    return out.view(rows, heads, dim).to(q_RHD.dtype)


@jit(do_not_specialize=["R", "B"])
def _decode_kernel(
    q, k, v, k_scale, v_scale, k_zero, v_zero, table, kv_len, out, part_out, part_ml, counter, score_scale, cap, R, B,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BL: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    DP: tl.constexpr, GP: tl.constexpr, BH: tl.constexpr, RP: tl.constexpr, SCHEME: tl.constexpr, STATIC: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, TARGET: tl.constexpr, MERGE: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one row, one kv head (its G query heads as a tile of BH rows), one part of the row's blocks."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    L, first, end, chunk = plan_of(row, kv_len, R, tl.num_programs(2), BL, K, RP, WINDOW, TARGET)
    rh = tl.arange(0, BH)
    rw = tl.arange(0, WP)
    inside = (rh < G)[:, None] & (rw < W)[None, :]
    tile = row * K + head
    out += tile.to(tl.int64) * (G * D)
    at = rh[:, None] * D + rw[None, :]
    num = tl.cdiv(end - first, chunk)
    if part >= num:
        if part == 0:  # an empty row
            tl.store(out + at, tl.zeros([BH, WP], out.dtype.element_ty), mask=inside)
            if SCHEME == "int4":
                tl.store(out + at + W, tl.zeros([BH, WP], out.dtype.element_ty), mask=inside)
        return
    dtype: tl.constexpr = tl.float16 if SCHEME != "none" and q.dtype.element_ty != tl.float32 else q.dtype.element_ty
    q += tile.to(tl.int64) * (G * D)
    q_low = tl.load(q + at, mask=inside, other=0.0).to(dtype)
    q_high = q_low
    q_sum = tl.sum(q_low.to(tl.float32), 1)
    if SCHEME == "int4":
        q_high = tl.load(q + at + W, mask=inside, other=0.0).to(dtype)
        q_sum += tl.sum(q_high.to(tl.float32), 1)
    i0 = first + part * chunk
    start = tl.maximum(L - WINDOW, 0) if WINDOW else 0
    arrays = (k, v, k_scale, v_scale, k_zero, v_zero)
    state = attend_blocks(
        (q_low, q_high, q_sum), arrays, table + row.to(tl.int64) * B, head, i0, tl.minimum(i0 + chunk, end), start, L,
        empty_state(BH, WP, SCHEME), score_scale, cap, K, BL, W, WP, SCHEME, STATIC, SOFTCAP, STAGES, FAST,
    )  # fmt: skip
    finish_part(
        state, out, part_out, part_ml, counter, tile, part, num, G, GP, BH, D, DP, W, WP, SCHEME, SPLIT, MERGE
    )  # fmt: skip


def kernel_takes(q: Tensor, cache: LayerCache) -> bool:
    """Whether the Triton kernels hold for this cache: on CUDA, heads to 256 channels, blocks of 16, 32, 64 or 128."""
    return q.is_cuda and HAS_TRITON and cache.head_dim <= 256 and cache.block_len in (16, 32, 64, 128)


def decode_attention_launch(
    q_RHD: Tensor, cache: LayerCache, kv_len_R: Tensor, block_table_RB: Tensor, scale: float, window: int = 0,
    softcap: float = 0.0, early_launch: bool = False, num_warps: int = 4, num_stages: int = 3, merge: int = 4,
    target: int = TARGET_PROGRAMS, out_RHD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The Triton kernel."""
    rows, heads = q_RHD.shape[:2]
    out_RHD = torch.empty_like(q_RHD) if out_RHD is None else out_RHD
    if rows == 0:
        return out_RHD
    kv_heads, width = cache.num_kv_heads, block_table_RB.shape[1]
    sizes = tile_sizes(cache, heads // kv_heads)
    parts = num_parts(rows, kv_heads, width)
    if cache.k.dtype.itemsize * sizes["WP"] >= 512:
        num_stages = min(num_stages, 2)  # shared memory
    _decode_kernel[(rows, kv_heads, parts)](
        q_RHD,
        *cache_arrays(cache),
        block_table_RB,
        kv_len_R,
        out_RHD,
        *part_buffers(parts, rows * kv_heads, sizes["BH"], cache),
        cache.counters,
        *score_constants(scale, softcap),
        rows,
        width,
        **sizes,
        RP=padded_rows(rows),
        SCHEME=cache.scheme,
        STATIC=cache.static,
        WINDOW=window,
        SOFTCAP=softcap > 0,
        SPLIT=parts > 1,
        TARGET=target,
        MERGE=merge,
        STAGES=num_stages,
        FAST=not INTERPRETED,
        EARLY=early_launch,
        num_warps=num_warps,
        **({"launch_pdl": True} if early_launch and not INTERPRETED else {}),
    )
    return out_RHD


def decode_attention(
    q_RHD: Tensor,
    cache: LayerCache,
    kv_len_R: Tensor,
    block_table_RB: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    early_launch: bool = False,
) -> Tensor:
    """-> out [R, H, D] in q's dtype, new memory. The query of row r is its token kv_len_R[r] - 1, whose own key and
    value the cache already holds; kv_len 0 gives zeros. It sees the last `window` keys, itself included (0: all).
    Scores are q.k * scale, then softcap * tanh(score / softcap) where softcap > 0. kv_len [R] int32, block_table [R, B]
    int32: entries past a row's length may be anything within the cache. No host synchronisation on a GPU; the grid
    depends on shapes alone. early_launch (GPU): start before the previous kernel of the stream has ended, and wait for
    it inside.
    """
    if kernel_takes(q_RHD, cache):
        assert block_table_RB.stride(1) == 1 and q_RHD.is_contiguous()
        return decode_attention_launch(q_RHD, cache, kv_len_R, block_table_RB, scale, window, softcap, early_launch)
    return decode_attention_reference(q_RHD, cache, kv_len_R, block_table_RB, scale, window, softcap)
