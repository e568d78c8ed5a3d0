"""`pagoda bench --profile`: where the time of decode and prefill steps goes, by torch's own profiler.

The engine's loop runs in this thread, and what it reads its messages from is a script: it submits requests, waits
until they are where they should be, and switches the profiler on and off between two steps.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from pagoda.cli.bench_record import Record, device_name
from pagoda.config import EngineConfig
from pagoda.engine import wire
from pagoda.engine.process import build_engine
from pagoda.engine.request import EngineRequest, Output, SamplingParams

Script = Iterator[list[tuple[bytes, wire.ToEngine]]]


class Recorder:
    """`phases` holds, for each phase, its profile, the steps in it and their wall time in seconds."""

    def __init__(self, batches: list[int], input_len: int, steps: int, vocab_size: int):
        self.batches, self.input_len, self.steps, self.vocab = batches, input_len, steps, vocab_size
        self.phases: dict[str, tuple[Any, int, float]] = {}
        self._rng, self._num, self._begun, self._ended = random.Random(0), 0, set(), set()

    def take(self, message: wire.FromEngine) -> None:
        """The engine's news."""
        assert isinstance(message, wire.Outputs), message
        for output in message.outputs:
            self._note(output)

    def _note(self, output: Output) -> None:
        assert output.error is None, output.error
        if output.token_ids:
            self._begun.add(output.id)
        if output.finish_reason is not None:
            self._ended.add(output.id)

    def _submit(self, max_tokens: int) -> tuple[bytes, wire.Submit]:
        self._num += 1
        prompt = [self._rng.randrange(self.vocab) for _ in range(self.input_len)]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return b"", wire.Submit(EngineRequest(f"{self._num}", prompt, params, arrival=time.monotonic()))

    def script(self) -> Script:
        """Each item is what the engine receives before its next step."""
        for batch in self.batches:
            yield from self._decode(batch)
        yield from self._prefill()

    def _decode(self, batch: int) -> Script:
        first = self._num + 1
        yield [self._submit(self.steps + 64) for _ in range(batch)]
        ids = {f"{i}" for i in range(first, self._num + 1)}
        while not ids <= self._begun:
            yield []
        for _ in range(8):  # kernels compile, graphs are captured
            yield []
        yield from self._record(f"decode, batch {batch}", iter([[]] * self.steps), self.steps)
        yield [(b"", wire.Abort(request_id)) for request_id in ids]

    def _prefill(self) -> Script:
        yield from self._one_by_one(2)
        yield from self._record(f"prefill of {self.input_len}", self._one_by_one(self.steps), self.steps)

    def _one_by_one(self, count: int) -> Script:
        for _ in range(count):
            yield [self._submit(1)]
            while f"{self._num}" not in self._ended:
                yield []

    def _record(self, name: str, steps: Script, count: int) -> Script:
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        _wait()
        with torch.profiler.profile(activities=kinds) as found:
            started = time.perf_counter()
            yield from steps
            _wait()
            wall = time.perf_counter() - started
        self.phases[name] = (found, count, wall)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(found: Any, steps: int, wall: float) -> list[tuple[str, float, float]]:
    """(operation, calls a step, microseconds a step of the device's own time), longest first; last what no operation
    accounts for: the C++ step of a CPU, the host's code, and gaps."""
    device = "device" if torch.cuda.is_available() else "cpu"
    rows = []
    for event in found.key_averages():
        spent = getattr(event, f"self_{device}_time_total")
        if spent > 0:
            rows.append((event.key, event.count / steps, spent / steps))
    rows.sort(key=lambda row: -row[2])
    rest = wall * 1e6 / steps - sum(row[2] for row in rows)
    return [*rows, ("(outside torch's operations)", 1.0, rest)]


def profile(args: argparse.Namespace, config: EngineConfig) -> int:
    """Run, print a table a phase, write a Chrome trace a phase, and a JSON line each."""
    folder = Path(args.out or "profile")
    folder.mkdir(parents=True, exist_ok=True)
    loop = build_engine(args.model, config)
    input_len = int(args.input_len.partition(":")[0])
    vocab = args.vocab_size or min(10000, loop.info.vocab_size)
    recorder = Recorder(args.batch_sizes, input_len, args.profile_steps, vocab)
    script = recorder.script()

    def poll(_timeout: float | None) -> list[tuple[bytes, wire.ToEngine]]:
        messages = next(script, None)
        if messages is None:
            loop.stop()
        return messages or []

    loop.connect(poll, lambda _sender, message: recorder.take(message))
    loop.run()
    record = Record({"model": args.model, "device": device_name(config.device, config.num_threads)})
    for name, (found, steps, wall) in recorder.phases.items():
        rows = table(found, steps, wall)
        print(f"\n{name}: {wall / steps * 1e3:.3f} ms a step\n{'us a step':>12} {'share':>7} {'calls':>8}  operation",
              file=sys.stderr)  # fmt: skip
        for key, calls, spent in [*rows[:25], rows[-1]]:
            share = spent / (wall * 1e6 / steps)
            print(f"{spent:12.1f} {share:7.1%} {calls:8.1f}  {key[:80]}", file=sys.stderr)
        trace = folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        found.export_chrome_trace(str(trace))
        top = [[key, round(calls, 2), round(spent, 1)] for key, calls, spent in rows[:10]]
        record.say(f"profile of {name}", wall / steps * 1e3, "ms a step", top=top, trace=str(trace))
    return 0
