"""Tensor parallel on the GPUs of one host: all-reduce times by size, equality with one rank, the race on two.

    python benchmarks/tensor_parallel.py [--tp 2] [--parts sums,equal,plan,8b,70b]

Prints one JSON line a result. `sums`: one shot through peer memory against NCCL, inside CUDA graphs. `equal`: greedy
tokens of mini and of a random Llama in float32 against one rank. `plan`: what `pagoda plan` predicts for the 8B shape
against what the engine reports. `8b` and `70b`: W1 to W3 of `throughput.py` (8B in bf16 on one rank, too; 70B in int4).
`--device cpu` runs `sums` and `equal` over gloo.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from pagoda.cli.bench_record import Record
from pagoda.config import EngineConfig
from pagoda.engine.client import start_engine
from pagoda.engine.ranks import ENVIRONMENT
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.engine.roofline import predict
from pagoda.kernels.all_reduce import all_reduce_reference
from pagoda.layers.parallel import Group
from pagoda.models.spec import read_spec

HERE = Path(__file__).parent
SIZES = [1 << n for n in range(10, 27, 2)]  # bytes
REPEATS = 50


def check(group: Group, device: torch.device, dtype: torch.dtype, count: int) -> None:
    """The sum of tensors that every rank can make for all."""
    parts = [torch.randn(count, generator=torch.Generator().manual_seed(7 + r)).to(dtype) for r in range(group.size)]
    got = group.all_reduce_(parts[group.rank].to(device, copy=True)).cpu()
    error = (got.float() - all_reduce_reference(parts).float()).abs().max()
    assert error <= 0.05 * (dtype != torch.float32) + 1e-5, f"{dtype}, {count}: off by {error}"


def time_sums(group: Group, device: torch.device, size: int) -> float:
    """Microseconds of one all-reduce of `size` bytes of bf16 among many in a row, the median of several runs."""
    x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)

    def body() -> None:
        for _ in range(REPEATS):
            group.all_reduce_(x)

    body()
    run = body
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        run = graph.replay
    times = []
    for _ in range(7):
        group.smallest(0)  # all ranks start together
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / REPEATS * 1e6)
    return statistics.median(times)


def sums(rank: int, size: int, meeting: str, kind: str, out: str) -> None:
    """One rank of the part `sums`; rank 0 leaves the times."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    sizes = SIZES if kind == "cuda" else SIZES[:4]
    found: dict[str, dict[int, float]] = {}
    group = Group.join(rank, size, meeting, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (8, 1000, 4096, 65536, 1 << 21):
            check(group, device, dtype, count)
    found["one shot, else NCCL" if kind == "cuda" else "gloo"] = {s: time_sums(group, device, s) for s in sizes}
    if kind == "cuda":
        one_shot, group._one_shot = group._one_shot, None
        found["NCCL"] = {s: time_sums(group, device, s) for s in sizes}
        group._one_shot = one_shot
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    group.close()


def run_sums(record: Record, tp: int, kind: str) -> None:
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(sums, (tp, f"file://{folder}/meeting", kind, f"{folder}/out"), nprocs=tp)
        for way, times in json.loads(Path(f"{folder}/out").read_text()).items():
            for size, micros in times.items():
                record.say("all-reduce", micros, "us", bytes=int(size), way=way, tp=tp)


def greedy(model: str, config: EngineConfig, vocab: int) -> list[list[int]]:
    rng = random.Random(3)
    prompts = [[rng.randrange(3, vocab) for _ in range(n)] for n in (1, 17, 130, 300, 64)]
    params = SamplingParams(temperature=0.0, max_tokens=64)
    with start_engine(model, config) as engine:
        tickets = [engine.submit(EngineRequest(f"e{n}", p, params)) for n, p in enumerate(prompts)]
        return [[t for o in ticket for t in o.token_ids] for ticket in tickets]


def random_llama(folder: Path) -> Path:
    """Weights wide enough that greedy choices are far from ties; sizes that two ranks divide and three do not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "vocab_size": 4096,
             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
    config = LlamaConfig(**sizes, max_position_embeddings=1024, initializer_range=0.1, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_equal(record: Record, tp: int, kind: str) -> None:
    base = EngineConfig(device=kind, session_len=512, max_batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        for name, model, vocab in (("mini", "mini", 6144), ("random", str(random_llama(Path(folder))), 4096)):
            for dtype in ("float32", "bfloat16"):
                config = base.replace(dtype=dtype)
                one, several = greedy(model, config, vocab), greedy(model, config.replace(tp=tp), vocab)
                equal = sum(a == b for x, y in zip(one, several, strict=True) for a, b in zip(x, y, strict=True))
                total = sum(map(len, one))
                record.say("greedy tokens equal to one rank's", equal / total, "of 1", model=name, dtype=dtype, tp=tp)
                assert dtype != "float32" or one == several, "tensor parallel changes greedy tokens in float32"


def run_plan(record: Record, tp: int) -> None:
    folder = HERE / "shapes" / "llama-3.1-8b"
    config = EngineConfig(session_len=4352, max_batch_size=256, load_format="dummy", tp=tp)
    planned = predict(read_spec(folder, config), config, "h200", 128).memory
    with start_engine(folder, config, inline=False) as engine:
        blocks = engine.info.num_blocks
        print("\n".join(engine.info.report), *planned.lines(), sep="\n", flush=True)
    record.say("KV blocks, engine over plan", blocks / planned.num_blocks, "of 1", blocks=blocks, tp=tp)


def race(*flags: str) -> None:
    subprocess.run([sys.executable, str(HERE / "throughput.py"), *flags], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--parts", default="sums,equal,plan,8b,70b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    record, tp = Record({"device": f"{args.tp} x {name}"}), str(args.tp)
    for part in args.parts.split(","):
        begin = time.perf_counter()
        if part == "sums":
            run_sums(record, args.tp, args.device)
        elif part == "equal":
            run_equal(record, args.tp, args.device)
        elif part == "plan":
            run_plan(record, 1)
            run_plan(record, args.tp)
        elif part == "8b":
            race("--shape", "A", "--workloads", "W1,W3")
            race("--shape", "A", "--workloads", "W1,W3,W2", "--tp", tp)
        elif part == "70b":
            race("--shape", "C", "--workloads", "W1,W3", "--weight-format", "int4", "--tp", tp)
        print(f"part {part} took {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
