"""Gated activations against transformers' own, and the Triton kernel against the reference."""

import pytest
import torch
from transformers.activations import ACT2FN

from pagoda.kernels.act_mul import act_mul, act_mul_launch, act_mul_reference

NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


@pytest.mark.parametrize("act", list(NAMES))
def test_door_is_transformers(act):
    x = torch.randn(5, 22) * 3
    gate, up = x.chunk(2, -1)
    out = torch.full((5, 11), float("nan"))
    assert act_mul(x, act, out) is out
    torch.testing.assert_close(out, ACT2FN[NAMES[act]](gate) * up)


@pytest.mark.parametrize("act", list(NAMES))
@pytest.mark.parametrize("shape", [(1, 16), (4, 1037), (3, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_against_reference(device, act, shape, dtype):
    T, F = shape
    x = (torch.randn(T, 2 * F, device=device) * 3).to(dtype)
    y = torch.full((T, F), float("nan"), dtype=dtype, device=device)
    act_mul_launch(x, act, y)
    torch.testing.assert_close(y, act_mul_reference(x, act), rtol=2e-3, atol=2e-3)
