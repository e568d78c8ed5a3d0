"""int8 and float8 matrices: checkpoints, cuts, products; the oracle is arithmetic on the dequantized numbers."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.errors import CheckpointError
from pagoda.layers.linear import Linear, Norm
from pagoda.layers.schemes import SCHEMES
from pagoda.layers.schemes.eight_bit import Fp8, Int8

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def linear_of(name, canonical, k, role="o", bias=None, dtype=torch.float32):
    return Linear.pack(role, name, canonical, bias, k, "cpu", dtype)


@pytest.mark.parametrize("name", list(KINDS))
def test_rounding_and_products_are_near(name):
    w, b, x = torch.randn(24, 80) * torch.logspace(-2, 2, 24)[:, None], torch.randn(24), torch.randn(5, 80)
    canonical = SCHEMES[name]().quantize(w)
    assert {n: (t.shape, t.dtype) for n, t in canonical.items()} == {
        "qweight": ((24, 80), KINDS[name]),
        "scales": ((24,), torch.float32),
    }
    linear = linear_of(name, canonical, 80, bias=b)
    worst = w.abs().amax(1, keepdim=True)
    assert ((linear.dequantize() - w).abs() <= worst * (0.51 / 127 if name == "int8" else 1 / 16)).all()
    want = x @ linear.dequantize().T + b
    assert ((linear(x) - want).norm() / want.norm()) < (0.01 if name == "int8" else 0.04)
    out = torch.full((5, 24), float("nan"))
    assert linear(x, out=out) is out
    assert not out.isnan().any()


def test_int8_products_are_exact():
    """Activations that int8 holds exactly: the result is the integers' own."""
    w, x = torch.randint(-127, 128, (16, 32)).float(), torch.randint(-126, 127, (3, 32)).float()
    w[:, 0], x[:, 0] = 127, 127
    linear = linear_of("int8", Int8().quantize(w), 32)
    torch.testing.assert_close(linear(x), x @ w.T, rtol=1e-6, atol=0)


def test_every_extra():
    w, b = torch.randn(40, 64), torch.randn(40)
    x, gain, res = torch.randn(3, 64), torch.rand(64), torch.randn(3, 20)
    linear = linear_of("int8", Int8().quantize(w), 64, "gate_up", b)
    h = F.rms_norm(x, (64,), gain, 1e-5) @ linear.dequantize().T + b
    want = F.silu(h[:, :20]) * h[:, 20:] + res
    got = linear(x, norm=Norm(gain, 1e-5), act="silu", residual=res)
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("shape", ["tensor", "row", "block"])
@pytest.mark.parametrize("key", ["weight_scale", "weight_scale_inv"])
def test_fp8_checkpoints(shape, key):
    n, k = 160, 300
    q = torch.randn(n, k).to(torch.float8_e4m3fn)
    scale = {"tensor": torch.rand(1), "row": torch.rand(n, 1), "block": torch.rand(2, 3)}[shape]
    full = scale if shape != "block" else scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    want = q.float() * full
    canonical = Fp8().load({"weight": q, key: scale})
    linear = linear_of("fp8", canonical, k)
    torch.testing.assert_close(linear.dequantize(), want)
    x = torch.randn(2, k)
    assert (linear(x) - x @ want.T).norm() / (x @ want.T).norm() < 0.04


def test_int8_checkpoint_and_refusals():
    q = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    canonical = Int8().load({"weight": q, "weight_scale": torch.rand(8, 1).bfloat16()})
    assert canonical["scales"].shape == (8,) and canonical["scales"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="Asymmetric"):
        Int8().load({"weight": q, "weight_scale": torch.rand(8, 1), "weight_zero_point": torch.ones(8, 1)})
    with pytest.raises(CheckpointError, match="needs weight"):
        Int8().load({"weight": q.float(), "weight_scale": torch.rand(8, 1)})
    with pytest.raises(CheckpointError, match="have the shape"):
        Int8().load({"weight": q, "weight_scale": torch.rand(8, 4)})


def test_static_activation_scale():
    q = torch.randn(8, 16).to(torch.float8_e4m3fn)
    parts = {"weight": q, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor([0.01])}
    linear = linear_of("fp8", Fp8().load(parts), 16)
    x = torch.randn(4, 16) * 100  # far past 448 * 0.01: saturates
    want = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01 @ linear.dequantize().T
    torch.testing.assert_close(linear(x), want)
    fused = Fp8().fuse([Fp8().load(parts), Fp8().load(parts | {"input_scale": torch.tensor(0.03)})])
    assert fused["input_scale"] == torch.tensor(0.03) and fused["qweight"].shape == (16, 16)


@pytest.mark.parametrize("form", ["int8", "fp8", "block"])
def test_cut_and_fused(form):
    name = "int8" if form == "int8" else "fp8"
    scheme, k = SCHEMES[name](), 512
    if form == "block":
        parts = [
            scheme.load({"weight": torch.randn(n, k).to(KINDS[name]), "weight_scale_inv": torch.rand(-(-n // 128), 4)})
            for n in (6, 4)
        ]
    else:
        parts = [scheme.quantize(torch.randn(n, k)) for n in (6, 4)]
    whole = linear_of(name, scheme.fuse(parts), k, "gate_up").dequantize()
    torch.testing.assert_close(whole, torch.cat([linear_of(name, p, k).dequantize() for p in parts]))
    rows = [linear_of(name, scheme.shard(parts[0], "qkv", r, 4, 2), k, "qkv").dequantize() for r in range(4)]
    assert torch.equal(torch.cat(rows)[:6], whole[:6]) and not torch.cat(rows)[6:].any()
    cols = [linear_of(name, scheme.shard(parts[0], "down", r, 3, 128), 256, "down").dequantize() for r in range(3)]
    assert torch.equal(torch.cat(cols, 1)[:, :k], whole[:6]) and not torch.cat(cols, 1)[:, k:].any()
    if form == "block":
        with pytest.raises(CheckpointError, match="cannot be cut"):
            scheme.shard(parts[0], "down", 0, 3, 1)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", list(KINDS))
def test_ranks_that_round_their_own_inputs_err_no_more_than_one(name, size):
    """A row parallel matrix: some rows have their largest inputs on one rank, whose scale would be coarse for all."""
    torch.manual_seed(4)
    w, x = torch.randn(32, 192), torch.randn(40, 192)
    x[::2, :64] *= 30
    canonical = SCHEMES[name]().quantize(w)
    whole = linear_of(name, canonical, 192)
    exact = x.double() @ whole.dequantize().double().T
    parts = [SCHEMES[name]().shard(canonical, "o", r, size) for r in range(size)]
    each = 192 // size
    total = sum(linear_of(name, part, each)(x[:, r * each : (r + 1) * each]) for r, part in enumerate(parts))

    def error(y):
        return (y - exact).norm() / exact.norm()

    assert error(total) <= error(whole(x)) * (1.0 if name == "int8" else 1.05)
