"""Few rows times a 16-bit matrix: both kernels against the reference, every extra, odd shapes."""

import pytest
import torch

from pagoda.kernels import small_linear as sl
from pagoda.kernels.small_linear import Extras, small_linear_launch, small_linear_reference


def check(device, rows, n, k, norm=False, act="", bias=False, residual=False, dtype=torch.float16, out_dtype=None):
    x = torch.randn(rows, k, device=device).to(dtype)
    w = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    width = n // 2 if act else n
    extras = Extras(
        gain_K=torch.rand(k, device=device).to(dtype) if norm else None,
        eps=1e-5,
        bias_N=torch.randn(n, device=device).to(dtype) if bias else None,
        act=act,
        residual=torch.randn(rows, width, device=device).to(dtype) if residual else None,
    )
    want = small_linear_reference(x, w, extras)
    y = torch.full((rows, width), float("nan"), dtype=out_dtype or dtype, device=device)
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    for _ in range(2):  # twice: the counters must be back at zero
        y.fill_(float("nan"))
        small_linear_launch(x, w, extras, y, counters)
        torch.testing.assert_close(y.float(), want, rtol=4e-3, atol=4e-3)
    assert not counters.any()
    if residual:  # in place
        small_linear_launch(x, w, extras, extras.residual, counters)
        torch.testing.assert_close(extras.residual.float(), want, rtol=4e-3, atol=4e-3)


CASES = [
    dict(),
    dict(norm=True),
    dict(act="silu", norm=True, bias=True),
    dict(residual=True, bias=True),
    dict(act="gelu_tanh", residual=True),
    dict(out_dtype=torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (40, 1024), (24, 328)])
def test_one_row(device, case, n, k):
    check(device, 1, n, k, **case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(2, 128, 256), (5, 72, 328), (33, 200, 136), (64, 264, 64)])
def test_few_rows(device, case, rows, n, k, monkeypatch):
    if case.get("norm"):
        monkeypatch.setattr(sl, "dot_config", lambda *a: (64, 128, 4, 4, 1))
    check(device, rows, n, k, **case)


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("act", ["", "silu"])
def test_split_sums(device, split, act, monkeypatch):
    monkeypatch.setattr(sl, "dot_config", lambda *a: (32, 64, 2, 3, split))
    check(device, 3, 96, 64 * 5, act=act, bias=True, residual=True)
    check(device, 70, 96, 64 * 5, act=act)  # more than one tile of rows


def test_supports_says_no_where_a_kernel_would_be_wrong_or_slow():
    bf = torch.bfloat16
    assert sl.supports(1, 6144, 4096, bf, norm=True) and sl.supports(8, 28672, 4096, bf, norm=True, act="silu")
    assert not sl.supports(8, 28672, 4096, torch.float16, norm=True, act="silu")
    assert not sl.supports(8, 4096, 4096, bf, norm=True)  # a split cannot norm
    assert not sl.supports(2, 64, 100, bf) and not sl.supports(2, 64, 128, torch.float32)
    assert not sl.supports(65, 128256, 4096, bf) and not sl.supports(64, 6144, 4096, bf)


@pytest.mark.parametrize("k", [64, 172, 4096, 11008, 18944])
@pytest.mark.parametrize("glu", [False, True])
def test_configs_are_well_formed(k, glu):
    for n in (256, 1024, 4864, 37888, 152064):
        BN, BK, warps, _ = sl.gemv_config(n, k, glu)
        assert 256 * warps == BK and BN & (BN - 1) == 0
        for rows in (2, 16, 64):
            BN, BK, warps, stages, split = sl.dot_config(rows, n, k, glu)
            smem = (BN + max(8, rows)) * BK * 2 * stages
            assert smem < 220_000 and split in (1, 2, 4, 8), (n, k, rows, smem)
