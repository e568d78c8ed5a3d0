"""Linears with their real kernels: assembly, early launch, split sums and library products, against float32 oracles."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.kernels.int4_layout import unpack_tiles
from pagoda.kernels.int4_linear import dequantize_int4
from pagoda.layers.linear import Linear, Norm
from pagoda.layers.schemes import SCHEMES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BF, HALF = torch.bfloat16, torch.float16
ROWS = [1, 2, 7, 16, 33, 64, 100, 257]
SHAPES = {"qkv": (6144, 4096), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (4096, 1536), "odd": (1000, 776)}
SCHEME_FORMS = ["dense", "int4 32", "int4 64", "int4 128", "int8", "fp8", "fp8 block"]
ERROR = {"dense": 0.01, "int4": 0.012, "int8": 0.03, "fp8": 0.07}  # relative, rounding of activations included


def make(form: str, name: str, dtype: torch.dtype, bias: bool) -> Linear:
    n, k = SHAPES[name]
    role = "o" if name == "odd" else name
    scheme, _, extra = form.partition(" ")
    w = torch.randn(n, k, device="cuda") * k**-0.5
    if extra == "block":
        blocks = torch.rand(-(-n // 128), -(-k // 128), device="cuda") * 0.01 + 0.01
        full = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
        canonical = SCHEMES[scheme]().load({"weight": (w / full).to(torch.float8_e4m3fn), "weight_scale_inv": blocks})
    else:
        canonical = SCHEMES[scheme]().quantize(w, int(extra or 128))
    b = torch.randn(n, device="cuda") if bias else None
    return Linear.pack(role, scheme, canonical, b, k, torch.device("cuda"), dtype)


def oracle(linear: Linear, x, norm=None, act=None, residual=None):
    x = x.float()
    if norm is not None:
        x = F.rms_norm(x, x.shape[1:], norm.weight_K.float(), norm.eps)
    y = x @ linear.dequantize().T + (0 if linear.bias is None else linear.bias.float())
    if act:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.float()


def check(linear: Linear, scheme: str, rows: int, dtype: torch.dtype, out_dtype=None, **extras) -> None:
    n, k = linear.out_features, linear.in_features
    x = torch.randn(rows, k, device="cuda").to(dtype)
    width = n // 2 if extras.get("act") else n
    if extras.get("norm"):
        extras["norm"] = Norm(torch.rand(k, device="cuda") + 0.5, 1e-5)
    if extras.get("residual"):
        extras["residual"] = torch.randn(rows, width, device="cuda").to(dtype)
    want = oracle(linear, x, **extras)
    y = torch.full((rows, width), float("nan"), dtype=out_dtype or dtype, device="cuda")
    for pdl in (False, True):
        y.fill_(float("nan"))
        linear(x, out=y, pdl=pdl, **extras)
        error = (y.float() - want).norm() / want.norm()
        assert error < ERROR[scheme], (rows, extras.keys(), pdl, float(error))
    assert not linear.counters.any()


@pytest.mark.parametrize("form", SCHEME_FORMS)
@pytest.mark.parametrize("dtype", [BF, HALF])
@pytest.mark.parametrize("name", list(SHAPES))
def test_every_scheme_at_every_number_of_rows(form, dtype, name):
    torch.manual_seed(0)
    linear = make(form, name, dtype, bias=name in ("qkv", "odd"))
    scheme = form.split()[0]
    for rows in ROWS:
        check(linear, scheme, rows, dtype)
        if linear.role in ("qkv", "gate_up"):
            check(linear, scheme, rows, dtype, norm=True)
        if linear.role == "gate_up":
            check(linear, scheme, rows, dtype, norm=True, act="silu")
            check(linear, scheme, rows, dtype, act="silu")
        if linear.role in ("o", "down"):
            check(linear, scheme, rows, dtype, residual=True)


@pytest.mark.parametrize("dtype", [BF, HALF])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("role", ["o", "gate_up"])
def test_opened_nibbles_are_exact(dtype, group, role):
    """The assembly against the layout's specification: bit for bit, up to the one rounding of the scaled value."""
    linear = make(f"int4 {group}", role, dtype, False)
    q, meta, (n, k) = linear.tensors["q"], linear.tensors["meta"], SHAPES[role]
    got = dequantize_int4(q, meta, n, k, role == "gate_up", dtype)
    assert torch.equal(got, unpack_tiles(q, meta, n, k, role == "gate_up", dtype).to(dtype))


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_logits_in_float32(rows):
    n, k = 152064, 1024
    w = torch.randn(n, k, device="cuda") * k**-0.5
    linear = Linear.pack("head", "dense", {"weight": w}, None, k, torch.device("cuda"), BF)
    check(linear, "dense", rows, BF, out_dtype=torch.float32)
    check(linear, "dense", rows, BF, out_dtype=torch.float32, norm=True)


@pytest.mark.parametrize("form", ["dense", "int4 128", "int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 8, 48])
def test_a_chain_in_a_graph_is_the_chain_op_by_op(form, rows):
    """Early launch over a chain of layers, replayed: the same bits as without it, every time."""
    up, scheme = make(form, "gate_up", BF, False), form.split()[0]
    w = torch.randn(1024, 3072, device="cuda") * 3072**-0.5
    down = Linear.pack("down", scheme, SCHEMES[scheme]().quantize(w, 128), None, 3072, torch.device("cuda"), BF)
    norm = Norm(torch.rand(1024, device="cuda").to(BF), 1e-5)
    start = torch.randn(rows, 1024, device="cuda").to(BF)

    def chain(h, pdl):
        for _ in range(6):
            a = up(h, norm=norm, act="silu", pdl=pdl)
            down(a, residual=h, out=h, pdl=pdl)
        return h

    want = chain(start.clone(), False)
    h = start.clone()
    chain(h, True)  # compiles and warms up
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chain(h, True)
    for _ in range(20):
        h.copy_(start)
        graph.replay()
        assert torch.equal(h, want)
