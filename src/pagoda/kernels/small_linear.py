"""Products of few rows with a 16-bit matrix, bound by the bytes of the weights; norm, activation and residual inside.

Contract. y = act(rms_norm(x) @ W.T + bias) + residual, every part but the product optional.
  x_TK [T, K], W_NK [N, K] of one dtype (bfloat16 or float16), contiguous; gain_K [K]; bias_N [N]
  act "": y is [T, N]; else W holds N/2 gate rows, then N/2 up rows, and y = act(gate) * up is [T, N/2]
  residual like y (may be y itself); y in x's dtype or float32, owned by the caller
Sums in float32, rounded once. With a norm, x * gain is rounded to x's dtype for two rows and more (float32 for one) and
the row's 1/rms multiplies the sum. A split of K is added up by the last program of a tile to arrive, in a fixed order:
deterministic; `counters` (zero before, zero after) belong to one stream.
`pdl` launches early: the first weights are asked for before the previous kernel has ended.
Constants: a sweep on an H200 inside whole decode steps; `benchmarks/linears.py` measures what they give.
Shape letters: T rows, K in features, N out features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pagoda.kernels.act_mul import act_mul_reference, activate
from pagoda.kernels.rms_norm import rms_norm_reference
from pagoda.kernels.triton_env import gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

MAX_ROWS = 64


class Extras(NamedTuple):
    """What is fused around a product. gain_K and eps stand together; act "" is none."""

    gain_K: Tensor | None = None
    eps: float = 0.0
    bias_N: Tensor | None = None
    act: str = ""
    residual: Tensor | None = None
    pdl: bool = False


def with_extras(product, x_TK: Tensor, extras: Extras) -> Tensor:
    """The reference of every fused linear: `product(x)` is x @ W.T in float32. Returns float32."""
    x = x_TK.float()
    if extras.gain_K is not None:
        x = rms_norm_reference(x, extras.gain_K, extras.eps)
    y = product(x)
    if extras.bias_N is not None:
        y = y + extras.bias_N.float()
    if extras.act:
        y = act_mul_reference(y, extras.act)
    return y if extras.residual is None else y + extras.residual.float()


def small_linear_reference(x_TK: Tensor, w_NK: Tensor, extras: Extras) -> Tensor:
    """See the contract; float32."""
    return with_extras(lambda x: x @ w_NK.float().T, x_TK, extras)


@jit
def tile_rows(pid, N, BN: tl.constexpr, TILE: tl.constexpr, GLU: tl.constexpr):
    """(rows, which exist) of output tile pid: BN in a run; or, in each TILE of them, TILE/2 gate rows and then their
    TILE/2 up rows."""
    r = pid * BN + tl.arange(0, BN)
    if GLU:
        gate = r // TILE * (TILE // 2) + r % (TILE // 2)
        rows = gate + tl.where(r % TILE < TILE // 2, 0, N // 2)
        ok = gate < N // 2
    else:
        rows = r
        ok = rows < N
    return rows, ok


@jit
def meet(acc, part, count, tile, ps, BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr):
    """The meeting of a split: (sum of the tile's SPLIT parts, True) for the last program to arrive, else (?, False)."""
    at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    tl.store(part + (tile * SPLIT + ps) * (BN * BM) + at, acc)
    tl.debug_barrier()
    last = tl.atomic_add(count + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.store(count + tile, 0)
        acc = tl.zeros_like(acc)
        for s in tl.static_range(SPLIT):  # unrolled: all loads in flight at once
            acc += tl.load(part + (tile * SPLIT + s) * (BN * BM) + at, cache_modifier=".cg")
    return acc, last


@jit
def finish_tile(
    acc, y, bias, res, rm, M, pid, N,
    BN: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, GLU: tl.constexpr, ACT: tl.constexpr, RES: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Bias, activation, residual and store of a [BN, BM] float32 tile whose rows are `tile_rows`."""
    rows, ok = tile_rows(pid, N, BN, TILE, GLU)
    width = N
    if BIAS:
        acc += tl.load(bias + rows, mask=ok, other=0.0).to(tl.float32)[:, None]
    if ACT != "":
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BN // TILE, 2, TILE // 2, BM]), [0, 2, 3, 1]))
        acc = tl.reshape(activate(gate, ACT) * up, [BN // 2, BM])
        width = N // 2
        rows = pid * (BN // 2) + tl.arange(0, BN // 2)
        ok = rows < width
    mask = ok[:, None] & (rm < M)[None, :]
    at = rm.to(tl.int64)[None, :] * width + rows[:, None]
    if RES:
        acc += tl.load(res + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


@jit
def load_weights(wp, ok, k, rk, K, EVEN: tl.constexpr):
    """One [BN, BK] tile at column k; nothing but this matrix wants these bytes again soon."""
    if EVEN:
        w = tl.load(wp + k, eviction_policy="evict_first")
    else:
        mask = ok[:, None] & (k + rk < K)[None, :]
        w = tl.load(wp + k, mask=mask, other=0.0, eviction_policy="evict_first")
    return w


@jit
def _load_row(x, gain, k, rk, K, NORM: tl.constexpr, EVEN: tl.constexpr):
    """(x, x * gain) of columns k + rk in float32."""
    if EVEN:
        xv = tl.load(x + k + rk).to(tl.float32)
    else:
        xv = tl.load(x + k + rk, mask=k + rk < K, other=0.0).to(tl.float32)
    xg = xv
    if NORM:
        gv = tl.load(gain + k + rk) if EVEN else tl.load(gain + k + rk, mask=k + rk < K, other=0.0)
        xg = xv * gv.to(tl.float32)
    return xv, xg


@jit
def _gemv_kernel(
    x, w, y, gain, bias, res, N, K, eps,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    RES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: y[n] = sum_k w[n,k] x[k], BN outputs a program, all warps along K. N counts y's columns."""
    pid = tl.program_id(0)
    rn = pid * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    wp = w + rn.to(tl.int64)[:, None] * K + rk[None, :]
    up = wp + N.to(tl.int64) * K
    acc = tl.zeros([BN, BK], tl.float32)
    acc2 = tl.zeros([BN, BK], tl.float32)
    ssq = tl.zeros([BK], tl.float32)
    START: tl.constexpr = BK if PDL else 0
    if PDL:
        # weights do not depend on the previous kernel: they are asked for before waiting for it
        w0 = load_weights(wp, rn < N, 0, rk, K, EVEN)
        if ACT != "":
            u0 = load_weights(up, rn < N, 0, rk, K, EVEN)
        gdc_launch_dependents()
        gdc_wait()
        xv, xg = _load_row(x, gain, 0, rk, K, NORM, EVEN)
        acc += w0.to(tl.float32) * xg[None, :]
        if ACT != "":
            acc2 += u0.to(tl.float32) * xg[None, :]
        ssq += xv * xv
    for k in tl.range(START, K, BK, loop_unroll_factor=UNROLL):
        wv = load_weights(wp, rn < N, k, rk, K, EVEN)
        if ACT != "":
            uv = load_weights(up, rn < N, k, rk, K, EVEN)
        xv, xg = _load_row(x, gain, k, rk, K, NORM, EVEN)
        acc += wv.to(tl.float32) * xg[None, :]
        if ACT != "":
            acc2 += uv.to(tl.float32) * xg[None, :]
        if NORM:
            ssq += xv * xv
    rstd = 1.0
    if NORM:
        rstd = tl.rsqrt(tl.sum(ssq, 0) / K + eps)
    out = tl.sum(acc, 1) * rstd
    if BIAS:
        out += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)
    if ACT != "":
        u = tl.sum(acc2, 1) * rstd
        if BIAS:
            u += tl.load(bias + N + rn, mask=rn < N, other=0.0).to(tl.float32)
        out = activate(out, ACT) * u
    if RES:
        out += tl.load(res + rn, mask=rn < N, other=0.0).to(tl.float32)
    tl.store(y + rn, out.to(y.dtype.element_ty), mask=rn < N)


@jit(do_not_specialize=["M"])
def _dot_kernel(
    x, w, y, gain, bias, res, part, count, M, N, K, eps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, RES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, SPLIT, tiles of M). The weights are the long side of the matrix instruction: 8 rows of x cost
    8 columns. NORM needs SPLIT 1."""
    pid = tl.program_id(0)
    ps = tl.program_id(1)
    pm = tl.program_id(2)
    rows, ok = tile_rows(pid, N, BN, BN, ACT != "")
    rm = pm * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    per = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    k0 = ps * per
    k1 = tl.minimum(k0 + per, K)
    wp = w + rows.to(tl.int64)[:, None] * K + rk[None, :]
    xp = x + rm.to(tl.int64)[:, None] * K + rk[None, :]
    xmask = (rm < M)[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    ssq = tl.zeros([BM, BK], tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for k in tl.range(k0, k1, BK, num_stages=STAGES):
        mask = xmask if EVEN else xmask & (k + rk < K)[None, :]
        xv = tl.load(xp + k, mask=mask, other=0.0)
        wv = load_weights(wp, ok, k, rk, K, EVEN)
        if NORM:
            xf = xv.to(tl.float32)
            ssq += xf * xf
            gv = tl.load(gain + k + rk) if EVEN else tl.load(gain + k + rk, mask=k + rk < K, other=0.0)
            xv = (xf * gv.to(tl.float32)[None, :]).to(xv.dtype)
        acc = tl.dot(wv, xv.T, acc)
    last = True
    if SPLIT > 1:
        acc, last = meet(acc, part, count, pm * tl.num_programs(0) + pid, ps, BN, BM, SPLIT)
    if last:
        if NORM:
            acc *= tl.rsqrt(tl.sum(ssq, 1) / K + eps)[None, :]
        finish_tile(acc, y, bias, res, rm, M, pid, N, BN, BN, BM, ACT != "", ACT, RES, BIAS)


# (N, K, act) of the measured shapes; each won inside a whole step under early launch
_GEMV = {  # BN, BK, warps, unroll
    (6144, 4096, False): (2, 1024, 4, 1),
    (4096, 4096, False): (8, 1024, 4, 1),
    (28672, 4096, True): (2, 1024, 4, 1),
    (4096, 14336, False): (8, 1024, 4, 1),
    (128256, 4096, False): (4, 256, 1, 4),
    (4096, 1024, False): (8, 1024, 4, 1),
    (1024, 2048, False): (4, 1024, 4, 2),
    (6144, 1024, True): (2, 1024, 4, 1),
    (1024, 3072, False): (4, 1024, 4, 2),
    (151936, 1024, False): (4, 512, 2, 2),
    # halves of the first, as two ranks hold them: the tiles of the whole, not swept
    (3072, 4096, False): (2, 1024, 4, 1),
    (4096, 2048, False): (8, 1024, 4, 1),
    (4096, 7168, False): (8, 1024, 4, 1),
    (64128, 4096, False): (4, 256, 1, 4),
}
_DOT = {  # up to 16 rows: BN, BK, warps, stages, split; BN counts gate and up rows
    (6144, 4096, False): (64, 256, 4, 4, 1),
    (4096, 4096, False): (64, 64, 4, 8, 2),
    (28672, 4096, True): (128, 128, 4, 4, 1),
    (4096, 14336, False): (64, 128, 4, 4, 4),
    (128256, 4096, False): (128, 128, 4, 4, 1),
    (4096, 1024, False): (64, 128, 4, 6, 1),
    (1024, 2048, False): (32, 128, 2, 4, 8),
    (6144, 1024, True): (64, 256, 2, 4, 1),
    (1024, 3072, False): (32, 128, 2, 4, 8),
    (151936, 1024, False): (64, 128, 4, 4, 1),
}


def gemv_config(n: int, k: int, glu: bool) -> tuple[int, int, int, int]:
    """(BN, BK, warps, unroll) for one row. All warps lie along K: BK = 256 x warps."""
    if (n, k, glu) in _GEMV:
        return _GEMV[n, k, glu]
    if n >= 65536:
        return 4, 256, 1, 4
    block = 1024
    while block > 256 and k % block:
        block //= 2
    return (2 if glu and block == 1024 else 4), block, block // 256, 1024 // block


def dot_config(rows: int, n: int, k: int, glu: bool) -> tuple[int, int, int, int, int]:
    """(BN, BK, warps, stages, split) for 2 to 64 rows. Splits only where tiles are fewer than about 130."""
    if rows <= 16 and (n, k, glu) in _DOT:
        return _DOT[n, k, glu]
    if n >= 65536:
        return 128, 128, 4, 4, 1
    tiles, split = n // (128 if glu else 64), 1
    while split < 8 and tiles * split < 96 and k // 128 >= 4 * split:
        split *= 2
    return (128 if glu else 64), 128, 4, 4 if glu else 6, split


def supports(rows: int, n: int, k: int, dtype: torch.dtype, norm: bool = False, act: str = "", residual: bool = False):
    """Whether one kernel does it and beats the library's product with the extras after it (H200)."""
    if dtype not in (torch.bfloat16, torch.float16) or k % 8 or n % 8 or k < 64 or not 1 <= rows <= MAX_ROWS:
        return False
    if rows == 1:
        return True
    if norm and (dtype == torch.float16 or rows > 16 or dot_config(rows, n, k, bool(act))[4] > 1):
        return False  # x * gain may leave float16's range; wide tiles and splits have no room for the sums of squares
    return rows <= 32 or bool(act) or residual or n >= 65536


def small_linear_launch(x_TK: Tensor, w_NK: Tensor, extras: Extras, y: Tensor, counters: Tensor) -> None:
    """One launch: gemv for one row, dot for more. See the contract."""
    (T, K), N = x_TK.shape, w_NK.shape[0]
    e, glu = extras, bool(extras.act)
    flags = dict(NORM=e.gain_K is not None, ACT=e.act, RES=e.residual is not None, BIAS=e.bias_N is not None, PDL=e.pdl)
    gain, bias, res = (x_TK if t is None else t for t in (e.gain_K, e.bias_N, e.residual))
    early = {"launch_pdl": True} if e.pdl else {}
    if T == 1:
        BN, BK, warps, unroll = gemv_config(N, K, glu)
        width = N // 2 if glu else N
        even = width % BN == 0 and K % BK == 0
        _gemv_kernel[(-(-width // BN),)](
            x_TK, w_NK, y, gain, bias, res, width, K, e.eps,
            BN=BN, BK=BK, UNROLL=unroll, EVEN=even, num_warps=warps, **flags, **early,
        )  # fmt: skip
        return
    BN, BK, warps, stages, split = dot_config(T, N, K, glu)
    # Eight columns and the sums of squares of a norm make a slow layout (A: 5.7 ms a step of 8 rows, 4.6 of 16).
    BM = max(16 if e.gain_K is not None else 8, next_power_of_2(min(T, MAX_ROWS)))
    tiles, tiles_m = -(-N // BN), -(-T // BM)
    even = N % BN == 0 and K % BK == 0
    part = x_TK.new_empty(tiles * tiles_m * split * BN * BM if split > 1 else 1, dtype=torch.float32)
    assert split == 1 or tiles * tiles_m <= counters.numel()
    _dot_kernel[(tiles, split, tiles_m)](
        x_TK, w_NK, y, gain, bias, res, part, counters, T, N, K, e.eps,
        BM=BM, BN=BN, BK=BK, STAGES=stages, SPLIT=split, EVEN=even, num_warps=warps, **flags, **early,
    )  # fmt: skip
