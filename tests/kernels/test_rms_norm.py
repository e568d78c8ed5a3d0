"""RMSNorm against torch's own, and the Triton kernel against the reference."""

import pytest
import torch

from pagoda.kernels.rms_norm import rms_norm, rms_norm_launch, rms_norm_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_is_torchs(dtype):
    x = torch.randn(7, 96).to(dtype)
    w = torch.randn(96).to(dtype)
    want = torch.nn.functional.rms_norm(x.double(), (96,), w.double(), 1e-5)
    torch.testing.assert_close(
        rms_norm(x, w, 1e-5).double(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
    )


def test_door_sums_the_residual_and_writes_where_told():
    x, r, w = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    out = torch.full_like(x, float("nan"))
    y, s = rms_norm(x, w, 1e-6, r, out=out, out_sum=r)
    assert y is out and s is r
    torch.testing.assert_close(s, x + (r - x))
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(s, (33,), w, 1e-6))
    assert rms_norm(x.view(1, 5, 33), w, 1e-6).shape == (1, 5, 33)
    assert rms_norm(x[:0], w, 1e-6).shape == (0, 33)


@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 4096), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
def test_kernel_against_reference(device, shape, dtype, residual):
    T, C = shape
    x = torch.randn(T, C + 3, device=device).to(dtype)[:, :C]  # rows with a stride
    r = torch.randn(T, C, device=device).to(dtype) if residual else None
    w = torch.randn(C, device=device).to(dtype)
    y = torch.full((T, C), float("nan"), dtype=dtype, device=device)
    s = torch.full_like(y, float("nan"))
    rms_norm_launch(x, w, 1e-5, r, y, s)
    want = rms_norm_reference(x, w, 1e-5, r)
    if residual:
        want, want_sum = want
        torch.testing.assert_close(s, want_sum, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y, want, rtol=2e-3, atol=2e-3)
