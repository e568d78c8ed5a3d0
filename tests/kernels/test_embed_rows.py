"""Embedding and angles in one launch against torch's two look-ups."""

import pytest
import torch

from pagoda.kernels.embed_rows import embed_rows_launch, embed_rows_reference


@pytest.mark.parametrize(("tokens", "width", "pairs"), [(1, 1030, 64), (5, 64, 20), (3, 2048, 1), (0, 64, 4)])
@pytest.mark.parametrize("scale", [1.0, 3.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_equals_its_reference(device, tokens, width, pairs, scale, dtype):
    weight_VC = torch.randn(50, width, device=device).to(dtype)
    angle_2MP = torch.randn(2, 33, pairs, device=device)
    token_T = torch.randint(0, 50, (tokens,), device=device)
    position_T = torch.randint(0, 33, (tokens,), device=device)
    args = (token_T, position_T, weight_VC, scale, angle_2MP)
    for got, want in zip(embed_rows_launch(*args), embed_rows_reference(*args), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("first", [0, 20, 40])
def test_a_part_of_the_table_gives_zeros_for_the_rest(device, first):
    whole_VC, angle_2MP = torch.randn(60, 40, device=device), torch.randn(2, 9, 8, device=device)
    token_T = torch.tensor([0, 19, 20, 39, 40, 59], device=device)
    position_T = torch.arange(6, device=device)
    part_VC = whole_VC[first : first + 20].contiguous()
    want_TC = torch.where(((token_T >= first) & (token_T < first + 20))[:, None], whole_VC[token_T] * 2, 0.0)
    for way in (embed_rows_launch, embed_rows_reference):
        assert torch.equal(way(token_T, position_T, part_VC, 2.0, angle_2MP, first)[0], want_TC)
