"""Whole prompts by the library: which rows, and the same result as our own kernel's reference."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from pagoda.kernels.library_attention import PAD, fresh_rows, library_attention, library_takes
from pagoda.kernels.prefill_attention import prefill_attention, prefill_attention_reference
from pagoda.layers.kv_schemes import get_kv_scheme


def test_fresh_rows_are_the_last_ones_that_begin_here_and_are_long() -> None:
    assert fresh_rows([]) == ()
    assert fresh_rows([(5, 1), (64, 2000), (0, PAD), (0, 3000)]) == ((2, 2001, PAD), (3, 2001 + PAD, 3000))
    assert fresh_rows([(0, 3000), (0, PAD - 1)]) == ()
    assert fresh_rows([(0, PAD)]) == ((0, 0, PAD),)


def case(device: str, dtype: torch.dtype, lens: list[int], heads: int, kv_heads: int, dim: int):
    width = -(-max(lens) // 64)
    cache = get_kv_scheme("none").allocate(1 + len(lens) * width, kv_heads, dim, 64, dtype, torch.device(device))
    cache.k.normal_()
    cache.v.normal_()
    order = torch.randperm(len(lens) * width) + 1
    table = order.view(len(lens), width).to(torch.int32).to(device)
    q = torch.randn(sum(lens), heads, dim, device=device).to(dtype)
    start = torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32)
    return q, cache, start, torch.tensor(lens, dtype=torch.int32, device=device), table


def test_padding_and_blocks_on_a_cpu() -> None:
    lens = [1024, 1100]
    q, cache, start, kv_len, table = case("cpu", torch.float32, lens, 4, 2, 16)
    wanted = prefill_attention_reference(q, cache, start, kv_len, table, max(lens), 0.25)
    for x in (cache.k, cache.v):
        x[table[1, 17].item(), :, 1100 % 64 :] = torch.nan  # past the end
    got = torch.full_like(q, torch.nan)
    fresh = fresh_rows([(0, n) for n in lens])
    library_attention(q, cache, table, fresh, 0.25, got, SDPBackend.MATH)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lens", [[4096, 4096], [1, 700, 1024, 2500], [1, 1, 1500]])
def test_cudnn_equals_our_kernel(lens: list[int], dtype: torch.dtype) -> None:
    q, cache, start, kv_len, table = case("cuda", dtype, lens, 32, 8, 128)
    fresh = fresh_rows([(0 if n > 1 else 9, n) for n in lens])
    assert fresh and library_takes(q, cache, 0, 0.0)
    ours = prefill_attention(q, cache, start, kv_len, table, max(lens), 128**-0.5)
    both = prefill_attention(q, cache, start, kv_len, table, max(lens), 128**-0.5, fresh=fresh)
    assert ((both.float() - ours.float()).norm() / ours.float().norm()).item() < 4e-3
