"""Split decode attention: how rows are cut into parts, how a part attends to its blocks, how parts meet. Device
functions shared by `decode_attention` and `decode_attention_fused`, and the host's side of their arguments.

Constants: K kv heads, G query heads a kv head, D head_dim, BL block_len, W stored width of a row, BH rows of a query
tile; WP, DP, GP the padding of W, D and G to powers of two.
"""

import math

import torch
from torch import Tensor

from pagoda.kernels.cache_codes import load_codes, load_meta, normalised, softmax_step
from pagoda.kernels.kv_pack import MAX_COUNTERS, LayerCache
from pagoda.kernels.triton_env import jit, next_power_of_2, tl

TARGET_PROGRAMS = 512  # that work at once: four for each of the H200's multiprocessors
MAX_PARTS = 64


@jit
def plan_of(
    row, kv_len, R, parts, BL: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, WINDOW: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """One row's length, first block, end block, and blocks a part, so that all rows together make about TARGET
    parts.
    """
    L = tl.load(kv_len + row)
    first = tl.maximum(L - WINDOW, 0) // BL if WINDOW else L * 0
    end = tl.cdiv(L, BL)
    r = tl.arange(0, RP)
    n = tl.load(kv_len + r, mask=r < R, other=0)
    blocks = tl.cdiv(n, BL)
    if WINDOW:
        blocks -= tl.maximum(n - WINDOW, 0) // BL
    chunk = tl.cdiv(tl.sum(blocks, 0) * K, TARGET)
    return L, first, end, tl.maximum(tl.maximum(chunk, tl.cdiv(end - first, parts)), 1)


@jit
def load_tile(
    arrays, table, head, i, start, stop, K: tl.constexpr, BL: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    SCHEME: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Block i of a row's table as `softmax_step` takes it; tokens start .. stop - 1 count."""
    k, v, k_scale, v_scale, k_zero, v_zero = arrays
    t = tl.arange(0, BL)
    cell = tl.load(table + i).to(tl.int64) * K + head
    ok = (i * BL + t >= start) & (i * BL + t < stop)
    kk, vv = load_codes(k, v, cell, t, ok, BL, W, WP, SCHEME, True)
    ks, kz = load_meta(k_scale, k_zero, cell, head, t, ok, BL, SCHEME, STATIC)
    vs, vz = load_meta(v_scale, v_zero, cell, head, t, ok, BL, SCHEME, STATIC)
    return kk, vv, ks, kz, vs, vz, ok[None, :]


@jit
def attend_blocks(
    queries, arrays, table, head, i0, i1, start, stop, state, score_scale, cap, K: tl.constexpr, BL: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, SCHEME: tl.constexpr, STATIC: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Blocks i0 .. i1 - 1 of one row's table into the running softmax."""
    m, l, acc, acc_high = state
    for i in tl.range(i0, i1, num_stages=STAGES):
        tile = load_tile(arrays, table, head, i, start, stop, K, BL, W, WP, SCHEME, STATIC)
        now = (m, l, acc, acc_high)
        m, l, acc, acc_high = softmax_step(queries, tile, now, score_scale, cap, SCHEME, STATIC, SOFTCAP, True, FAST)
    return m, l, acc, acc_high


@jit
def merge_parts(
    part_out, part_ml, out, slot, num, G: tl.constexpr, GP: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, DP:
    tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """The parts of one tile, MERGE at a time so that their loads overlap, in their order: the result does not depend on
    who came last. Other programs wrote them: read past L1 (.cg).
    """
    rj = tl.arange(0, MERGE)
    rg = tl.arange(0, GP)
    rd = tl.arange(0, DP)
    m = tl.full([GP], -1.0e30, tl.float32)
    l = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    for j in range(0, num, MERGE):
        ok = (j + rj < num)[:, None] & (rg < G)[None, :]
        at = (slot + j + rj)[:, None] * BH + rg[None, :]
        mj = tl.load(part_ml + at * 2, mask=ok, other=-1.0e30, cache_modifier=".cg")
        lj = tl.load(part_ml + at * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
        inside = ok[:, :, None] & (rd < D)[None, None, :]
        aj = tl.load(part_out + at[:, :, None] * D + rd[None, None, :], mask=inside, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(mj, 0))
        fade = tl.exp2(m - m_new)
        c = tl.exp2(mj - m_new[None, :])
        l = l * fade + tl.sum(lj * c, 0)
        acc = acc * fade[:, None] + tl.sum(aj * c[:, :, None], 0)
        m = m_new
    inside = (rg < G)[:, None] & (rd < D)[None, :]
    tl.store(out + rg[:, None] * D + rd[None, :], (acc / l[:, None]).to(out.dtype.element_ty), mask=inside)


@jit
def finish_part(
    state, out, part_out, part_ml, counter, tile, part, num, G: tl.constexpr, GP: tl.constexpr, BH: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, SCHEME: tl.constexpr, SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """A part that is alone writes its result to `out` [G, D]; otherwise parts meet, and the last to arrive merges them.
    `tile` counts (row, kv head); the counter is 0 before and after.
    """
    m, l, acc, acc_high = state
    rh = tl.arange(0, BH)
    rw = tl.arange(0, WP)
    inside = (rh < G)[:, None] & (rw < W)[None, :]
    at = rh[:, None] * D + rw[None, :]
    if num == 1:
        tl.store(out + at, normalised(acc, l, SCHEME).to(out.dtype.element_ty), mask=inside)
        if SCHEME == "int4":
            tl.store(out + at + W, normalised(acc_high, l, SCHEME).to(out.dtype.element_ty), mask=inside)
    if SPLIT and num > 1:
        parts = tl.num_programs(2)
        slot = tile * parts + part
        gain: tl.constexpr = 1.0 if SCHEME == "none" else 1 / 256.0
        tl.store(part_out + slot * BH * D + at, acc * gain, mask=inside)
        if SCHEME == "int4":
            tl.store(part_out + slot * BH * D + at + W, acc_high * gain, mask=inside)
        tl.store(part_ml + (slot * BH + rh) * 2, m)
        tl.store(part_ml + (slot * BH + rh) * 2 + 1, l)
        tl.debug_barrier()
        if tl.atomic_add(counter + tile, 1, sem="acq_rel") == num - 1:
            tl.store(counter + tile, 0)
            merge_parts(part_out, part_ml, out, tile * parts, num, G, GP, BH, D, DP, MERGE)


def tile_sizes(cache: LayerCache, group: int) -> dict[str, int]:
    """Constants of a query tile: see `cache_codes`; BH rows, GP and DP the padding of group and head_dim."""
    width = cache.head_dim // 2 if cache.scheme == "int4" else cache.head_dim
    padded = next_power_of_2(group)
    return {
        "K": cache.num_kv_heads,
        "G": group,
        "D": cache.head_dim,
        "BL": cache.block_len,
        "W": width,
        "WP": max(16, next_power_of_2(width)),
        "DP": max(16, next_power_of_2(cache.head_dim)),
        "GP": padded,
        "BH": max(16, padded),
    }


def cache_arrays(cache: LayerCache) -> list[Tensor]:
    """What kernels read, in their order; where a scheme has no scale or zero, something that is never touched."""
    meta = (cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero)
    return [cache.k, cache.v, *(cache.k if x is None else x for x in meta)]


def score_constants(scale: float, softcap: float) -> tuple[float, float]:
    """score_scale and cap of `softmax_step`."""
    log2e = math.log2(math.e)
    return (2 * log2e * scale / softcap, softcap * log2e) if softcap else (scale * log2e, 0.0)


def num_parts(rows: int, kv_heads: int, table_width: int) -> int:
    """Of the grid, from shapes alone. Rows share them by their lengths; programs that a row does not need exit at
    once.
    """
    return max(1, min(MAX_PARTS, table_width, MAX_COUNTERS // (rows * kv_heads)))


def padded_rows(rows: int) -> int:
    """Constant for `plan_of`'s sum over rows; few values, so that few kernels are compiled."""
    return next(n for n in (1, 16, 128, 512, next_power_of_2(rows)) if n >= rows)


def part_buffers(parts: int, tiles: int, tile_rows: int, cache: LayerCache) -> list[Tensor]:
    """Products, maxima and sums of parts on their way to the merge."""
    size = parts * tiles * tile_rows if parts > 1 else 0
    return [torch.empty(size * n, dtype=torch.float32, device=cache.k.device) for n in (cache.head_dim, 2)]
