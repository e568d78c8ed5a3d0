"""The gated activation of a feed-forward block: act(gate) * up.

Contract. gate_up_T2F: [T, 2F] contiguous, gate columns first, then up columns; y_TF: [T, F] of the same dtype, in `out`
when given. act: "silu" (x * sigmoid(x)), "gelu_tanh" (0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))) or "gelu" (with
erf). Computed in float32, rounded once. T may be 0.
Shape letters: T tokens, F ffn size.
"""

import torch.nn.functional as F
from torch import Tensor

from pagoda.kernels.triton_env import jit, tl

ACTS = ("silu", "gelu_tanh", "gelu")


def act_mul_reference(gate_up_T2F: Tensor, act: str) -> Tensor:
    """See the contract."""
    gate, up = gate_up_T2F.float().chunk(2, -1)
    gate = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")
    return (gate * up).to(gate_up_T2F.dtype)


@jit
def activate(v, ACT: tl.constexpr):
    """The activation named ACT on float32 values; other kernels fuse it."""
    if ACT == "silu":
        v = v / (1.0 + tl.exp(-v))
    elif ACT == "gelu_tanh":
        u = 0.7978845608028654 * (v + 0.044715 * v * v * v)
        v = v / (1.0 + tl.exp(-2.0 * u))  # 0.5 (1 + tanh u) = sigmoid(2u)
    else:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    return v


@jit
def _act_mul_kernel(gate_up, y, F, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (T, F / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < F
    gate = tl.load(gate_up + row * (2 * F) + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * F) + F + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * F + col, (activate(gate, ACT) * up).to(y.dtype.element_ty), mask=mask)


def act_mul_launch(gate_up_T2F: Tensor, act: str, out: Tensor) -> None:
    """The Triton kernel on contiguous operands."""
    T, F2 = gate_up_T2F.shape
    block = 1024
    _act_mul_kernel[(T, -(-F2 // 2 // block))](gate_up_T2F, out, F2 // 2, ACT=act, BLOCK=block, num_warps=4)


def act_mul(gate_up_T2F: Tensor, act: str, out: Tensor | None = None) -> Tensor:
    """The door: Triton on CUDA, plain torch elsewhere."""
    assert act in ACTS and gate_up_T2F.shape[-1] % 2 == 0
    if not gate_up_T2F.is_cuda:
        y = act_mul_reference(gate_up_T2F, act)
        return y if out is None else out.copy_(y)
    T, F2 = gate_up_T2F.shape
    out = gate_up_T2F.new_empty(T, F2 // 2) if out is None else out
    if T:
        act_mul_launch(gate_up_T2F.contiguous(), act, out)
    return out
