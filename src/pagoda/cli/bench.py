"""`pagoda bench [throughput | latency | serving] MODEL`: measurements through the whole engine, or over HTTP.

Token ids in and out, greedy, end of sequence ignored. The first of several runs warms up; the median of the others is
printed. Every line carries device, commit, command and, where the device's rates are known, the share of the limit.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pagoda.cli.bench_record import Record, device_name, draw, require_plot
from pagoda.cli.bench_targets import EngineTarget, HttpTarget, Target, Timings, drive, must_succeed
from pagoda.cli.bench_traffic import Job, parse_range, poisson, random_jobs, read_trace, trace_jobs
from pagoda.cli.flags import BOOL, Parser, add_config_flags, config_from
from pagoda.config import EngineConfig
from pagoda.errors import UsageError

KINDS = ("throughput", "latency", "serving")


def _numbers(kind: type) -> Any:
    def read(text: str) -> list[Any]:
        try:
            values = [kind(word) for word in text.split(",")]
        except ValueError:
            values = []
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0 such as 1,8,64")
        return values

    return read


def make_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, usage=f"{prog} [throughput | latency | serving] MODEL [flags]", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="may be left out with --url")
    load = parser.add_argument_group("load")
    load.add_argument("--input-len", default="512", metavar="N", help="prompt tokens: 512, or 100:1024 for any between")
    load.add_argument("--output-len", default="128", metavar="N", help="tokens to generate, written alike")
    load.add_argument("--num-prompts", type=int, default=32, metavar="N", help="requests of a run (default: 32)")
    load.add_argument("--batch-sizes", type=_numbers(int), default=[1, 8], metavar="N,N", help="latency: 1,8")
    load.add_argument("--input-lens", type=_numbers(int), default=[128, 512], metavar="N,N", help="latency: 128,512")
    load.add_argument("--rates", type=_numbers(float), metavar="R,R", help="serving: requests a second "
                      "(default: 1,2,4; of a trace: as it was recorded)")  # fmt: skip
    load.add_argument("--trace", metavar="FILE", help="serving: Azure's csv or Mooncake's jsonl instead of Poisson")
    load.add_argument("--runs", type=int, default=2, metavar="N", help="the first of several warms up (default: 2)")
    load.add_argument("--random-seed", "--seed", type=int, default=0, metavar="N", help="of the load (default: 0)")
    where = parser.add_argument_group("where")
    where.add_argument("--url", help="measure an OpenAI-compatible server; its key is taken from PAGODA_API_KEY")
    where.add_argument("--model-name", metavar="NAME", help="the model's name at --url (default: the first listed)")
    where.add_argument("--vocab-size", type=int, metavar="N", help="prompts have ids below this (default: the model's, "
                       "at most 10000)")  # fmt: skip
    where.add_argument("--inline", **BOOL, default=False, help="engine in this process")
    where.add_argument("--profile", **BOOL, default=False, help="instead: time by operation "
                       "of decode and prefill steps, as tables and Chrome traces")  # fmt: skip
    where.add_argument("--profile-steps", type=int, default=20, metavar="N", help="(default: 20)")
    where.add_argument("--out", metavar="FILE", help="append the JSON lines to a file, too; with --profile: the folder "
                       "of the traces")  # fmt: skip
    where.add_argument("--plot", metavar="FILE", help="draw the results (.png, .svg, .pdf); needs matplotlib")
    add_config_flags(parser, EngineConfig, "engine")
    return parser


class Bench:
    """Runs kinds of measurements against one target."""

    def __init__(self, target: Target, args: argparse.Namespace, record: Record, vocab_size: int, limits: Any = None):
        self.target, self.args, self.record, self.vocab, self.limits = target, args, record, vocab_size, limits
        self.rng = random.Random(args.random_seed)
        self.lengths = parse_range(args.input_len), parse_range(args.output_len)

    def _repeat(self, make_jobs: Any) -> list[tuple[list[Job], Timings]]:
        """The runs that count: all but the first, if there are several."""
        runs = []
        for _ in range(self.args.runs):
            jobs = make_jobs()
            runs.append((jobs, must_succeed(drive(self.target, jobs))))
        return runs[1:] or runs

    def throughput(self) -> None:
        """All requests at once: output tokens over wall time, prefill included."""
        count = self.args.num_prompts
        runs = self._repeat(lambda: random_jobs(self.rng, count, *self.lengths, self.vocab))
        rates = [run.num_tokens / run.wall for _, run in runs]
        jobs, run = runs[-1]
        sizes = [(len(job.prompt), job.num_tokens) for job in jobs]
        limit = run.num_tokens / self.limits.run(sizes) if self.limits else None
        total = sum(p + n for p, n in sizes) / run.wall
        facts = {"input_len": self.args.input_len, "output_len": self.args.output_len, "total_tok_s": round(total, 1)}
        facts |= {**run.summary(), **self.target.new_facts()}
        self.record.say("throughput", statistics.median(rates), "tok/s", limit, **facts)

    def latency(self) -> None:
        """Batches of equal requests: time to the first token, and the decode rate once all have one."""
        output_len = self.lengths[1]
        for input_len in self.args.input_lens:
            for batch in self.args.batch_sizes:
                runs = self._repeat(
                    lambda n=input_len, b=batch: random_jobs(self.rng, b, (n, n), output_len, self.vocab)
                )
                sizes = {"batch": batch, "input_len": input_len, "output_len": self.args.output_len}
                sizes["label"] = f"{batch} x {input_len}"
                first = statistics.median(j.first_token for _, run in runs for j in run.jobs) * 1e3
                self.record.say("first token", first, "ms", **sizes)
                rate = statistics.median(run.decode_rate for _, run in runs)
                middle = input_len + output_len[1] / 2
                limit = batch / self.limits.decode(batch, middle) if self.limits else None
                self.record.say("decode", rate, "tok/s", limit, **sizes, **self.target.new_facts())

    def serving(self) -> None:
        """Requests at their times, whether the server keeps up or not."""
        for jobs, rate in self._serving_jobs():
            run = drive(self.target, jobs)
            if not run.done:
                must_succeed(run)
            facts = {**run.summary(), **self.target.new_facts()}
            self.record.say("serving", run.steady_rate, "tok/s", rate=round(rate, 3), **facts)

    def _serving_jobs(self) -> Iterator[tuple[list[Job], float]]:
        args = self.args
        if args.trace is None:
            for rate in args.rates or [1.0, 2.0, 4.0]:
                jobs = random_jobs(self.rng, args.num_prompts, *self.lengths, self.vocab)
                yield poisson(self.rng, jobs, rate), rate
            return
        trace = read_trace(Path(args.trace), args.num_prompts)
        recorded = (len(trace) - 1) / trace[-1].at if trace[-1].at else 1.0
        for rate in args.rates or [None]:
            jobs = trace_jobs(self.rng, trace, self.vocab, self.session_len(), rate)
            yield jobs, rate or recorded

    def session_len(self) -> int:
        if isinstance(self.target, EngineTarget):
            return self.target.engine.info.session_len
        return vars(self.args).get("session_len", 1 << 30)


def find_limits(model: str, config: EngineConfig, device: str) -> Any:
    """The model's physical limits on this device; None where its rates are not known."""
    from pagoda.models.find import resolve_model
    from pagoda.models.limits import Limits, ceiling_of
    from pagoda.models.loader import resolve_spec

    ceiling = ceiling_of(device)
    return Limits(*resolve_spec(resolve_model(model), config), ceiling) if ceiling is not None else None


@contextmanager
def open_bench(args: argparse.Namespace) -> Iterator[Bench]:
    """A bench on the server at `--url`, or on an engine that is started for it."""
    out = Path(args.out) if args.out else None
    if args.url:
        common = {"model": args.model or args.model_name, "device": args.url}
        target = HttpTarget(args.url, args.model_name)
        yield Bench(target, args, Record(common, out), args.vocab_size or 10000)
        return
    from pagoda.engine.client import start_engine

    config = config_from(args, EngineConfig)
    given = {k: v for k, v in vars(config).items() if v != getattr(EngineConfig(), k)}
    if config.max_queued_requests is None and "serving" not in kinds_of(args):
        config = config.replace(max_queued_requests=max(4 * config.max_batch_size, args.num_prompts))
    with start_engine(args.model, config, inline=args.inline) as engine:
        print("\n".join(engine.info.report), file=sys.stderr, flush=True)
        device = device_name(config.device, config.num_threads)
        record = Record({"model": args.model, "device": device, "engine": given}, out)
        vocab = args.vocab_size or min(10000, engine.info.vocab_size)
        yield Bench(EngineTarget(engine), args, record, vocab, find_limits(args.model, config, device))


def kinds_of(args: argparse.Namespace) -> tuple[str, ...]:
    """What to measure: the word before MODEL; serving where a trace or rates are given; else what needs neither."""
    if args.first_word:
        return (args.first_word,)
    return ("serving",) if args.trace or args.rates else ("throughput", "latency")


def run(args: argparse.Namespace) -> int:
    if not args.model and not args.url:
        raise UsageError("bench needs a MODEL, or --url of a server.")
    if args.num_prompts < 1 or args.runs < 1:
        raise UsageError("--num-prompts and --runs must be 1 or more.")
    if args.plot:
        require_plot()
    if args.profile:
        if not args.model:
            raise UsageError("--profile looks into an engine: give a MODEL instead of --url.")
        from pagoda.cli.bench_profile import profile

        return profile(args, config_from(args, EngineConfig))
    with open_bench(args) as bench:
        for kind in kinds_of(args):
            getattr(bench, kind)()
    if args.plot:
        draw(bench.record.lines, Path(args.plot))
    return 0
