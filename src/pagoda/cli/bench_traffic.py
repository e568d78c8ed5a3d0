"""Load for measurements: jobs of random token ids, all at once, as a Poisson process, or as a recorded trace.

Traces: Azure's csv (TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's JSON lines (timestamp in ms,
input_length, output_length, hash_ids: names of 512-token blocks; equal names are equal tokens: prefixes repeat).
"""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pagoda.errors import UsageError

HASH_BLOCK = 512


@dataclass(frozen=True)
class Job:
    """One request: seconds after the start at which it is sent, prompt ids, tokens to generate."""

    at: float
    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Arrival:
    """One row of a trace."""

    at: float
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


def parse_range(text: str) -> tuple[int, int]:
    """`512` or `100:1024`: the lengths that a job may have, both ends included."""
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise UsageError(f"{text!r} is not a length: write 512 or 100:1024.") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise UsageError(f"{text!r} is not a length: it must be 1 or more, the larger number last.")
    return bounds


def random_jobs(
    rng: random.Random, count: int, input_len: tuple[int, int], output_len: tuple[int, int], vocab_size: int
) -> list[Job]:
    """Jobs that are all sent at once."""
    jobs = []
    for _ in range(count):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(*input_len))]
        jobs.append(Job(0.0, prompt, rng.randint(*output_len)))
    return jobs


def poisson(rng: random.Random, jobs: Sequence[Job], rate: float) -> list[Job]:
    """The same jobs, sent independently of each other, `rate` a second on average."""
    at, spread = 0.0, []
    for job in jobs:
        at += rng.expovariate(rate)
        spread.append(replace(job, at=at))
    return spread


def read_trace(path: Path, most: int | None = None) -> list[Arrival]:
    """The first `most` rows, times from the first one on. Raises `UsageError` for a file that is no trace."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = (
                [_mooncake(line) for line in file]
                if path.suffix == ".jsonl"
                else [_azure(r) for r in csv.DictReader(file)]
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as a trace ({type(error).__name__}: {error}).") from error
    if not rows:
        raise UsageError(f"{path} has no rows.")
    rows.sort(key=lambda row: row.at)
    return [replace(row, at=row.at - rows[0].at) for row in rows[:most]]


def _azure(row: dict[str, str]) -> Arrival:
    when = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()  # microseconds; the file has one digit more
    return Arrival(when, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"])))


def _mooncake(line: str) -> Arrival:
    row = json.loads(line)
    lengths = max(1, int(row["input_length"])), max(1, int(row["output_length"]))
    return Arrival(float(row["timestamp"]) / 1000, *lengths, tuple(row.get("hash_ids", ())))


def trace_jobs(
    rng: random.Random, trace: Sequence[Arrival], vocab_size: int, session_len: int, rate: float | None = None
) -> list[Job]:
    """Jobs of a trace; `rate`: time is stretched so that so many a second arrive on average. What is longer than a
    session is cut: first the prompt's end, then the answer."""
    span = trace[-1].at - trace[0].at
    stretch = 1.0 if rate is None or span <= 0 else (len(trace) - 1) / span / rate
    jobs = []
    for row in trace:
        num_tokens = min(row.output_len, session_len - 1)
        prompt = _prompt(rng, row, vocab_size)[: session_len - num_tokens]
        jobs.append(Job(row.at * stretch, prompt, num_tokens))
    return jobs


def _prompt(rng: random.Random, row: Arrival, vocab_size: int) -> list[int]:
    ids: list[int] = []
    for name in row.blocks:
        block = random.Random(name)
        ids += [block.randrange(vocab_size) for _ in range(HASH_BLOCK)]
    ids += [rng.randrange(vocab_size) for _ in range(row.input_len - len(ids))]
    return ids[: row.input_len]
