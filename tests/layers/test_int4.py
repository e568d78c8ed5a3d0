"""The 4-bit scheme: foreign checkpoints against unpackers written here from the formats' facts, cutting, products."""

from types import SimpleNamespace

import pytest
import torch

from pagoda.errors import CheckpointError
from pagoda.layers.linear import Linear, Norm
from pagoda.layers.schemes.int4 import Int4, group_of, nibbles
from pagoda.layers.schemes.int4_formats import AWQ_ORDER, pack_words, unpack_words

SCHEME = Int4()


def quant(method, layout=""):
    return SimpleNamespace(method=method, layout=layout)


def random_plain(n, k, group):
    groups = k // group
    q = torch.randint(0, 16, (n, k))
    return q, torch.rand(n, groups) + 0.1, torch.randint(1, 16, (n, groups))


def value(q, scales, zeros, group_of_k):
    return (q - zeros[:, group_of_k]) * scales[:, group_of_k]


def word_of(eight):
    """Eight values, the first in the lowest bits, as a signed 32-bit integer."""
    word = sum(int(v) << (4 * i) for i, v in enumerate(eight))
    return word - (1 << 32) if word >= 1 << 31 else word


def awq_parts(q, scales, zeros):
    """Word by word in Python: place i of word c is output 8c + order[i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    pack = lambda t: torch.tensor(  # noqa: E731
        [[word_of([row[8 * c + o] for o in order]) for c in range(len(row) // 8)] for row in t.t().tolist()],
        dtype=torch.int32,
    )
    return {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales.t().contiguous()}


def gptq_parts(q, scales, zeros, minus_one, g_idx=None):
    rows = q.t().tolist()
    k, n = len(rows), len(rows[0])
    qweight = [[word_of([rows[8 * r + i][c] for i in range(8)]) for c in range(n)] for r in range(k // 8)]
    stored = (zeros.t() - minus_one).tolist()
    qzeros = [[word_of(row[8 * c : 8 * c + 8]) for c in range(n // 8)] for row in stored]
    parts = {"qweight": qweight, "qzeros": qzeros}
    parts = {key: torch.tensor(v, dtype=torch.int32) for key, v in parts.items()} | {"scales": scales.t().contiguous()}
    return parts | ({"g_idx": g_idx.to(torch.int32)} if g_idx is not None else {})


def linear_of(canonical, k, role="o", bias=None):
    return Linear.pack(role, "int4", canonical, bias, k, "cpu", torch.float32)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq_is_read(group):
    q, s, z = random_plain(16, 256, group)
    canonical = SCHEME.load(awq_parts(q, s, z), quant("awq"))
    assert group_of(canonical) == group and all(t.is_contiguous() for t in canonical.values())
    got = linear_of(canonical, 256).dequantize()
    torch.testing.assert_close(got, value(q, s, z, torch.arange(256) // group))


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_read(layout, act_order):
    q, s, z = random_plain(16, 192, 64)
    g_idx = (torch.arange(192) // 64)[torch.randperm(192)] if act_order else torch.arange(192) // 64
    canonical = SCHEME.load(gptq_parts(q, s, z, int(layout == "gptq"), g_idx), quant("gptq", layout))
    assert ("perm" in canonical) == act_order
    linear = linear_of(canonical, 192)
    w = value(q, s, z, g_idx)
    torch.testing.assert_close(linear.dequantize(), w)
    x = torch.randn(3, 192)
    torch.testing.assert_close(linear(x), x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_is_read(symmetric):
    """Against the library's own packing where it is installed, and against words packed here."""
    n, k, group = 16, 96, 32
    q, s, z = random_plain(n, k, group)
    z = torch.full_like(z, 8) if symmetric else z
    rows = q.tolist()
    packed = torch.tensor([[word_of(r[8 * c : 8 * c + 8]) for c in range(k // 8)] for r in rows], dtype=torch.int32)
    columns = z.t().tolist()
    zeros = torch.tensor([[word_of(c[8 * r : 8 * r + 8]) for c in columns] for r in range(n // 8)], dtype=torch.int32)
    parts = {"weight_packed": packed, "weight_scale": s, "weight_shape": torch.tensor([n, k])}
    parts |= {} if symmetric else {"weight_zero_point": zeros}
    got = linear_of(SCHEME.load(parts, quant("compressed-tensors")), k).dequantize()
    torch.testing.assert_close(got, value(q, s, z, torch.arange(k) // group))


def test_compressed_tensors_library_agrees():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q, s, _ = random_plain(16, 64, 32)
    packed = helpers.pack_to_int32((q - 8).to(torch.int8), 4)
    parts = {"weight_packed": packed, "weight_scale": s, "weight_shape": torch.tensor([16, 64])}
    assert torch.equal(nibbles(SCHEME.load(parts, quant("compressed-tensors"))["qweight"]), q.to(torch.uint8))


def test_words_round_trip():
    values = torch.randint(0, 16, (24, 16), dtype=torch.uint8)
    for dim in (0, 1):
        for order in (tuple(range(8)), AWQ_ORDER):
            assert torch.equal(unpack_words(pack_words(values, dim, order), dim, order), values)
    with pytest.raises(CheckpointError, match="multiple of 8"):
        pack_words(values[:, :12], 1)


def test_one_group_a_row_and_wide_groups():
    q, s, z = random_plain(8, 256, 256)
    canonical = SCHEME.load(gptq_parts(q, s, z, 1), quant("gptq"))
    assert group_of(canonical) == 128
    torch.testing.assert_close(linear_of(canonical, 256).dequantize(), value(q, s, z, torch.zeros(256).long()))


def test_damaged_checkpoints_are_refused():
    q, s, z = random_plain(16, 64, 32)
    parts = awq_parts(q, s, z)
    with pytest.raises(CheckpointError, match="lacks qzeros"):
        SCHEME.load({k: v for k, v in parts.items() if k != "qzeros"}, quant("awq"))
    with pytest.raises(CheckpointError, match="do not fit together"):
        SCHEME.load(parts | {"scales": parts["scales"][:, :8]}, quant("awq"))
    with pytest.raises(CheckpointError, match="groups of 16"):
        SCHEME.load(awq_parts(*random_plain(16, 64, 16)), quant("awq"))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("k", [128, 172])
def test_round_to_nearest(group, k):
    w = torch.randn(12, k) * 0.02
    canonical = SCHEME.quantize(w, group)
    got = linear_of(canonical, k).dequantize()
    step = canonical["scales"].float().repeat_interleave(group, 1)[:, :k]
    assert ((got - w).abs() <= step * 0.51 + 1e-6).all()
    assert {n: (t.shape, t.dtype) for n, t in canonical.items()} == {
        "qweight": ((12, -(-k // group) * group // 2), torch.uint8),
        "scales": ((12, -(-k // group)), torch.float16),
        "zeros": ((12, -(-k // group)), torch.uint8),
    }


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("unit", [1, 32, 50])
def test_row_parallel_parts_sum_up(order, world, unit):
    q, s, z = random_plain(8, 192, 64)
    g_idx = (torch.arange(192) // 64)[torch.randperm(192)] if order else None
    canonical = SCHEME.load(gptq_parts(q, s, z, 1, g_idx), quant("gptq"))
    x = torch.randn(2, 192)
    want = linear_of(canonical, 192)(x)
    total = 0
    for rank in range(world):
        part = SCHEME.shard(canonical, "down", rank, world, unit)
        per = -(-192 // (unit * world)) * unit
        local = torch.nn.functional.pad(x, (0, per * world - 192))[:, rank * per : (rank + 1) * per]
        total = total + linear_of(part, per, "down")(local)
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-4)


def test_column_parallel_and_fused():
    parts = [SCHEME.quantize(torch.randn(n, 64), 32) for n in (6, 4, 4)]
    whole = linear_of(SCHEME.fuse(parts), 64, "qkv").dequantize()
    torch.testing.assert_close(whole, torch.cat([linear_of(p, 64).dequantize() for p in parts]))
    cuts = [SCHEME.shard(parts[0], "qkv", r, 2, 2) for r in range(2)]
    both = torch.cat([linear_of(c, 64).dequantize() for c in cuts])
    torch.testing.assert_close(both[:6], linear_of(parts[0], 64).dequantize())
    assert not both[6:].any()
    mixed = SCHEME.fuse([parts[0], SCHEME.quantize(torch.randn(2, 64), 64)])
    assert group_of(mixed) == 32


def test_different_orders_cannot_be_fused():
    a, b = SCHEME.quantize(torch.randn(4, 32), 32), SCHEME.quantize(torch.randn(4, 32), 32)
    a["perm"] = torch.randperm(32).int()
    with pytest.raises(CheckpointError, match="desc_act"):
        SCHEME.fuse([a, b])


def test_a_call_with_every_extra():
    k, n = 96, 40
    canonical, b = SCHEME.quantize(torch.randn(n, k), 32), torch.randn(n)
    linear = linear_of(canonical, k, "gate_up", b)
    x, gain, res = torch.randn(3, k), torch.rand(k), torch.randn(3, n // 2)
    h = torch.nn.functional.rms_norm(x, (k,), gain, 1e-5) @ linear.dequantize().T + b
    want = torch.nn.functional.silu(h[:, : n // 2]) * h[:, n // 2 :] + res
    torch.testing.assert_close(linear(x, norm=Norm(gain, 1e-5), act="silu", residual=res), want, rtol=1e-4, atol=1e-4)


def test_blocks_of_the_cpu_product(monkeypatch):
    monkeypatch.setattr("pagoda.layers.schemes.int4.BLOCK_ELEMENTS", 300)
    linear = linear_of(SCHEME.quantize(torch.randn(13, 64), 32), 64, bias=torch.randn(13))
    x = torch.randn(2, 64)
    torch.testing.assert_close(linear(x), x @ linear.dequantize().T + linear.bias, rtol=1e-4, atol=1e-4)
