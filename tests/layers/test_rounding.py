"""Rounding while loading, a few rows at a time: the same bits as the formulas on the whole matrix."""

import pytest
import torch

from pagoda.kernels import row_blocks
from pagoda.kernels.cpu.pack import quantize_int8
from pagoda.layers.schemes import SCHEMES
from pagoda.layers.schemes.int4 import nibbles


@pytest.fixture(autouse=True, params=[1, 3, 1000])
def rows_a_block(request, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 128 * request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def weight_NK(request):
    w = torch.randn(50, 128) * torch.logspace(-3, 2, 50)[:, None]
    w[7], w[8], w[9] = 0, w[8].abs(), -w[9].abs()
    return w.to(request.param)


@pytest.mark.parametrize("group", [32, 128])
def test_int4(weight_NK, group):
    w = weight_NK.double().view(50, -1, group)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scales = ((high.float() - low.float()) / 15).clamp(min=1e-6).half()
    zeros = (-low.float() / scales.float()).round().clamp(0, 15)
    quotient = weight_NK.float().view(50, -1, group) / scales.float()[..., None]
    q = (quotient.round() + zeros[..., None]).clamp(0, 15)
    got = SCHEMES["int4"]().quantize(weight_NK, group)
    torch.testing.assert_close(got["scales"], scales, rtol=0, atol=0)
    torch.testing.assert_close(got["zeros"], zeros.to(torch.uint8), rtol=0, atol=0)
    torch.testing.assert_close(nibbles(got["qweight"]), q.flatten(1).to(torch.uint8), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "top"), [("int8", 127.0), ("fp8", 448.0)])
def test_eight_bit(weight_NK, name, top):
    w = weight_NK.float()
    scales = (w.abs().amax(-1) / top).clamp(min=1e-10)
    q = (w / scales[:, None]).clamp(-top, top)
    q = q.round().to(torch.int8) if name == "int8" else q.to(torch.float8_e4m3fn)
    got = SCHEMES[name]().quantize(weight_NK)
    torch.testing.assert_close(got["scales"], scales, rtol=0, atol=0)
    assert torch.equal(got["qweight"].view(torch.uint8), q.view(torch.uint8))


def test_the_head_beside_quantized_layers(weight_NK):
    w = weight_NK.float().view(50, 4, 32)
    scales = w.abs().amax(-1) / 127
    q = (w * torch.where(scales > 0, 1 / scales, 0.0)[..., None]).round()
    got_q, got_scales = quantize_int8(weight_NK, 32)
    torch.testing.assert_close(got_scales, scales, rtol=0, atol=0)
    torch.testing.assert_close(got_q, q.flatten(1).to(torch.int8), rtol=0, atol=0)
