"""Linear with the dense scheme: what a call computes, and cutting over ranks."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.errors import CheckpointError
from pagoda.layers.linear import Linear, Norm
from pagoda.layers.schemes.cut import cut, share
from pagoda.layers.schemes.dense import Dense


def make(role, n, k, bias=False):
    w, b = torch.randn(n, k), torch.randn(n) if bias else None
    return w, b, Linear.pack(role, "dense", {"weight": w}, b, k, "cpu", torch.float32)


def test_plain_product_and_oracle():
    w, b, linear = make("qkv", 12, 7, bias=True)
    x = torch.randn(5, 7)
    out = torch.full((5, 12), float("nan"))
    assert linear(x, out=out) is out
    torch.testing.assert_close(out, x @ w.T + b)
    assert torch.equal(linear.dequantize(), w)
    assert linear.nbytes() == w.numel() * 4


def test_every_extra_in_its_order():
    w, b, linear = make("gate_up", 20, 8, bias=True)
    x, res, gain = torch.randn(3, 8), torch.randn(3, 10), torch.rand(8)
    h = F.rms_norm(x, (8,), gain, 1e-5) @ w.T + b
    want = F.silu(h[:, :10]) * h[:, 10:] + res
    got = linear(x, norm=Norm(gain, 1e-5), act="silu", residual=res, out=res)
    assert got is res
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [1, 12, 172])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("unit", [1, 32])
def test_cut_covers_everything_once(size, world, unit):
    t = torch.arange(1.0, size + 1)[:, None].expand(size, 2)
    parts = [cut(t, 0, r, world, unit) for r in range(world)]
    assert {p.shape[0] for p in parts} == {share(size, world, unit)}
    whole = torch.cat(parts)
    assert torch.equal(whole[:size], t) and not whole[size:].any()


def test_sharded_products_sum_up():
    gate, up, down, x = torch.randn(11, 6), torch.randn(11, 6), torch.randn(6, 11), torch.randn(4, 6)
    want = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    scheme, total = Dense(), 0
    for rank in range(3):
        gu = scheme.fuse([scheme.shard({"weight": w}, "gate_up", rank, 3) for w in (gate, up)])
        d = scheme.shard({"weight": down}, "down", rank, 3)
        a = Linear.pack("gate_up", "dense", gu, None, 6, "cpu", torch.float32)
        b = Linear.pack("down", "dense", d, None, d["weight"].shape[1], "cpu", torch.float32)
        total = total + b(a(x, act="silu"))
    torch.testing.assert_close(total, want)


def test_a_dense_matrix_is_one_tensor():
    with pytest.raises(CheckpointError, match="one tensor 'weight'"):
        Dense().load({"qweight": torch.zeros(2)})
