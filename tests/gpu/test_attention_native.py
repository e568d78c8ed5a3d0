"""Attention on the device as an engine uses it: the doors at real sizes, inside CUDA graphs, with early launch."""

import copy

import pytest
import torch

from pagoda.kernels.decode_attention import decode_attention, decode_attention_reference
from pagoda.kernels.decode_attention_fused import decode_attention_fused
from pagoda.kernels.kv_pack import read_kv
from pagoda.kernels.prefill_attention import prefill_attention, prefill_attention_reference
from pagoda.kernels.rope_cache import rope_and_write
from pagoda.layers.kv_schemes import KV_SCHEMES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, BL = torch.bfloat16, 64
SCHEMES = sorted(KV_SCHEMES)


def written_cache(scheme, num_blocks, kv_heads, dim, dtype=BF16):
    """A cache that rope_and_write filled with normal keys and values, block 0 too."""
    cache = KV_SCHEMES[scheme].allocate(num_blocks, kv_heads, dim, BL, dtype, "cuda")
    tokens = num_blocks * BL
    none = torch.ones(tokens, 0, device="cuda")
    qkv = torch.randn(tokens, 3 * kv_heads * dim, device="cuda").to(dtype)
    rope_and_write(qkv, none, none, torch.arange(tokens, device="cuda"), cache, kv_heads, kv_heads, dim)
    return cache


def tables(rows, width, num_blocks):
    return (torch.randperm(num_blocks - 1, device="cuda")[: rows * width] + 1).int().view(rows, width)


def relative(out, want):
    return ((out.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(32, 8, 128), (16, 8, 128), (28, 4, 128), (8, 4, 256), (32, 32, 96)])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_decode_of_mixed_lengths(scheme, shape, rows):
    heads, kv_heads, dim = shape
    width = 32
    cache = written_cache(scheme, rows * width + 1, kv_heads, dim)
    table = tables(rows, width, rows * width + 1)
    lens = torch.randint(1, width * BL + 1, (rows,), device="cuda", dtype=torch.int32)
    q = torch.randn(rows, heads, dim, device="cuda").to(BF16)
    for window, softcap in ((0, 0.0), (700, 30.0)):
        args = (cache, lens, table, dim**-0.5, window, softcap)
        out = decode_attention(q, *args)
        assert relative(out, decode_attention_reference(q.float(), *args)) < 0.01
        assert torch.equal(out, decode_attention(q, *args))  # parts meet in their order, whoever comes last


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_graph_serves_every_length(scheme):
    rows, width = 3, 40
    cache = written_cache(scheme, rows * width + 1, 8, 128)
    table = tables(rows, width, rows * width + 1)
    lens = torch.ones(rows, dtype=torch.int32, device="cuda")
    q = torch.randn(rows, 32, 128, device="cuda").to(BF16)
    decode_attention(q, cache, lens, table, 0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, cache, lens, table, 0.1)
    for kv_lens in ([1, 2, 3], [64, 65, 2560], [0, 700, 1], [2560, 2560, 2560]):
        lens.copy_(torch.tensor(kv_lens))
        out.fill_(float("nan"))
        graph.replay()
        assert relative(out, decode_attention_reference(q.float(), cache, lens, table, 0.1)) < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (28, 4, 128), (8, 4, 256), (32, 32, 96)])
def test_prefill_of_mixed_chunks(scheme, heads, kv_heads, dim):
    query_lens = [1, 1, 130, 0, 513, 1, 64]
    kv_lens = [1, 700, 130, 9, 1200, 64, 1000]
    cache = written_cache(scheme, 141, kv_heads, dim)
    table = tables(7, 20, 141)
    start = torch.tensor([0, *query_lens]).cumsum(0).int().cuda()
    q = torch.randn(sum(query_lens), heads, dim, device="cuda").to(BF16)
    lens = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
    for window, softcap in ((0, 0.0), (100, 30.0)):
        args = (cache, start, lens, table, max(query_lens), dim**-0.5, window, softcap)
        want = prefill_attention_reference(q.float(), *args)
        assert relative(prefill_attention(q, *args), want) < 0.01
        assert relative(prefill_attention(q, *args, single_rows=2), want) < 0.01
        single = lens * (torch.arange(7, device="cuda") < 2)
        assert relative(prefill_attention(q, cache, start.clamp(min=2), *args[2:], single_len_R=single), want) < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("early", [0, 1, 2, 3])
def test_fused_steps_are_the_separate_ops(scheme, early):
    """Twenty steps that each append one token: every output and, at the end, every key and value."""
    rows, width, heads, kv_heads, dim = 4, 6, 32, 8, 128
    cache = written_cache(scheme, rows * width + 1, kv_heads, dim)
    other = copy.deepcopy(cache)
    table = tables(rows, width, rows * width + 1)
    lens = torch.tensor([1, 60, 64, 300], dtype=torch.int32, device="cuda")
    gains = [torch.rand(dim, device="cuda").to(BF16) + 0.5 for _ in "qk"]
    for _ in range(20):
        last = (lens - 1).long()
        slot = table.gather(1, last[:, None] // BL)[:, 0].long() * BL + last % BL
        angle = torch.rand(rows, dim // 2, device="cuda") * 6
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device="cuda").to(BF16)
        where, norms = (angle.cos(), angle.sin(), slot), (*gains, 1e-6)
        torch.cuda.synchronize()
        out = decode_attention_fused(qkv, *where, cache, lens, table, dim**-0.5, 0, 0.0, *norms, early_launch=early)
        q = rope_and_write(qkv, *where, other, heads, kv_heads, dim, *norms, early_launch=early > 0)
        want = decode_attention(q, other, lens, table, dim**-0.5, early_launch=early > 0).flatten(1)
        assert relative(out, want) < 0.01
        lens += 1
    blocks = torch.arange(rows * width + 1, device="cuda")
    for got, expected in zip(read_kv(cache, blocks), read_kv(other, blocks)):
        assert relative(got, expected) < 1e-3


def test_int4_bytes_and_codes_of_every_value():
    """Inline conversions: all 256 bytes of both formats through attention, against the plain reading."""
    for scheme in ("int8", "int4"):
        cache = KV_SCHEMES[scheme].allocate(5, 1, 128, BL, BF16, "cuda")
        for store in (cache.k, cache.v):
            flat = store.view(torch.uint8).view(-1)
            flat.copy_(torch.arange(flat.numel(), device="cuda").roll(7) % 256)
        for x, value in ((cache.k_scale, 0.01), (cache.v_scale, 1.0), (cache.k_zero, -0.1), (cache.v_zero, 0.5)):
            if x is not None:
                x.fill_(value)
        q = torch.randn(1, 4, 128, device="cuda").half()
        lens = torch.tensor([256], dtype=torch.int32, device="cuda")
        args = (cache, lens, torch.tensor([[1, 2, 3, 4]], dtype=torch.int32, device="cuda"), 0.3)
        assert relative(decode_attention(q, *args), decode_attention_reference(q.float(), *args)) < 2e-3
