"""The road that a Linear takes on a GPU, walked in Triton's interpreter: fused where it can be, in steps where not."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.kernels.int4_layout import pack_tiles
from pagoda.layers.linear import Linear, Norm
from pagoda.layers.schemes.int4 import Int4, nibbles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively in tests/gpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):  # as in tests/kernels/conftest.py
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", mended)


def make(scheme, role, n, k, bias, order=False):
    w = torch.randn(n, k) * k**-0.5
    if scheme == "dense":
        tensors = {"weight": w.half()}
    else:
        c = Int4().quantize(w, 32)
        tensors = pack_tiles(nibbles(c["qweight"]), c["scales"], c["zeros"], role == "gate_up", torch.float16)
        if order:
            tensors["perm"] = torch.randperm(k)
    linear = Linear(role, scheme, tensors, bias, n, k, torch.float16)
    linear.counters = torch.zeros(4096, dtype=torch.int32)
    return linear


@pytest.mark.parametrize("scheme", ["dense", "int4", "int4 ordered"])
@pytest.mark.parametrize("rows", [1, 3, 130, 300])
@pytest.mark.parametrize("role", ["qkv", "o", "gate_up"])
def test_a_call_is_its_steps(scheme, rows, role):
    n, k = 72, 96
    b = torch.randn(n).half() if role == "gate_up" else None
    linear = make(scheme.split()[0], role, n, k, b, "ordered" in scheme)
    x = torch.randn(rows, k).half()
    norm = Norm(torch.rand(k).half(), 1e-5) if role != "o" else None
    act = "silu" if role == "gate_up" else None
    res = torch.randn(rows, n).half() if role == "o" else None
    h = x.float() if norm is None else F.rms_norm(x.float(), (k,), norm.weight_K.float(), 1e-5)
    want = h @ linear.dequantize().T + (0 if b is None else b.float())
    want = F.silu(want[:, : n // 2]) * want[:, n // 2 :] if act else want
    want = want if res is None else want + res.float()
    assert linear.fuses(rows, False, act, res is not None) == (rows < 65 or (scheme != "dense" and rows < 257))
    out = torch.full(want.shape, float("nan"), dtype=torch.float16)
    assert linear(x, norm=norm, act=act, residual=res, out=out) is out
    torch.testing.assert_close(out.float(), want, rtol=6e-3, atol=6e-3)
    torch.testing.assert_close(
        linear(x).float(), x.float() @ linear.dequantize().T + (0 if b is None else b), rtol=6e-3, atol=6e-3
    )
    assert not linear.counters.any()
