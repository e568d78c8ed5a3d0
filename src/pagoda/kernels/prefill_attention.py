"""Attention of chunks of prompts over their cached blocks; the chunk's own keys and values are read from the cache as
well.

Letters: T tokens of the step, R rows, H query heads, K kv heads, D head_dim, B blocks a row (table width).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.kernels.cache_codes import empty_state, load_codes, load_meta, normalised, softmax_step
from pagoda.kernels.decode_attention import (
    decode_attention_launch,
    decode_attention_reference,
    gather_kv,
    kernel_takes,
    softcapped,
)
from pagoda.kernels.decode_parts import cache_arrays, padded_rows, score_constants, tile_sizes
from pagoda.kernels.kv_pack import LayerCache
from pagoda.kernels.library_attention import Fresh, library_attention, library_takes
from pagoda.kernels.triton_env import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

QUERY_TILE = 256  # queries of one score matrix of the reference: bounds its memory


def prefill_attention_reference(
    q_THD: Tensor, cache: LayerCache, query_start_R1: Tensor, kv_len_R: Tensor, block_table_RB: Tensor,
    max_query_len: int, scale: float, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """`prefill_attention` in plain torch: a loop over rows and query tiles, float32 inside."""
    out_THD = torch.zeros_like(q_THD)
    heads, dim = q_THD.shape[1:]
    starts = query_start_R1.tolist()
    for row, kv_len in enumerate(kv_len_R.tolist()):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        k, v = gather_kv(cache, block_table_RB[row : row + 1, : -(-kv_len // cache.block_len)])
        k, v = k[0, :, :kv_len], v[0, :, :kv_len]
        for tile in range(start, end, QUERY_TILE):
            q = q_THD[tile : min(tile + QUERY_TILE, end)].float()
            position = torch.arange(tile, tile + len(q), device=q.device)[:, None] + (kv_len - end)
            last = kv_len - end + tile + len(q)
            first = max(0, kv_len - end + tile - window + 1) if window else 0
            key = torch.arange(first, last, device=q.device)
            seen = key <= position
            if window:
                seen &= key > position - window
            q = q.view(len(q), cache.num_kv_heads, -1, dim).permute(1, 2, 0, 3)  # [K, G, tile, D]
            score = softcapped(q @ k[:, None, first:last].transpose(-1, -2) * scale, softcap)
            share = score.masked_fill(~seen, float("-inf")).softmax(-1)
            mixed = (share @ v[:, None, first:last]).permute(2, 0, 1, 3)
            out_THD[tile : tile + mixed.shape[0]] = mixed.reshape(-1, heads, dim).to(out_THD.dtype)
    return out_THD


@jit
def row_of_tile(tile, query_start, origin, R, RP: tl.constexpr, BQ: tl.constexpr):
    """The row that owns a tile, and the tile's number within it. Row r's tiles begin at (query_start[r] - origin) // BQ
    + r: rows never share one, and there are at most T // BQ + R. origin = query_start[0].
    """
    r = tl.arange(0, RP)
    first = (tl.load(query_start + r, mask=r < R, other=0) - origin) // BQ + r
    row = tl.sum(((first <= tile) & (r < R)).to(tl.int32), 0) - 1
    return row, tile - ((tl.load(query_start + row) - origin) // BQ + row)


@jit
def sweep_keys(
    queries, arrays, table, head, n0, n1, position, kv_len, state, score_scale, cap, K: tl.constexpr, BL: tl.constexpr,
    BN: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, SCHEME: tl.constexpr, STATIC: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Keys n0 .. n1 - 1 (n0 a multiple of BN) into the running softmax. Without MASK every query sees them all."""
    k, v, k_scale, v_scale, k_zero, v_zero = arrays
    m, l, acc, acc_high = state
    rn = tl.arange(0, BN)
    for n in tl.range(n0, n1, BN, num_stages=STAGES):
        ok = n + rn < kv_len
        if BN == BL:
            cell = tl.load(table + n // BL).to(tl.int64) * K + head
            t = rn
        else:  # a tile of several blocks (16 bit)
            cell = tl.load(table + (n + rn) // BL, mask=ok | (not MASK), other=0).to(tl.int64) * K + head
            t = rn % BL
        kk, vv = load_codes(k, v, cell, t, ok, BL, W, WP, SCHEME, MASK)
        ks, kz = load_meta(k_scale, k_zero, cell, head, t, ok, BL, SCHEME, STATIC)
        vs, vz = load_meta(v_scale, v_zero, cell, head, t, ok, BL, SCHEME, STATIC)
        seen = (n + rn)[None, :] <= position[:, None]
        if WINDOW:
            seen &= (n + rn)[None, :] > position[:, None] - WINDOW
        tile = (kk, vv, ks, kz, vs, vz, seen)
        now = (m, l, acc, acc_high)
        m, l, acc, acc_high = softmax_step(queries, tile, now, score_scale, cap, SCHEME, STATIC, SOFTCAP, MASK, FAST)
    return m, l, acc, acc_high


@jit(do_not_specialize=["R", "B"], do_not_specialize_on_alignment=["table", "query_start", "kv_lens"])
def _prefill_kernel(
    q, k, v, k_scale, v_scale, k_zero, v_zero, table, query_start, kv_lens, out, score_scale, cap, R, B,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BL: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, RP: tl.constexpr, SCHEME: tl.constexpr, STATIC: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: BQ queries of one row times the G heads of one kv head, as a tile of BM rows (BQ * G <= BM)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later tiles have more keys: start them first
    row, mine = row_of_tile(tile, query_start, tl.load(query_start), R, RP, BQ)
    begin = tl.load(query_start + row)
    num = tl.load(query_start + row + 1) - begin
    kv_len = tl.load(kv_lens + row)
    token = mine * BQ
    if token >= num:
        return
    rm = tl.arange(0, BM)
    rw = tl.arange(0, WP)
    mine_ok = (rm < BQ * G) & (token + rm // G < num)
    at = ((begin + token + rm // G).to(tl.int64) * (K * G) + head * G + rm % G)[:, None] * D + rw[None, :]
    inside = mine_ok[:, None] & (rw < W)[None, :]
    dtype: tl.constexpr = tl.float16 if SCHEME != "none" and q.dtype.element_ty != tl.float32 else q.dtype.element_ty
    q_low = tl.load(q + at, mask=inside, other=0.0).to(dtype)
    q_high = q_low
    q_sum = tl.sum(q_low.to(tl.float32), 1) if SCHEME == "int4" or STATIC else tl.zeros([BM], tl.float32)
    if SCHEME == "int4":
        q_high = tl.load(q + at + W, mask=inside, other=0.0).to(dtype)
        q_sum += tl.sum(q_high.to(tl.float32), 1)
    behind = kv_len - num + token  # position of the tile's first query
    stop = tl.minimum(kv_len, behind + BQ)
    state = empty_state(BM, WP, SCHEME)
    queries = (q_low, q_high, q_sum)
    arrays = (k, v, k_scale, v_scale, k_zero, v_zero)
    table += row.to(tl.int64) * B
    position = behind + rm // G
    full = (behind + 1) // BN * BN  # keys before it are seen by every query, if there is no window
    first = tl.maximum(behind - WINDOW + 1, 0) // BN * BN if WINDOW else 0
    state = sweep_keys(
        queries, arrays, table, head, first, full, position, kv_len, state, score_scale, cap,
        K, BL, BN, W, WP, SCHEME, STATIC, WINDOW, SOFTCAP, WINDOW > 0, STAGES, FAST,
    )  # fmt: skip
    state = sweep_keys(
        queries, arrays, table, head, full, stop, position, kv_len, state, score_scale, cap,
        K, BL, BN, W, WP, SCHEME, STATIC, WINDOW, SOFTCAP, True, STAGES, FAST,
    )  # fmt: skip
    _, l, acc, acc_high = state
    tl.store(out + at, normalised(acc, l, SCHEME).to(out.dtype.element_ty), mask=inside)
    if SCHEME == "int4":
        tl.store(out + at + W, normalised(acc_high, l, SCHEME).to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class PrefillTile:
    """Rows of a query tile, blocks of a key tile, warps and stages of the kernel."""

    rows: int = 128
    key_blocks: int = 1
    num_warps: int = 8
    num_stages: int = 3


def tile_for(q_THD: Tensor, cache: LayerCache) -> PrefillTile:
    """For Hopper; what does not fit its shared memory or registers is halved."""
    wide = cache.head_dim > 128
    if q_THD.dtype == torch.float32:
        return PrefillTile(rows=16 if wide else 32, num_stages=1)
    return PrefillTile(rows=64, num_stages=2) if wide else PrefillTile()


def prefill_attention_launch(
    q_THD: Tensor, cache: LayerCache, query_start_R1: Tensor, kv_len_R: Tensor, block_table_RB: Tensor, scale: float,
    window: int = 0, softcap: float = 0.0, early_launch: bool = False, tile: PrefillTile | None = None,
    out_THD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The Triton kernel. query_start may begin above 0: earlier queries belong to others."""
    tokens, heads = q_THD.shape[:2]
    rows, width = block_table_RB.shape
    out_THD = torch.empty_like(q_THD) if out_THD is None else out_THD
    if tokens == 0 or rows == 0:
        return out_THD
    tile = tile or tile_for(q_THD, cache)
    assert tile.key_blocks == 1 or cache.scheme == "none"
    sizes = tile_sizes(cache, heads // cache.num_kv_heads)
    for unused in ("DP", "GP", "BH"):
        sizes.pop(unused)
    tile_rows = max(tile.rows, next_power_of_2(sizes["G"]))
    queries = tile_rows // sizes["G"]
    _prefill_kernel[(cache.num_kv_heads, tokens // queries + rows)](
        q_THD,
        *cache_arrays(cache),
        block_table_RB,
        query_start_R1,
        kv_len_R,
        out_THD,
        *score_constants(scale, softcap),
        rows,
        width,
        **sizes,
        BM=tile_rows,
        BN=tile.key_blocks * cache.block_len,
        BQ=queries,
        RP=padded_rows(rows),
        SCHEME=cache.scheme,
        STATIC=cache.static,
        WINDOW=window,
        SOFTCAP=softcap > 0,
        STAGES=tile.num_stages,
        FAST=not INTERPRETED,
        EARLY=early_launch,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if early_launch and not INTERPRETED else {}),
    )
    return out_THD


def prefill_attention(
    q_THD: Tensor, cache: LayerCache, query_start_R1: Tensor, kv_len_R: Tensor, block_table_RB: Tensor,
    max_query_len: int, scale: float, window: int = 0, softcap: float = 0.0, early_launch: bool = False,
    single_rows: int = 0, single_len_R: Tensor | None = None, fresh: Fresh = (),
) -> Tensor:  # fmt: skip
    """-> out [T, H, D] in q's dtype, new memory. Row r owns queries query_start[r] .. query_start[r+1] - 1 (at most
    max_query_len of them, none is allowed): the last tokens of its kv_len_R[r] cached ones. Query i of n sees keys up
    to position kv_len - n + i, and of these the last `window` (0: all). Queries of no row (past query_start[R]) come
    out zero on a CPU and undefined on a GPU. query_start [R + 1] int32 from 0, kv_len [R] int32, block_table [R, B]
    int32; scale, softcap and early_launch as in `decode_attention`.

    The first `single_rows` rows have exactly one query each, and go the cheaper way of `decode_attention`. Where only
    the device knows how many those are, `single_len_R` [R] int32 holds their kv_len, and 0 for the rows after them, at
    whose first query query_start then begins (T >= R). On a GPU the grid depends on shapes alone, and nothing waits
    for the host. `fresh` (see `library_attention`): the last rows, where the host knows that their prompts begin here.
    """
    n, first, how = single_rows, single_rows, (scale, window, softcap)
    if single_len_R is not None:
        n, first = single_len_R.numel(), 0
    one_len_R = kv_len_R[:n] if single_len_R is None else single_len_R
    one = (q_THD[:n], cache, one_len_R, block_table_RB[:n], *how)
    if kernel_takes(q_THD, cache):
        assert block_table_RB.stride(1) == 1 and q_THD.is_contiguous()
        out_THD = torch.empty_like(q_THD)
        if n:  # first: for rows that are not single it writes zeros, where a query of another row may belong
            decode_attention_launch(*one, early_launch, out_RHD=out_THD[:n])
        rows = kv_len_R.numel()
        if fresh and library_takes(q_THD, cache, window, softcap):
            library_attention(q_THD, cache, block_table_RB, fresh, scale, out_THD)
            rows = fresh[0][0]
        if rows > first:
            many = (q_THD, cache, query_start_R1[first : rows + 1], kv_len_R[first:rows], block_table_RB[first:rows])
            prefill_attention_launch(*many, *how, early_launch, out_THD=out_THD)
        return out_THD
    many = (q_THD, cache, query_start_R1[first:], kv_len_R[first:], block_table_RB[first:], max_query_len)
    out_THD = prefill_attention_reference(*many, *how)
    if n:
        out_THD[:n] = decode_attention_reference(*one).where(one_len_R[:, None, None] > 0, out_THD[:n])
    return out_THD
