"""Linear layers of few rows on one GPU: every scheme against torch's own 16-bit product and against the read limit.

    python benchmarks/linears.py [--schemes dense,int4,int8,fp8] [--shapes A,B] [--rows 1,2,4,8,16,32,64,128,256]

One JSON line a case, correctness first (NaN-poisoned output against float32; a wrong case prints no time):
  us          one call with what stands around the product in a layer (norm, gate, residual), as CUDA-graph replays over
              copies of the matrix that fill more than the L2 cache, median
  steps_us    the same in steps: norm kernel, F.linear in bfloat16, activation kernel or sum
  flinear_us  F.linear alone in bfloat16
  limit_us    max(bytes of the matrix / 4.62 TB/s, operations / rate of the type); share = limit_us / us
Kernels are compiled first by parallel processes (--jobs). Whole run on an H200: under two minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pagoda.kernels import int4_linear
from pagoda.kernels.act_mul import act_mul
from pagoda.kernels.rms_norm import rms_norm
from pagoda.layers.linear import Linear, Norm
from pagoda.layers.schemes import SCHEMES

READ = 4.62e12  # bytes a second, measured read ceiling of an H200
RATES = {"dense": 686e12, "int4": 686e12, "int8": 1257e12, "fp8": 1257e12}
SHAPES = {  # out features, in features, role
    "A qkv": (6144, 4096, "qkv"),
    "A o": (4096, 4096, "o"),
    "A gate_up": (28672, 4096, "gate_up"),
    "A down": (4096, 14336, "down"),
    "A head": (128256, 4096, "head"),
    "B qkv": (4096, 1024, "qkv"),
    "B o": (1024, 2048, "o"),
    "B gate_up": (6144, 1024, "gate_up"),
    "B down": (1024, 3072, "down"),
    "B head": (151936, 1024, "head"),
}
BF = torch.bfloat16


class Case(NamedTuple):
    name: str
    scheme: str
    rows: int


def cases(schemes: list[str], shapes: list[str], rows: list[int]) -> list[Case]:
    """Heads stay dense; quantized schemes are measured on the large shape only."""
    return [
        Case(name, scheme, r)
        for name, (_, _, role) in SHAPES.items()
        for scheme in schemes
        for r in rows
        if name[0] in shapes and (scheme == "dense" or (role != "head" and name[0] == "A"))
    ]


def build(name: str, scheme: str, copies: int) -> list[Linear]:
    n, k, role = SHAPES[name]
    made = []
    for _ in range(copies):
        w = torch.empty(n, k, dtype=BF, device="cuda").normal_(0, k**-0.5)
        made.append(Linear.pack(role, scheme, SCHEMES[scheme]().quantize(w, 128), None, k, w.device, BF))
    return made


def copies_for(nbytes: float) -> int:
    return max(3, min(96, int(400e6 // nbytes) + 1))


class Layer:
    """The call and its surroundings for one role: inputs, output, and the same in steps."""

    def __init__(self, name: str, rows: int):
        n, k, self.role = SHAPES[name]
        self.x = torch.randn(rows, k, device="cuda").to(BF)
        self.act = "silu" if self.role == "gate_up" else None
        self.norm = Norm(torch.rand(k, device="cuda") + 0.5, 1e-5) if self.role in ("qkv", "gate_up", "head") else None
        width = n // 2 if self.act else n
        kind = torch.float32 if self.role == "head" else BF
        self.y = torch.empty(rows, width, dtype=kind, device="cuda")
        self.residual = torch.randn(rows, width, device="cuda").to(BF) if self.norm is None else None

    def ours(self, linear: Linear) -> torch.Tensor:
        return linear(self.x, norm=self.norm, act=self.act, residual=self.residual, out=self.y)

    def steps(self, weight: torch.Tensor) -> torch.Tensor:
        x = self.x if self.norm is None else rms_norm(self.x, *self.norm)
        y = F.linear(x, weight)
        y = act_mul(y, self.act) if self.act else y
        return y if self.residual is None else y + self.residual

    def error(self, linear: Linear) -> float:
        x = self.x.float()
        x = x if self.norm is None else F.rms_norm(x, x.shape[1:], self.norm.weight_K, self.norm.eps)
        want = x @ linear.dequantize().T
        want = F.silu(want.chunk(2, 1)[0]) * want.chunk(2, 1)[1] if self.act else want
        want = want if self.residual is None else want + self.residual.float()
        self.y.fill_(float("nan"))
        return float((self.ours(linear).float() - want).norm() / want.norm())


def graph_us(launch: Callable[[Any], object], operands: list, replays: int = 9) -> float:
    """Median microseconds of launch(operand), all operands one after the other in one CUDA graph."""
    launch(operands[0])
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(operands[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for operand in operands:
            launch(operand)
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(operands))
    return sorted(times)[replays // 2]


def measure(name: str, scheme: str, rows: list[int], dense: list[Linear]) -> None:
    """All numbers of rows of one matrix; `dense`: its bfloat16 copies."""
    n, k, _ = SHAPES[name]
    first = dense[:1] if scheme == "dense" else build(name, scheme, 1)
    linears = dense if scheme == "dense" else first + build(name, scheme, copies_for(first[0].nbytes()) - 1)
    nbytes, weights = linears[0].nbytes(), [linear.tensors["weight"] for linear in dense]
    for r in rows:
        layer = Layer(name, r)
        line = {"op": name, "scheme": scheme, "rows": r, "error": round(layer.error(linears[0]), 5)}
        if not line["error"] < (0.02 if scheme in ("dense", "int4") else 0.07):
            print(json.dumps(line | {"wrong": True}), flush=True)
            continue
        us, steps = graph_us(layer.ours, linears), graph_us(layer.steps, weights)
        plain = graph_us(partial(F.linear, layer.x), weights)
        limit = max(nbytes / READ, 2 * r * n * k / RATES[scheme]) * 1e6
        line |= {"us": us, "steps_us": steps, "flinear_us": plain, "limit_us": limit, "share": limit / us}
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in line.items()}), flush=True)


def warm(share: str, todo: list[Case]) -> None:
    """Compile share i of n of the kernels by calling them once."""
    i, n = map(int, share.split("/"))
    made: dict[tuple[str, str], list[Linear]] = {}
    for case in todo[i::n]:
        if (case.name, case.scheme) not in made:
            made = {(case.name, case.scheme): build(case.name, case.scheme, 1)}
        layer = Layer(case.name, case.rows)
        layer.ours(made[case.name, case.scheme][0])
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="dense,int4,int8,fp8")
    parser.add_argument("--shapes", default="A,B")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--narrow-rows", type=int, default=int4_linear.NARROW_ROWS, help="int4: wide kernel past these")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    int4_linear.NARROW_ROWS = args.narrow_rows
    schemes, shapes, rows = args.schemes.split(","), args.shapes.split(","), [int(r) for r in args.rows.split(",")]
    todo = cases(schemes, shapes, rows)
    if args.warm:
        return warm(args.warm, todo)
    command = [sys.executable, *sys.argv, "--warm"]
    workers = [subprocess.Popen([*command, f"{i}/{args.jobs}"]) for i in range(args.jobs)]
    if any([worker.wait() for worker in workers]):
        sys.exit("a kernel did not compile")
    torch.manual_seed(0)
    for name, (n, k, _) in SHAPES.items():
        wanted = [scheme for scheme in schemes if any(c.name == name and c.scheme == scheme for c in todo)]
        dense = build(name, "dense", copies_for(2 * n * k)) if wanted else []
        for scheme in wanted:
            measure(name, scheme, rows, dense)


if __name__ == "__main__":
    main()
