"""4-bit matrices: the layout against plain arithmetic, every kernel against the reference, odd shapes."""

import pytest
import torch

from pagoda.kernels import int4_linear as il
from pagoda.kernels.int4_layout import pack_tiles, unpack_asm, unpack_tiles
from pagoda.kernels.small_linear import Extras


def matrix(n, k, group, device="cpu"):
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, groups * group), dtype=torch.uint8, device=device)
    scales = (torch.rand(n, groups, device=device) + 0.5) * k**-0.5 / 6
    return q, scales, torch.randint(0, 16, (n, groups), dtype=torch.uint8, device=device)


def plain(q, scales, zeros, k, dtype):
    """(q - zero) * scale by repeating, the scale in the 16-bit type."""
    group = q.shape[1] // scales.shape[1]
    spread = lambda t: t.float().repeat_interleave(group, 1)  # noqa: E731
    return ((q.float() - spread(zeros)) * spread(scales.to(dtype)))[:, :k]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "glu"), [(64, 128, False), (70, 300, False), (128, 256, True), (72, 96, True)])
def test_layout_round_trip(group, dtype, n, k, glu):
    q, scales, zeros = matrix(n, k, group)
    packed = pack_tiles(q, scales, zeros, glu, dtype)
    assert packed["q"].shape[2:] == (64, 16) and packed["meta"].shape[2] == 64
    assert torch.equal(unpack_tiles(packed["q"], packed["meta"], n, k, glu, dtype), plain(q, scales, zeros, k, dtype))


def check(device, rows, n, k, group, glu=False, norm=False, act="", bias=False, residual=False, out_dtype=None):
    dtype = torch.float16
    q, scales, zeros = matrix(n, k, group, device)
    w = plain(q, scales, zeros, k, dtype)
    p = pack_tiles(q, scales, zeros, glu, dtype)
    x = torch.randn(rows, k, device=device).to(dtype)
    width = n // 2 if act else n
    extras = Extras(
        gain_K=torch.rand(k, device=device).to(dtype) if norm else None,
        eps=1e-5,
        bias_N=torch.randn(n, device=device).to(dtype) if bias else None,
        act=act,
        residual=torch.randn(rows, width, device=device).to(dtype) if residual else None,
    )
    want = il.with_extras(lambda v: v @ w.T, x, extras)
    torch.testing.assert_close(il.int4_linear_reference(x, p["q"], p["meta"], n, glu, extras), want)
    y = torch.full((rows, width), float("nan"), dtype=out_dtype or dtype, device=device)
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    il.int4_linear_launch(x, p["q"], p["meta"], n, glu, extras, y, counters)
    torch.testing.assert_close(y.float(), want, rtol=5e-3, atol=5e-3)
    assert not counters.any()
    deq = il.dequantize_int4(p["q"], p["meta"], n, k, glu, dtype)
    torch.testing.assert_close(deq.float(), w, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    "case",
    [
        dict(rows=1, n=64, k=128),
        dict(rows=1, n=70, k=1100, norm=True, bias=True, out_dtype=torch.float32),
        dict(rows=1, n=72, k=300, glu=True, act="silu", norm=True, bias=True),
        dict(rows=1, n=64, k=512, residual=True),
        dict(rows=2, n=70, k=300, bias=True, residual=True),
        dict(rows=5, n=72, k=512, glu=True, act="gelu_tanh", bias=True),
        dict(rows=9, n=136, k=256, glu=True, bias=True),
        dict(rows=17, n=70, k=300, bias=True, residual=True),
        dict(rows=70, n=200, k=128, glu=True, act="silu", bias=True),
        dict(rows=40, n=136, k=1100, glu=True, residual=True),
    ],
    ids=str,
)
def test_kernels_against_reference(device, group, case):
    check(device, group=group, **case)


@pytest.mark.parametrize("glu", [False, True])
def test_wide_tiles(device, glu, monkeypatch):
    """Two packed tiles a program, their number odd."""
    monkeypatch.setattr(il, "plan", lambda rows, tiles, chunks: il.Plan(32, 128, 2, 8, 3))
    check(device, 40, 312, 256, 128, glu=glu, act="silu" if glu else "", bias=True)


def test_assembly_is_spelled_for_every_form():
    """What the interpreter cannot run: each form opens all eight tiles, once a register; the GPU tests run it."""
    for dtype in (torch.bfloat16, torch.float16):
        for sub in (1, 2, 4):
            for scaled in (False, True):
                asm, regs = unpack_asm(dtype, sub, scaled)
                assert asm.count("lop3") == 8 and asm.count("mul") == 8 * scaled and regs.count("=") == 8
                assert asm.count("prmt") == sub * (1 + scaled) and regs.count(",r") == 2 + 2 * sub
