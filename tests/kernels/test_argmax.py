"""The greedy kernel against torch."""

import pytest
import torch

from pagoda.kernels.argmax import argmax, argmax_launch, argmax_reference


@pytest.mark.parametrize("part", [64, None])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 63), (3, 64), (2, 65), (5, 1000), (40, 130), (1, 5000)])
def test_the_kernel_finds_what_torch_finds(device, rows, width, part):
    counters = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    for scale in (3.0, 0.0):
        value_RV = torch.randn(rows, width + 3, device=device)[:, :width] * scale
        value_RV[:, width // 2 :] = value_RV[:, width // 2 :].round()  # ties
        assert torch.equal(argmax_launch(value_RV, counters, part=part), value_RV.argmax(-1))
        assert torch.equal(argmax(value_RV, counters), value_RV.argmax(-1))
    assert not counters.any()


def test_infinities_zeros_and_what_is_no_number(device):
    """A row without a finite best value has -1."""
    rows = [
        [-torch.inf] * 130,
        [-torch.inf] * 100 + [-1e30] * 30,
        [-0.0] * 70 + [0.0] * 60,
        [-5.0] * 129 + [torch.inf],
        [-1.0] * 64 + [-0.5] * 66,
        [torch.nan] * 130,
        [1.0] * 90 + [torch.nan] * 40,
    ]
    value_RV = torch.tensor(rows, device=device)
    counters = torch.zeros(len(rows), dtype=torch.int32, device=device)
    for find in (
        argmax,
        argmax_reference,
        lambda *a: argmax_launch(*a, part=32),
        lambda *a: argmax_launch(*a, part=256),
    ):
        args = (value_RV,) if find is argmax_reference else (value_RV, counters)
        assert find(*args).tolist() == [-1, 100, 0, -1, 64, -1, -1]
    negative = value_RV[5:6].view(torch.int32).bitwise_or(-(2**31)).view(torch.float32)
    assert int(argmax_launch(negative, counters, part=32)) == -1
