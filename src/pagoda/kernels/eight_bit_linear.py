"""Products of 8-bit activations with an 8-bit matrix, int8 or e4m3, scales outside; activation and residual inside.

Contract. y = act((q_x * s_x) @ (q_w * s_w).T + bias) + residual, the last parts optional as in `small_linear`.
  q_x [T, K], q_w [N, K] both int8 or both float8_e4m3fn, contiguous
  s_x float32 [T], s_w float32 [N]; or, float8 only, s_x [T, G] and s_w [N, G], one a run of 128 inputs
  y in the dtype of `y` (16 or 32 bit), owned by the caller; residual like y, may be y itself
int8 sums are exact in int32 (K < 133,000). float8 sums are float32; the matrix instruction's own sum is shorter, so it
is emptied every 128 or 256 inputs. Split sums as in `small_linear`: deterministic, `counters` zero before and after.
Shape letters: T rows, K in features, N out features, G groups of 128 inputs.
"""

import torch
from torch import Tensor

from pagoda.kernels.quantize_rows import GROUP
from pagoda.kernels.small_linear import Extras, finish_tile, load_weights, meet, tile_rows, with_extras
from pagoda.kernels.triton_env import gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

FEW_ROWS = 64  # up to here the weights' bytes are the cost


def scaled(q: Tensor, s: Tensor) -> Tensor:
    """q * s in float32, s one a row or one a row and 128 inputs."""
    s = s.unsqueeze(1) if s.dim() == 1 else s.repeat_interleave(GROUP, 1)[:, : q.shape[1]]
    return q.float() * s


def eight_bit_linear_reference(qx_TK: Tensor, sx: Tensor, qw_NK: Tensor, sw: Tensor, extras: Extras) -> Tensor:
    """See the contract; float32."""
    w_NK = scaled(qw_NK, sw)
    return with_extras(lambda x: x @ w_NK.T, scaled(qx_TK, sx), extras)


@jit
def _place(pid, tiles_n, tiles_m, BAND: tl.constexpr):
    """(tile of N, tile of M) of program pid: bands of BAND tiles of M, so that neighbours share operands in L2."""
    band = pid // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = pid % (BAND * tiles_n)
    return inside // height, band * BAND + inside % height


@jit(do_not_specialize=["M", "tiles_m"])
def _kernel(
    x, sx, w, sw, y, bias, res, part, count, M, N, K, G, tiles_n, tiles_m,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    GROUPED: tl.constexpr, ACT: tl.constexpr, RES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles_n * tiles_m, SPLIT). GROUPED needs BK 128."""
    pid, pm = _place(tl.program_id(0), tiles_n, tiles_m, 8)
    ps = tl.program_id(1)
    rows, ok = tile_rows(pid, N, BN, BN, ACT != "")
    rm = pm * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    per = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    k0 = ps * per
    wp = w + rows.to(tl.int64)[:, None] * K + rk[None, :]
    xp = x + rm.to(tl.int64)[:, None] * K + rk[None, :]
    xmask = (rm < M)[:, None]
    INT: tl.constexpr = x.dtype.element_ty == tl.int8
    acc = tl.zeros([BN, BM], tl.int32 if INT else tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for k in tl.range(k0, tl.minimum(k0 + per, K), BK, num_stages=STAGES):
        if EVEN:
            xv = tl.load(xp + k, mask=xmask, other=0.0)
        else:
            xv = tl.load(xp + k, mask=xmask & (k + rk < K)[None, :], other=0.0)
        wv = load_weights(wp, ok, k, rk, K, EVEN)
        if INT:
            acc = tl.dot(wv, xv.T, acc, out_dtype=tl.int32)
        else:
            d = tl.dot(wv, xv.T)
            if GROUPED:
                wg = tl.load(sw + rows * G + k // 128, mask=ok, other=0.0)
                d = d * wg[:, None] * tl.load(sx + rm * G + k // 128, mask=rm < M, other=0.0)[None, :]
            acc += d
    last = True
    if SPLIT > 1:
        acc, last = meet(acc, part, count, pm * tiles_n + pid, ps, BN, BM, SPLIT)
    if last:
        out = acc.to(tl.float32)
        if not GROUPED:
            out *= tl.load(sw + rows, mask=ok, other=0.0)[:, None]
            out *= tl.load(sx + rm, mask=rm < M, other=0.0)[None, :]
        finish_tile(out, y, bias, res, rm, M, pid, N, BN, BN, BM, ACT != "", ACT, RES, BIAS)


def config(rows: int, n: int, k: int, grouped: bool, glu: bool) -> tuple[int, int, int, int, int, int]:
    """(BM, BN, BK, warps, stages, split)."""
    if rows > FEW_ROWS:
        return 128, 128, 128, 8, 4, 1
    bk = 128 if grouped or k < 2048 else 256
    bn = 128 if glu else 64
    tiles, split = n // bn, 1
    while split < 8 and tiles * split < 132 and k // bk >= 4 * split:
        split *= 2
    return max(16, next_power_of_2(rows)), bn, bk, 4, 4, split


def eight_bit_linear_launch(
    qx_TK: Tensor, sx: Tensor, qw_NK: Tensor, sw: Tensor, extras: Extras, y: Tensor, counters: Tensor
) -> None:
    """One launch. See the contract (the norm belongs to `quantize_rows`)."""
    (T, K), N, e = qx_TK.shape, qw_NK.shape[0], extras
    assert e.gain_K is None and qx_TK.dtype == qw_NK.dtype
    grouped = sw.dim() == 2
    BM, BN, BK, warps, stages, split = config(T, N, K, grouped, bool(e.act))
    assert not grouped or BK == GROUP
    tiles_n, tiles_m = -(-N // BN), -(-T // BM)
    kind = torch.int32 if qx_TK.dtype == torch.int8 else torch.float32
    part = torch.empty(tiles_n * tiles_m * split * BN * BM if split > 1 else 1, dtype=kind, device=y.device)
    assert split == 1 or tiles_n * tiles_m <= counters.numel()
    _kernel[(tiles_n * tiles_m, split)](
        qx_TK, sx, qw_NK, sw, y, e.bias_N if e.bias_N is not None else y, e.residual if e.residual is not None else y,
        part, counters, T, N, K, sw.shape[1] if grouped else 1, tiles_n, tiles_m,
        BM=BM, BN=BN, BK=BK, STAGES=stages, SPLIT=split, GROUPED=grouped, ACT=e.act, RES=e.residual is not None,
        BIAS=e.bias_N is not None, EVEN=N % BN == 0 and K % BK == 0, PDL=e.pdl, num_warps=warps,
        **({"launch_pdl": True} if e.pdl else {}),
    )  # fmt: skip


def eight_bit_linear(
    qx_TK: Tensor, sx: Tensor, qw_NK: Tensor, sw: Tensor, extras: Extras, y: Tensor, counters: Tensor | None
) -> Tensor:
    """The door, into y: on CUDA the library's row-scaled float8 product for many rows (bfloat16 y, nothing fused but
    the bias), else Triton; elsewhere int8 through exact int32 products, float8 through float32."""
    if y.is_cuda:
        plain = not extras.act and extras.residual is None and y.dtype == torch.bfloat16
        wide = qw_NK.shape[0] % 16 == 0 and qw_NK.shape[1] % 16 == 0 and sw.dim() == 1
        if qx_TK.dtype == torch.float8_e4m3fn and qx_TK.shape[0] > FEW_ROWS and plain and wide:
            scales = {"scale_a": sx.unsqueeze(1), "scale_b": sw.unsqueeze(0)}
            return torch._scaled_mm(qx_TK, qw_NK.t(), bias=extras.bias_N, out_dtype=y.dtype, out=y, **scales)
        eight_bit_linear_launch(qx_TK, sx, qw_NK, sw, extras, y, counters)
        return y
    if qx_TK.dtype == torch.int8:
        exact = torch._int_mm(qx_TK, qw_NK.t()).float() * sx.unsqueeze(1) * sw
        return y.copy_(with_extras(lambda _: exact, qx_TK, extras))
    return y.copy_(eight_bit_linear_reference(qx_TK, sx, qw_NK, sw, extras))
