"""Activations to 8 bit, one scale a row (or a row and 128 inputs), with the RMSNorm that stands before inside.

Contract. x_TK [T, K] float32, bfloat16 or float16, contiguous; norm (gain_K, eps) or none: normalised first and
rounded to x's dtype, as `rms_norm` would. kind torch.int8 or torch.float8_e4m3fn. Returns new tensors q_TK of that
type and scale float32 [T], or [T, ceil(K/128)] when `grouped`, with x about q * scale:
  scale = max|x| / top (top 127 or 448; at least 1e-10), or the given static `scale` [];
  q = x / scale, rounded to nearest even and held within the top.
Shape letters: T rows, K inputs, G groups of 128 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.kernels.rms_norm import MAX_KERNEL_C, rms_norm_reference
from pagoda.kernels.triton_env import gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

GROUP = 128
TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 1e-10


def quantize_rows_reference(
    x_TK: Tensor, kind: torch.dtype, norm=None, grouped: bool = False, static: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the contract."""
    if norm is not None:
        x_TK = rms_norm_reference(x_TK, *norm)
    T, K = x_TK.shape
    x = F.pad(x_TK.float(), (0, -K % GROUP)).view(T, -1, GROUP) if grouped else x_TK.float().unsqueeze(1)
    top = TOPS[kind]
    scale = (x.abs().amax(-1) / top).clamp(min=SMALLEST) if static is None else static.float().expand(T, x.shape[1])
    q = (x / scale.unsqueeze(-1)).clamp(-top, top)
    q = (q.round() if kind == torch.int8 else q).to(kind).view(T, -1)[:, :K]
    return q.contiguous(), (scale if grouped else scale[:, 0]).contiguous()


@jit
def _quantize_kernel(
    x, gain, static, q, scale, K, G, eps,
    TOP: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, NORM: tl.constexpr, STATIC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row of [BLOCK / SPAN] runs of SPAN inputs, one scale a run."""
    row = tl.program_id(0).to(tl.int64)
    RUNS: tl.constexpr = BLOCK // SPAN
    run = tl.arange(0, RUNS)
    col = run[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    v = tl.load(x + row * K + col, mask=col < K, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(tl.sum(v * v, 1), 0) / K + eps)
        v = v * rstd * tl.load(gain + col, mask=col < K, other=0.0).to(tl.float32)
        v = v.to(x.dtype.element_ty).to(tl.float32)
    if STATIC:
        s = tl.load(static) + tl.zeros([RUNS], tl.float32)
    else:
        s = tl.maximum(tl.max(tl.abs(v), 1) / TOP, 1e-10)
    tl.store(scale + row * G + run, s, mask=run < G)
    v = tl.minimum(tl.maximum(tl.div_rn(v, s[:, None] + tl.zeros_like(v)), -TOP), TOP)
    if q.dtype.element_ty == tl.int8:
        v = (v + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no room for fractions, so it rounds to nearest even
    tl.store(q + row * K + col, v.to(q.dtype.element_ty), mask=col < K)


def quantize_rows_launch(
    x_TK: Tensor, kind: torch.dtype, norm, grouped: bool, static: Tensor | None, q: Tensor, scale: Tensor, pdl: bool
) -> None:
    """The Triton kernel into q and scale."""
    T, K = x_TK.shape
    block = max(GROUP, next_power_of_2(K))
    gain, eps = norm or (x_TK, 0.0)
    _quantize_kernel[(T,)](
        x_TK, gain, x_TK if static is None else static, q, scale, K, scale.shape[1] if grouped else 1, eps,
        TOP=TOPS[kind], BLOCK=block, SPAN=GROUP if grouped else block, NORM=norm is not None,
        STATIC=static is not None, PDL=pdl, num_warps=min(16, max(1, block // 512)),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def quantize_rows(
    x_TK: Tensor,
    kind: torch.dtype,
    norm=None,
    grouped: bool = False,
    static: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """The door: Triton on CUDA for K up to 32768, plain torch elsewhere. norm: (gain_K, eps)."""
    if not x_TK.is_cuda or x_TK.shape[1] > MAX_KERNEL_C or not x_TK.shape[0]:
        return quantize_rows_reference(x_TK, kind, norm, grouped, static)
    T, K = x_TK.shape
    q = torch.empty(T, K, dtype=kind, device=x_TK.device)
    shape = (T, -(-K // GROUP)) if grouped else (T,)
    scale = torch.empty(shape, dtype=torch.float32, device=x_TK.device)
    quantize_rows_launch(x_TK.contiguous(), kind, norm, grouped, static, q, scale, pdl)
    return q, scale
