"""8-bit activations and products: references against plain arithmetic, kernels against references."""

import pytest
import torch

from pagoda.kernels import eight_bit_linear as eb
from pagoda.kernels.quantize_rows import quantize_rows, quantize_rows_launch, quantize_rows_reference
from pagoda.kernels.rms_norm import rms_norm
from pagoda.kernels.small_linear import Extras

I8, F8 = torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize("kind", [I8, F8])
@pytest.mark.parametrize("grouped", [False, True])
def test_quantized_rows_are_near(kind, grouped):
    x = torch.randn(5, 300) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    q, scale = quantize_rows(x, kind, grouped=grouped)
    assert q.dtype == kind and scale.shape == ((5, 3) if grouped else (5,))
    back = eb.scaled(q, scale)
    worst = x.abs().amax(1, keepdim=True)
    assert ((back - x).abs() <= worst * (0.5 / 127 * 1.01 if kind == I8 else 1 / 16)).all()
    assert (back.abs().amax(1) <= worst[:, 0] * 1.001).all()


def test_static_scale_saturates():
    q, scale = quantize_rows(torch.tensor([[1000.0, -3.0, 0.2]]), F8, static=torch.tensor(0.1))
    assert q.float().tolist() == [[448.0, -30.0, 2.0]] and scale.tolist() == [pytest.approx(0.1)]


@pytest.mark.parametrize("kind", [I8, F8])
@pytest.mark.parametrize("case", ["plain", "norm", "grouped", "static"])
@pytest.mark.parametrize("shape", [(1, 128), (3, 300), (2, 1000)])
def test_quantize_kernel(device, kind, case, shape):
    T, K = shape
    x = (torch.randn(T, K, device=device) * 3).half()
    norm = (torch.rand(K, device=device).half(), 1e-5) if case == "norm" else None
    static = torch.tensor(0.02, device=device) if case == "static" else None
    want_q, want_s = quantize_rows_reference(x, kind, norm, case == "grouped", static)
    q = torch.full_like(want_q.float(), 99).to(kind)
    scale = torch.full_like(want_s, float("nan"))
    quantize_rows_launch(x, kind, norm, case == "grouped", static, q, scale, False)
    torch.testing.assert_close(scale, want_s, rtol=2e-3, atol=0)
    q, want_q = q.float(), want_q.float()
    if (
        kind == F8 and device.type == "cpu"
    ):  # Triton 3.6's interpreter loses the carry when it rounds up to a power of 2
        q[want_q.abs().log2() % 1 == 0] = want_q[want_q.abs().log2() % 1 == 0]
    if kind == I8 and case in ("plain", "grouped") and device.type == "cpu":
        assert torch.equal(q, want_q)
    else:  # a sum in another order may tip a value over a border; the interpreter rounds ties up
        step = 1 if kind == I8 else want_q.abs() / 7 + 0.01
        assert ((q - want_q).abs() <= step).all()


def check(device, kind, rows, n, k, grouped=False, act="", bias=False, residual=False):
    x = torch.randn(rows, k, device=device)
    w = torch.randn(n, k, device=device) * k**-0.5
    qx, sx = quantize_rows_reference(x, kind, grouped=grouped)
    qw, sw = quantize_rows_reference(w, kind, grouped=grouped)
    width = n // 2 if act else n
    extras = Extras(
        bias_N=torch.randn(n, device=device).half() if bias else None,
        act=act,
        residual=torch.randn(rows, width, device=device).half() if residual else None,
    )
    want = eb.eight_bit_linear_reference(qx, sx, qw, sw, extras)
    exact = eb.with_extras(lambda v: v @ w.T, x, extras)
    assert (want - exact).norm() / exact.norm() < (0.03 if kind == I8 else 0.08)
    y = torch.full((rows, width), float("nan"), dtype=torch.float16, device=device)
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    eb.eight_bit_linear_launch(qx, sx, qw, sw, extras, y, counters)
    torch.testing.assert_close(y.float(), want, rtol=4e-3, atol=4e-3)
    assert not counters.any()
    y.fill_(float("nan"))
    torch.testing.assert_close(
        eb.eight_bit_linear(qx, sx, qw, sw, extras, y, counters).float(), want, rtol=4e-3, atol=4e-3
    )


CASES = [
    dict(rows=1, n=64, k=128),
    dict(rows=3, n=72, k=300, bias=True, residual=True),
    dict(rows=17, n=144, k=256, act="silu", bias=True),
    dict(rows=2, n=40, k=2304, residual=True),
    dict(rows=130, n=136, k=144),
]


@pytest.mark.parametrize("form", ["int8", "fp8", "fp8 grouped"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(device, form, case):
    check(device, I8 if form == "int8" else F8, grouped="grouped" in form, **case)


def test_norm_inside_is_norm_before(device):
    x, gain = torch.randn(4, 96, device=device).half(), torch.rand(96, device=device).half()
    a, b = quantize_rows(x, I8, (gain, 1e-5)), quantize_rows(rms_norm(x, gain, 1e-5), I8)
    torch.testing.assert_close(eb.scaled(*a), eb.scaled(*b), rtol=0, atol=float(a[1].max()) * 1.01)


def test_every_tile_has_one_program():
    """The banded order of tiles is a permutation (checked in the same arithmetic on numbers)."""
    for tiles_n, tiles_m in ((3, 1), (5, 9), (2, 16), (7, 20)):
        seen = set()
        for pid in range(tiles_n * tiles_m):
            band, inside = divmod(pid, 8 * tiles_n)
            height = min(tiles_m - band * 8, 8)
            seen.add((inside // height, band * 8 + inside % height))
        assert seen == {(n, m) for n in range(tiles_n) for m in range(tiles_m)}
