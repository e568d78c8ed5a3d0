"""Tensor parallel on the GPUs of one host: all-reduce times by size, equality with one rank, the race on two.

    python benchmarks/tensor_parallel.py [--tp 2] [--seconds 330] [--log FILE]
        [--parts sums,equal,8b,8b-one,70b-int4,70b-fp8]

Prints one JSON line a result, as it goes; every part is a process group of its own with a time limit, so that a part
that fails or hangs costs the others nothing. `sums`: the one-shot sum through peers' memory and NCCL, checked and timed
inside CUDA graphs. `equal`: replies of mini against one rank's, token by token in float32, by right answers in
bfloat16. The others: W1, W3 and W2 of `throughput.py` with random weights, and beside them what `pagoda plan` predicts
for the same load; `8b-one` is one rank of `8b`, and their ratios. `--device cpu` runs `sums` and `equal` over gloo.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from throughput import SHAPES, ask, fresh

from pagoda import EngineConfig, GenerationConfig, pipeline
from pagoda.engine.client import EngineClient, start_engine
from pagoda.engine.ranks import ENVIRONMENT
from pagoda.engine.roofline import predict
from pagoda.kernels.all_reduce import all_reduce_reference
from pagoda.layers.parallel import Group
from pagoda.models.limits import CEILINGS, Limits
from pagoda.models.spec import ModelSpec, read_spec
from pagoda.quantize.mini_tasks import overall, questions, score

HERE = Path(__file__).parent
SIZES = [1 << n for n in (10, 12, 13, 14, 16, 18, 20, 21, 22, 24, 26)]  # bytes
REPEATS = 100
ASKED = 200  # questions of the part `equal`
PARTS = {"sums": 60, "equal": 75, "8b": 110, "8b-one": 110, "70b-int4": 90, "70b-fp8": 90}  # seconds at most
RACES = {"8b": ("A", "auto", 256), "8b-one": ("A", "auto", 256), "70b-int4": ("C", "int4", 64),
         "70b-fp8": ("C", "fp8", 64)}  # fmt: skip


def say(workload: str, value: float, unit: str, **more: Any) -> None:
    print(json.dumps({"workload": workload, "value": round(value, 3), "unit": unit, **more}), flush=True)


def randoms(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_sum(group: Group, device: torch.device, dtype: torch.dtype, count: int) -> None:
    """The sum of tensors that every rank can make for all."""
    parts = [randoms(7 + r, (count,), dtype) for r in range(group.size)]
    got = group.all_reduce_(parts[group.rank].to(device, copy=True)).cpu()
    error = (got.float() - all_reduce_reference(parts).float()).abs().max()
    assert error <= 0.05 * (dtype != torch.float32) + 1e-5, f"{dtype}, {count}: off by {error}"


def check_step(group: Group, device: torch.device, rows: int, width: int, early: bool) -> None:
    """Residual, sum and norm as a decode graph has them, replayed with new numbers; the same bits on every rank."""
    gain = randoms(5, (width,), torch.bfloat16)
    still = [torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2)]
    on_device = (gain.to(device), 1e-5)
    group.sum_(*still, on_device, early)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        s, y = group.sum_(*still, on_device, early)
        again, _ = group.sum_(y.clone(), s.clone(), None, early)
    for turn in range(6):
        parts = [randoms(100 * turn + r, (rows, width), torch.bfloat16) for r in range(group.size)]
        residual = randoms(100 * turn + 50, (rows, width), torch.bfloat16)
        want_y, want_s = all_reduce_reference(parts, residual, (gain, 1e-5))
        for place, value in zip(still, (parts[group.rank], residual), strict=True):
            place.copy_(value)
        graph.replay()
        torch.testing.assert_close(s.cpu(), want_s, atol=0.02, rtol=0.01)
        torch.testing.assert_close(y.cpu(), want_y, atol=0.03, rtol=0.02)
        torch.testing.assert_close(
            again.cpu(), all_reduce_reference([want_y] * group.size, want_s), atol=0.1, rtol=0.02
        )
        bits = int(again.view(torch.int16).long().sum())
        assert group.smallest(bits) == -group.smallest(-bits), "the ranks' sums differ"


def time_sums(group: Group, device: torch.device, size: int, early: bool = False) -> float:
    """Microseconds of one all-reduce of `size` bytes of bf16 among many in a row, the median of several runs."""
    x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)

    def body() -> None:
        for _ in range(REPEATS):
            group.all_reduce_(x, early)

    body()
    run = body
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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


def rank_of_sums(rank: int, size: int, meeting: str, kind: str) -> None:
    """One rank of the part `sums`; rank 0 speaks."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    group = Group.join(rank, size, meeting, device)
    report = say if rank == 0 else lambda *_, **__: None
    report("all-reduce goes by", size, "ranks", way=group.describe())
    small = group.sums_at_once(8192, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (8, 1000, 4096, 65536, 1 << 21, 1 << 22):
            check_sum(group, device, dtype, count)
    report("all-reduce checks against the host", 18, "passed")
    if small:
        for rows, width, early in (
            (1, 4096, True),
            (1, 8192, True),
            (3, 4096, True),
            (64, 4096, True),
            (256, 4096, False),
        ):
            check_step(group, device, rows, width, early)
        report("sum + residual + norm in graphs", 5, "passed")
    nccl = Group(rank, size, torch.distributed.group.WORLD, device)
    for size_bytes in SIZES if kind == "cuda" else SIZES[:4]:
        others = time_sums(nccl, device, size_bytes)
        if not group.sums_at_once(size_bytes, torch.bfloat16):
            report("all-reduce", others, "us", bytes=size_bytes, way="NCCL" if kind == "cuda" else "gloo")
            continue
        ours, early = time_sums(group, device, size_bytes), time_sums(group, device, size_bytes, early=True)
        report("all-reduce", ours, "us", bytes=size_bytes, early=round(early, 2), nccl=round(others, 2), way="one shot")
    group.close()


def run_sums(tp: int, kind: str) -> None:
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of_sums, (tp, f"file://{folder}/meeting", kind), nprocs=tp)


def replies(dtype: str, tp: int, kind: str, out: str) -> None:
    """Replies of mini in one configuration, to a file: token ids and the share of right answers."""
    room = {"session_len": 512, "max_batch_size": 64, "max_queued_requests": 10**6, "cache_max_entry_count": 2000}
    config = EngineConfig(device=kind, dtype=dtype, tp=tp, **room)
    asked = questions(5, ASKED if kind == "cuda" else 30)
    with pipeline("mini", config) as pipe:
        got = pipe([q.messages for q in asked], GenerationConfig(do_sample=False, max_new_tokens=160))
    result = overall(score(asked, [r.text for r in got]))
    tokens = [r.token_ids for r in got]
    Path(out).write_text(json.dumps({"tokens": tokens, "right": result.num_right / result.num_asked}))


def run_equal(tp: int, kind: str) -> None:
    """All four configurations at once: nothing is timed here."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = {(d, n): f"{folder}/{d}-{n}" for d in ("float32", "bfloat16") for n in (1, tp)}
        base = [sys.executable, __file__, "--device", kind]
        runs = [subprocess.Popen([*base, "--reply", d, "--tp", str(n), "--log", out]) for (d, n), out in jobs.items()]
        codes = [run.wait() for run in runs]
        assert codes == [0] * 4, f"ends of float32 on 1, {tp}, bfloat16 on 1, {tp} ranks: {codes}"
        found = {job: json.loads(Path(out).read_text()) for job, out in jobs.items()}
    for dtype in ("float32", "bfloat16"):
        one, several = found[dtype, 1], found[dtype, tp]
        same = sum(a == b for a, b in zip(one["tokens"], several["tokens"], strict=True))
        right = {"right": round(several["right"], 4), "right_of_one": round(one["right"], 4)}
        share = same / len(one["tokens"])
        say(
            "replies of mini equal to one rank's",
            share,
            "of 1",
            dtype=dtype,
            tp=tp,
            **right,
            replies=len(one["tokens"]),
        )


class Race:
    """W1, W3 and W2 of one engine. `more`: what every line says; `until`: when the part must have ended."""

    def __init__(self, engine: EngineClient, limits: Limits, more: dict[str, Any], until: float):
        self.engine, self.limits, self.more, self.until, self.rng = engine, limits, more, until, random.Random(1)

    def say(self, workload: str, value: float, unit: str, limit: float, **more: Any) -> None:
        say(workload, value, unit, of_limit=round(value / limit, 3), **self.more, **more)

    def w1(self, runs: int) -> float:
        rates, firsts = [], []
        for _ in range(1 + runs):
            _, [at] = ask(self.engine, [(fresh(self.rng, 128), 256)])
            rates.append(255 / (at[-1] - at[0]))
            firsts.append(at[0] * 1e3)
        rate = statistics.median(rates[1:])
        self.say("W1", rate, "tok/s", 1 / self.limits.decode(1, 256), first_ms=round(statistics.median(firsts[1:]), 2))
        return rate

    def w3(self) -> None:
        ask(self.engine, [(fresh(self.rng, 4096), 1) for _ in range(4)])
        wall, _ = ask(self.engine, [(fresh(self.rng, 4096), 1) for _ in range(16)])
        self.say("W3", 16 * 4096 / wall, "tok/s", 16 * 4096 / self.limits.prefill([4096] * 16))

    def w2(self, count: int) -> None:
        """The first `count` of W2's requests; a second time, with the graphs of the first, where there is time."""
        rng = random.Random(0)
        prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
        outs = [rng.randint(100, 1024) for _ in range(256)][:count]
        limit = sum(outs) / self.limits.run([(len(p), n) for p, n in zip(prompts, outs, strict=False)])
        took = 0.0
        for turn in range(2):
            if time.monotonic() + took > self.until:
                break
            shifted = [[(t + 7919 * turn) % 10001 for t in p] for p in prompts[:count]]
            took, _ = ask(self.engine, list(zip(shifted, outs, strict=True)))
            self.say("W2", sum(outs) / took, "tok/s", limit, requests=count, run=turn + 1)


def run_race(part: str, tp: int, until: float) -> None:
    shape, weights, requests = RACES[part]
    folder = HERE / "shapes" / SHAPES[shape]
    config = EngineConfig(session_len=4352, max_batch_size=256, load_format="dummy", weight_format=weights, tp=tp)
    spec = read_spec(folder, config)
    begin = time.monotonic()
    with start_engine(folder, config, inline=tp == 1) as engine:
        print(*engine.info.report, f"{part}: ready in {time.monotonic() - begin:.1f} s", sep="\n", flush=True)
        limits = Limits(spec, config, CEILINGS["H200"])
        race = Race(engine, limits, {"shape": shape, "weights": weights, "tp": tp}, until)
        failed = 0
        for step in (lambda: compare(race, spec, config, race.w1(3 if shape == "A" else 2)), race.w3,
                     lambda: race.w2(requests)):  # fmt: skip
            try:
                step()
            except Exception:
                traceback.print_exc()
                failed += 1
    sys.exit(failed)


def compare(race: Race, spec: ModelSpec, config: EngineConfig, rate: float) -> None:
    """`pagoda plan` against the engine's report, and against W1's rate."""
    info, planned = race.engine.info, predict(spec, config, "h200", 128).memory
    one = predict(spec, config.replace(max_batch_size=1, session_len=256), "h200", 128)
    found = next(float(line.split()[1]) for line in info.report if line.startswith("weights"))
    say("plan: W1 measured over predicted", rate / one.tokens_per_second, "of 1", **race.more)
    say("plan: weights of a rank, engine over plan", found * 2**30 / planned.weight_bytes, "of 1", **race.more)
    say("plan: KV blocks, engine over plan", info.num_blocks / planned.num_blocks, "of 1", **race.more)


def run_part(args: argparse.Namespace) -> None:
    if args.only == "sums":
        run_sums(args.tp, args.device)
    elif args.only == "equal":
        run_equal(args.tp, args.device)
    else:
        run_race(args.only, 1 if args.only.endswith("-one") else args.tp, time.monotonic() + args.seconds)


class Show:
    """Starts the parts one after another, passes their lines on, to the log too, and keeps the results for ratios."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.end = args, time.monotonic() + args.seconds
        self.results: dict[tuple[str, str, Any], float] = {}
        self._log = open(args.log, "a", encoding="utf-8") if args.log else None  # noqa: SIM115 as long as we live

    def line(self, text: str, aloud: bool = True) -> None:
        if aloud:
            print(text, flush=True)
        if self._log is not None:
            self._log.write(text + "\n")
            self._log.flush()

    def part(self, name: str) -> None:
        left = self.end - time.monotonic()
        seconds = min(PARTS[name], left - 5)
        if seconds < 15:
            self.line(f"part {name}: no time left")
            return
        args = ["--tp", str(self.args.tp), "--device", self.args.device, "--seconds", str(seconds - 10)]
        begin = time.monotonic()
        run = subprocess.Popen([sys.executable, __file__, "--only", name, *args], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
        watch = threading.Timer(seconds, self._kill, [run])
        watch.start()
        assert run.stdout is not None
        recent: list[str] = []
        for text in run.stdout:
            recent = [*recent, text.rstrip()][-25:]
            self._note(name, text.rstrip())
        code = run.wait()
        watch.cancel()
        self._kill(run)
        if code:
            self.line("\n".join([f"part {name} FAILED with code {code} (-9: time limit); its last lines:", *recent]))
        self.line(f"part {name} took {time.monotonic() - begin:.0f} s")

    def _note(self, part: str, text: str) -> None:
        self.line(
            text, aloud=text.startswith("{") or "GiB" in text or "ranks" in text or "sums" in text or "ready" in text
        )
        if text.startswith('{"workload"'):
            found = json.loads(text)
            if found["workload"] in ("W1", "W2", "W3"):
                self.results[part, found["workload"], found.get("run")] = found["value"]

    @staticmethod
    def _kill(run: "subprocess.Popen[str]") -> None:
        """The part and everything that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)

    def ratios(self) -> None:
        for (part, workload, run), value in self.results.items():
            alone = self.results.get(("8b-one", workload, run))
            if part == "8b" and alone:
                text = {
                    "workload": f"{workload} over one rank's",
                    "value": round(value / alone, 3),
                    "unit": "x",
                    "run": run,
                }
                self.line(json.dumps(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--log", default="")
    parser.add_argument("--only", choices=PARTS, help="run this part here (the parts are started so)")
    parser.add_argument("--reply", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reply:
        return replies(args.reply, args.tp, args.device, args.log)
    if args.only:
        return run_part(args)
    show = Show(args)
    for part in args.parts.split(","):
        try:
            show.part(part)
        except Exception:
            show.line(f"part {part}: {traceback.format_exc()}")
    show.ratios()


if __name__ == "__main__":
    main()
