"""Workload W5: how many requests a second are served well, over the engine or over HTTP.

    python benchmarks/serving.py --shape B --trace azure_llm_2023_conv.csv [--url http://HOST:PORT] [--budget 540]

The trace's requests arrive at rising rates; a rate is served well when 95% of its requests have their first token
within 500 ms and 95% of the gaps between tokens are below 50 ms. The rate doubles until it is too high, then the
distance between the last good and the first bad one is halved until it is within a tenth. At last the requests of the
best rate come all at once: the output tokens a second that the same mix reaches offline. JSON lines, within `--budget`.
"""

import argparse
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pagoda.cli.bench_record import Record, device_name
from pagoda.cli.bench_targets import EngineTarget, HttpTarget, Target, drive, must_succeed
from pagoda.cli.bench_traffic import Arrival, Job, read_trace, trace_jobs
from pagoda.config import EngineConfig
from pagoda.engine.client import start_engine

HERE = Path(__file__).parent
SHAPES = {"A": "llama-3.1-8b", "B": "qwen3-0.6b"}
FIRST_TOKEN_MS, GAP_MS = 500.0, 50.0
SESSION_LEN = 8192


def served_well(line: dict[str, Any]) -> bool:
    return not line["failed"] and line["first_token_p95_ms"] < FIRST_TOKEN_MS and line["gap_p95_ms"] < GAP_MS


def find_rate(measure: Callable[[float], bool], first: float, deadline: float) -> tuple[float, float]:
    """The highest good rate and the lowest bad one that were met (0 and infinity: none)."""
    good, bad, rate = 0.0, float("inf"), first
    while time.monotonic() < deadline and bad > good * 1.1:
        if measure(rate):
            good = rate
        else:
            bad = rate
        rate = good * 2 if bad == float("inf") else (good + bad) / 2
        if rate < first / 64:
            break
    return good, bad


@contextlib.contextmanager
def open_target(args: argparse.Namespace) -> Iterator[tuple[Target, str, int]]:
    """What is measured, its device, and the width of its vocabulary."""
    if args.url:
        yield HttpTarget(args.url), args.url, 10000
        return
    config = EngineConfig(
        session_len=SESSION_LEN, max_batch_size=args.max_batch_size, load_format="dummy", max_queued_requests=100000,
        weight_format=args.weight_format, quant_policy=args.quant_policy, tp=args.tp,
        max_prefill_token_num=args.prefill_tokens,
    )  # fmt: skip
    model = args.model or HERE / "shapes" / SHAPES[args.shape]
    if args.model:
        config = config.replace(load_format="safetensors", session_len=None)
    with start_engine(model, config, inline=False) as engine:
        yield EngineTarget(engine), device_name(config.device), min(10000, engine.info.vocab_size)


class Serving:
    """Rates of one trace against one target; each lasts `window` seconds and has requests of its own."""

    def __init__(self, target: Target, trace: list[Arrival], vocab: int, args: argparse.Namespace, record: Record):
        self.target, self.trace, self.vocab, self.args, self.record = target, trace, vocab, args, record
        self.tokens: dict[float, float] = {}

    def jobs(self, rate: float) -> list[Job]:
        count = min(len(self.trace), max(20, int(rate * self.args.window)))
        return trace_jobs(random.Random(), self.trace[:count], self.vocab, self.args.session_len, rate)

    def offline(self, rate: float) -> float:
        jobs = [Job(0.0, job.prompt, job.num_tokens) for job in self.jobs(rate)]
        run = must_succeed(drive(self.target, jobs))
        self.record.say("W5 offline, the same mix", run.num_tokens / run.wall, "tok/s", requests=len(jobs))
        return run.num_tokens / run.wall

    def measure(self, rate: float) -> bool:
        run = drive(self.target, self.jobs(rate))
        if not run.done:
            must_succeed(run)
        summary = run.summary()
        self.tokens[rate] = run.steady_rate
        well = served_well(summary)
        self.record.say("W5 rate", rate, "requests/s", well=well, tok_s=round(self.tokens[rate], 1), **summary)
        return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="B")
    parser.add_argument("--model", help="a checkpoint instead of a shape with random weights")
    parser.add_argument("--url", help="a server instead of an engine")
    parser.add_argument("--first-rate", type=float, default=4.0)
    parser.add_argument("--window", type=float, default=30.0, help="seconds of one rate")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all")
    parser.add_argument("--session-len", type=int, default=SESSION_LEN)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--prefill-tokens", type=int, default=2048)
    parser.add_argument("--weight-format", default="auto")
    parser.add_argument("--quant-policy", default="none")
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()
    trace, deadline = read_trace(args.trace), time.monotonic() + args.budget
    with open_target(args) as (target, device, vocab):
        record = Record({"shape": args.model or args.shape, "device": device, "trace": args.trace.name})
        serving = Serving(target, trace, vocab, args, record)
        must_succeed(drive(target, serving.jobs(args.first_rate)[:20]))  # kernels compile, graphs are captured
        good, bad = find_rate(serving.measure, args.first_rate, deadline - 3 * args.window)
        if good:
            offline = serving.offline(good)
            share = round(serving.tokens[good] / offline, 3)
            record.say("W5", good, "requests/s", next_bad=bad, tok_s=round(serving.tokens[good], 1), of_offline=share)


if __name__ == "__main__":
    main()
