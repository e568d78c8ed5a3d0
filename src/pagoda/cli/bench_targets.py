"""What a benchmark drives, and how it is timed: an engine, or any OpenAI-compatible server over HTTP.

The HTTP client is a bare one: a general library costs more time a token than a fast server does.
"""

import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
import numpy as np

from pagoda.cli.bench_traffic import Job
from pagoda.engine.client import EngineClient
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.errors import EngineError, UsageError


class Target(Protocol):
    def generate(self, job: Job) -> AsyncIterator[int]:
        """Greedy, end of sequence ignored; yields the number of new tokens whenever some arrive."""

    def new_facts(self) -> dict[str, Any]:
        """What is to be said beside the figures of the last runs."""


class EngineTarget:
    """An engine of ours, token ids in and out."""

    def __init__(self, engine: EngineClient):
        self.engine = engine
        self._ids = itertools.count()
        self._counted = (0, 0)

    def new_facts(self) -> dict[str, Any]:
        """The share of guessed tokens that was right since the last call, where tokens were guessed."""
        counters, (before, right_before) = self.engine.stats().counters, self._counted
        self._counted = (counters.guessed_tokens, counters.accepted_tokens)
        guessed = counters.guessed_tokens - before
        if not guessed:
            return {}
        return {"guessed": guessed, "accepted": round((counters.accepted_tokens - right_before) / guessed, 3)}

    async def generate(self, job: Job) -> AsyncIterator[int]:
        params = SamplingParams(temperature=0.0, max_tokens=job.num_tokens)
        request = EngineRequest(f"bench-{next(self._ids)}", job.prompt, params, arrival=time.monotonic())
        async for output in self.engine.submit(request):
            if output.error is not None:
                raise EngineError(output.error)
            if output.token_ids:
                yield len(output.token_ids)


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[Any] = []
    usage: _Usage | None = None
    error: Any = None


class _Chunks:
    """Takes the framing of a chunked body away (RFC 9112, section 7.1)."""

    def __init__(self) -> None:
        self._rest, self.ended = b"", False

    def take(self, data: bytes) -> bytes:
        """What the chunks that are whole now hold."""
        data, at, whole = self._rest + data, 0, []
        while (end := data.find(b"\r\n", at)) >= 0 and not self.ended:
            first = end + 2
            last = first + int(data[at:end].split(b";")[0], 16)
            if len(data) < last + 2:
                break
            whole.append(data[first:last])
            at, self.ended = last + 2, first == last
        self._rest = data[at:]
        return b"".join(whole)


class HttpTarget:
    """`POST /v1/completions` with token ids, streamed. A chunk counts as one token unless the server says how many
    there are so far. The key, where one is needed, comes from PAGODA_API_KEY."""

    def __init__(self, url: str, model: str | None = None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is not the address of a server: write http://HOST:PORT.")
        self.host, self.tls = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/"
        self.model = model

    async def _exchange(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[bytes]:
        """Send a request on a connection of its own; yields the answer's body in pieces as they come."""
        writer = None
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls or None)
            key = os.environ.get("PAGODA_API_KEY")
            head = [
                f"{method} {self.path}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close",
                "Content-Type: application/json", f"Content-Length: {len(body)}",
                *([f"Authorization: Bearer {key}"] if key else []),
            ]  # fmt: skip
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
            status, headers = await reader.readline(), await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in status:
                text = (await reader.read(2000)).decode("utf-8", "replace").strip()
                raise EngineError(f"The server answered {status.decode().strip()}: {text[:300]}")
            chunks = _Chunks() if b"transfer-encoding: chunked" in headers.lower() else None
            while data := await reader.read(1 << 16):
                yield data if chunks is None else chunks.take(data)
                if chunks is not None and chunks.ended:
                    return
            if chunks is not None:
                raise EngineError(f"The server at {self.host}:{self.port} broke its answer off.")
        except (OSError, asyncio.IncompleteReadError) as error:
            raise EngineError(f"The server at {self.host}:{self.port} is gone ({error}).") from error
        finally:
            if writer is not None:
                writer.close()

    def new_facts(self) -> dict[str, Any]:
        return {}

    async def find_model(self) -> str:
        """The name that the server lists first, unless one was given."""
        if self.model is None:
            listed = b"".join([piece async for piece in self._exchange("GET", "models")])
            self.model = str(json.loads(listed)["data"][0]["id"])
        return self.model

    async def generate(self, job: Job) -> AsyncIterator[int]:
        body = {
            "model": await self.find_model(), "prompt": job.prompt, "max_tokens": job.num_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        rest, seen = b"", 0
        async for piece in self._exchange("POST", "completions", json.dumps(body).encode()):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                    continue
                chunk = msgspec.json.decode(line[5:], type=_Chunk)
                if chunk.error is not None:
                    raise EngineError(f"The server reported {chunk.error}")
                total = chunk.usage.completion_tokens if chunk.usage is not None else seen + len(chunk.choices)
                if total > seen:
                    yield total - seen
                    seen = total


@dataclass
class Timing:
    """One job: seconds from the start of the run; `arrivals` has one entry for each token."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def first_token(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.arrivals)]


@dataclass
class Timings:
    """All jobs of one run. `wall`: seconds from the first job's sending to the last token."""

    jobs: list[Timing]

    @property
    def done(self) -> list[Timing]:
        return [job for job in self.jobs if job.error is None and job.arrivals]

    @property
    def num_tokens(self) -> int:
        return sum(len(job.arrivals) for job in self.jobs)

    @property
    def wall(self) -> float:
        return max(job.arrivals[-1] for job in self.done) - min(job.sent for job in self.jobs)

    @property
    def decode_rate(self) -> float:
        """Tokens a second from the moment when every job has its first one."""
        begin = max(job.arrivals[0] for job in self.done)
        late = [at for job in self.done for at in job.arrivals if at > begin]
        return len(late) / (max(late) - begin) if late else 0.0

    @property
    def steady_rate(self) -> float:
        """Tokens a second while requests kept coming: from a quarter of that time on, until the last was sent."""
        end = max(job.sent for job in self.jobs)
        if end == 0:
            return self.num_tokens / self.wall
        return sum(end / 4 < at <= end for job in self.jobs for at in job.arrivals) / (end * 3 / 4)

    def summary(self) -> dict[str, Any]:
        """Percentiles in milliseconds. `gap`: between two tokens of one answer; `e2e`: sending to last token."""
        first = [job.first_token for job in self.done]
        gaps = [gap for job in self.done for gap in job.gaps]
        whole = [job.arrivals[-1] - job.sent for job in self.done]
        figures: dict[str, Any] = {"requests": len(self.jobs), "failed": len(self.jobs) - len(self.done)}
        for name, values in (("first_token", first), ("gap", gaps), ("e2e", whole)):
            for percent in (50, 95, 99):
                figures[f"{name}_p{percent}_ms"] = round(percentile(values, percent) * 1e3, 2)
        return figures


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between ranks; 0 for no values."""
    return float(np.percentile(values, percent)) if values else 0.0


def drive(target: Target, jobs: Sequence[Job]) -> Timings:
    """Send every job at its time and wait for all answers. A job that fails is part of the result."""
    return asyncio.run(_drive(target, jobs))


async def _drive(target: Target, jobs: Sequence[Job]) -> Timings:
    begin = time.perf_counter()

    async def one(job: Job) -> Timing:
        await asyncio.sleep(max(0.0, job.at - (time.perf_counter() - begin)))
        timing = Timing(job.at)  # when it was due: a late sender is part of the latency
        try:
            async for count in target.generate(job):
                timing.arrivals += [time.perf_counter() - begin] * count
        except EngineError as error:
            timing.error = str(error)
        return timing

    return Timings(await asyncio.gather(*map(one, jobs)))


def must_succeed(timings: Timings) -> Timings:
    """Raise `EngineError` with the first failure, if there is one."""
    for job in timings.jobs:
        if job.error is not None:
            raise EngineError(job.error)
    return timings
