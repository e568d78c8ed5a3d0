"""The C++ matrices, every format and variant, against the dequantised weights in float64."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from pagoda.kernels.cpu.build import load, usable_variants
from pagoda.kernels.cpu.pack import Arena, address, has_kernel, pack_dense, pack_int4, pack_int8

VARIANTS = usable_variants()
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 17)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def multiply(packed, x_TK, variant=None):
    y = torch.full((x_TK.shape[0], packed.rows), float("nan"))
    load(variant).pagoda_linear(
        ctypes.byref(packed.struct), x_TK.shape[0], ctypes.c_void_p(address(x_TK)), ctypes.c_void_p(address(y))
    )
    return y


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def int4_case(n, k, group, symmetric=False):
    """Canonical tensors and the matrix that they stand for."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    zeros = torch.full((n, k // group), 8, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 17, zeros.shape, dtype=torch.uint8)
    scales = (torch.rand(n, k // group) * 0.02 + 0.001).half().float()
    value = (q.double() - zeros.double().repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)
    return q[:, ::2] | q[:, 1::2] << 4, scales, zeros, value


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (40, 84), (160, 512), (7, 3)])
def test_dense(variant, dtype, tolerance, n, k):
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n)
    packed = pack_dense(weight, bias)
    for tokens in TOKENS:
        x = torch.randn(tokens, k)
        y = multiply(packed, x, variant)
        assert relative(y[:, :n], x.double() @ weight.double().T + bias.double()) < tolerance
        assert (y[:, n:] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_rounds_only_the_activations(variant, group, symmetric):
    """int8 activations with one scale a group: the error of rounding to 1/254 of the largest of `group` normals."""
    n, k = 48, 384
    qweight, scales, zeros, value = int4_case(n, k, group, symmetric)
    bias = torch.randn(n)
    packed = pack_int4(qweight, scales, zeros, bias_N=bias)
    assert (packed.zeros is None) == symmetric
    for tokens in TOKENS:
        x = torch.randn(tokens, k)
        assert relative(multiply(packed, x, variant), x.double() @ value.T + bias.double()) < 0.01


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("bits", "extreme"), [(4, 0), (4, 15), (8, -128), (8, 127)])
def test_integer_products_are_exact_at_their_limits(variant, bits, extreme):
    """Weights and activations at the ends of their ranges: no step of the integer sum may saturate."""
    n, k = 16, 128
    x = torch.where(torch.rand(3, k) < 0.5, 127.0, -127.0)
    if bits == 4:
        q = torch.full((n, k), extreme, dtype=torch.uint8)
        zeros = torch.full((n, 1), 16, dtype=torch.uint8)
        packed = pack_int4(q[:, ::2] | q[:, 1::2] << 4, torch.ones(n, 1), zeros)
        value = torch.full((n, k), extreme - 16.0)
    else:
        packed = pack_int8(torch.full((n, k), extreme, dtype=torch.int8), torch.ones(n))
        value = torch.full((n, k), float(extreme))
    assert torch.equal(multiply(packed, x, variant), x @ value.T)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [96, 192, 256, 100])
def test_int8_per_channel(variant, k):
    n = 40
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n) * 1e-3 + 1e-7
    packed = pack_int8(q, scales)
    for tokens in TOKENS:
        x = torch.randn(tokens, k)
        wanted = x.double() @ (q.double() * scales.double()[:, None]).T
        assert relative(multiply(packed, x, variant)[:, :n], wanted) < 0.01


def test_act_order_gathers_the_inputs():
    """Column j of the weights belongs to input perm[j], or to none (padding of the last group)."""
    n, k, padded = 16, 90, 96
    qweight, scales, zeros, value = int4_case(n, padded, 32)
    perm = torch.cat([torch.randperm(k), torch.full((padded - k,), k)])
    packed = pack_int4(qweight, scales, zeros, perm, in_features=k)
    x = torch.randn(5, k)
    gathered = torch.cat([x, torch.zeros(5, 1)], 1)[:, perm]
    assert relative(multiply(packed, x), gathered.double() @ value.T) < 0.01


def test_gate_and_up_lie_side_by_side():
    """Blocks of 16 rows alternate between the two halves, each padded to whole blocks."""
    ffn, k = 20, 32
    weight = torch.randn(2 * ffn, k)
    y = multiply(pack_dense(weight, glu=True), torch.eye(k)[:1].contiguous())[0].view(2, 2, 16)
    halves = torch.zeros(2, 32)
    halves[:, :ffn] = weight[:, 0].view(2, ffn)
    assert torch.equal(y.transpose(0, 1).reshape(2, 32), halves)


def test_scales_of_any_size_survive():
    """fp16 scales with a power of two of their own: tiny and huge scales keep 11 bits."""
    for size in (1e-9, 1e-5, 1.0, 1e6):
        q = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
        scales = (torch.rand(16) + 0.1) * size
        x = torch.randn(2, 64)
        wanted = x.double() @ (q.double() * scales.double()[:, None]).T
        assert relative(multiply(pack_int8(q, scales), x), wanted) < 0.01


def test_a_token_does_not_depend_on_its_company():
    weight = torch.randn(80, 64)
    for packed in (pack_dense(weight), pack_dense(weight.bfloat16()), pack_int4(*int4_case(80, 64, 32)[:3])):
        x = torch.randn(23, 64)
        alone = torch.cat([multiply(packed, row[None].contiguous()) for row in x])
        assert torch.equal(multiply(packed, x), alone)


def test_weights_without_a_kernel_are_refused():
    assert not has_kernel("fp8", {"qweight": torch.zeros(16, 16)})
    odd_group = {
        "qweight": torch.zeros(16, 24, dtype=torch.uint8),
        "scales": torch.ones(16, 3),
        "zeros": torch.zeros(16, 3),
    }
    assert not has_kernel("int4", odd_group)


def test_an_arena_gives_zeros_one_behind_the_other():
    arena = Arena(chunk=4096)
    a, b, c = (arena.take(*shape, dtype=torch.int16) for shape in ((3, 5), (1000,), (4, 700)))
    assert [address(t) % 64 for t in (a, b, c)] == [0, 0, 0]
    assert address(b) - address(a) == 64  # the first 30 bytes, rounded up
    for number, tensor in enumerate((a, b, c)):
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert a.unique().tolist() + b.unique().tolist() + c.unique().tolist() == [1, 2, 3]


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
def test_the_kernel_may_back_packed_weights_with_huge_pages():
    """As it says itself: the mapping is advised (hg) and private, for it has no huge pages for shared memory."""
    packed = pack_dense(torch.randn(1024, 512), arena=Arena())
    where, flags = address(packed.q), {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= where < int(bounds[2], 16)
        elif line.startswith("VmFlags") and inside:
            flags = set(line.split()[1:])
    assert "hg" in flags and "sh" not in flags
