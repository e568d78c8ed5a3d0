"""Root-mean-square normalisation of rows, with the residual sum that stands before it in a decoder layer.

Contract. x_TC: [T, C] float32, bfloat16 or float16, rows contiguous (any row stride); weight_C: [C], the gain as it
multiplies; residual_TC: like x. y = x * rsqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once. With a
residual the sum s = x + residual is rounded to x's dtype first, then normalised, and both are returned. The caller may
give `out` (for y) and `out_sum` (for s; may be `residual_TC` itself); otherwise new tensors are made. T may be 0.
early_launch (GPU): start before the previous kernel of the stream has ended, and wait for it inside.
Leading dimensions: only the last axis is normalised; x may be of any rank when no residual is given.
Shape letters: T tokens, C hidden size.
"""

import torch
from torch import Tensor

from pagoda.kernels.triton_env import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

MAX_KERNEL_C = 32768  # one program holds a row in registers; longer rows take the reference


def rms_norm_reference(x_TC: Tensor, weight_C: Tensor, eps: float, residual_TC: Tensor | None = None):
    """y, or (y, s) when a residual is given; see the contract."""
    if residual_TC is not None:
        x_TC = x_TC + residual_TC
    x32 = x_TC.float()
    y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight_C.float()).to(x_TC.dtype)
    return y if residual_TC is None else (y, x_TC)


@jit
def _rms_norm_kernel(
    x, weight, res, y, s, x_stride, C, eps, BLOCK: tl.constexpr, RES: tl.constexpr, EARLY: tl.constexpr
):
    """One program a row; res, y and s have rows of exactly C."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < C
    w = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    v = tl.load(x + row * x_stride + col, mask=mask, other=0.0)
    if RES:
        v = v.to(tl.float32) + tl.load(res + row * C + col, mask=mask, other=0.0).to(tl.float32)
        v = v.to(s.dtype.element_ty)
        tl.store(s + row * C + col, v, mask=mask)
    v = v.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(v * v, 0) / C + eps)
    tl.store(y + row * C + col, (v * rstd * w).to(y.dtype.element_ty), mask=mask)


def rms_norm_launch(
    x_TC: Tensor, weight_C: Tensor, eps: float, residual_TC: Tensor | None, out: Tensor, out_sum, early_launch=False
):
    """The Triton kernel on 2-D operands; out and out_sum contiguous."""
    T, C = x_TC.shape
    block = next_power_of_2(C)
    none = x_TC if residual_TC is None else residual_TC
    _rms_norm_kernel[(T,)](
        x_TC,
        weight_C,
        none,
        out,
        none if out_sum is None else out_sum,
        x_TC.stride(0),
        C,
        eps,
        BLOCK=block,
        RES=residual_TC is not None,
        EARLY=early_launch,
        num_warps=min(16, max(1, block // 512)),
        **({"launch_pdl": True} if early_launch and not INTERPRETED else {}),
    )


def rms_norm(
    x_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    residual_TC: Tensor | None = None,
    out: Tensor | None = None,
    out_sum: Tensor | None = None,
    early_launch: bool = False,
):
    """The door: Triton on CUDA for C up to 32768, plain torch elsewhere. Returns y, or (y, x + residual)."""
    assert weight_C.shape == x_TC.shape[-1:]
    assert residual_TC is None or residual_TC.shape == x_TC.shape
    if not x_TC.is_cuda or x_TC.shape[-1] > MAX_KERNEL_C:
        result = rms_norm_reference(x_TC, weight_C, eps, residual_TC)
        y, s = result if residual_TC is not None else (result, None)
        y = y if out is None else out.copy_(y)
        s = s if out_sum is None else out_sum.copy_(s)
        return y if s is None else (y, s)
    flat = x_TC if x_TC.dim() == 2 and x_TC.stride(1) == 1 else x_TC.reshape(-1, x_TC.shape[-1])
    out = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device) if out is None else out
    if residual_TC is not None:
        residual_TC = residual_TC.contiguous()
        out_sum = torch.empty_like(residual_TC) if out_sum is None else out_sum
    if flat.shape[0]:
        rms_norm_launch(flat, weight_C, eps, residual_TC, out, out_sum, early_launch)
    return out if residual_TC is None else (out, out_sum)
