"""Pagoda against llama.cpp on a CPU: same shapes, random weights, same threads, interleaved rounds.

    python benchmarks/cpu.py --shape qwen2.5-0.5b --format int4 --peer /path/to/python-with-llama-cpp-python

Prints one JSON line a workload: medians of both, their ratio and the range over the rounds. Workloads: decode of 1, 4,
8 and 16 streams (prompts of 16 tokens) and prefill of 512 tokens. Pagoda's figures go through the whole engine
(scheduler, runner, sampler; greedy), llama.cpp's are the bare model step. `--peer` may be left out. With `--tokenizer`
(any folder with a tokenizer.json) decode is measured through `pagoda serve` too, in turns with the engine alone.

    python benchmarks/cpu.py --speculate 6

measures prompt-lookup speculation instead: the bundled model repeats a text, guessing so many tokens a step, in turns
with an engine that guesses nothing (as engines are unless told).

    python benchmarks/cpu.py --start --shape qwen2.5-0.5b --format int4

measures how many seconds an engine needs from its construction until it is ready: on a workspace that was packed for
CPUs, in turns with one that was not, both in the page cache.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from pagoda.config import EngineConfig
from pagoda.engine.client import EngineClient, start_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.kernels.cpu.threads import default_threads
from pagoda.models.convert import write_workspace
from pagoda.models.find import resolve_model
from pagoda.text.tokenizer import load_tokenizer

HERE = Path(__file__).parent
Ask = Callable[..., float]  # (what, its arguments) -> tokens a second
WORKLOADS = {  # name -> (what, its arguments)
    "decode 1": ("decode", 1, 48), "decode 4": ("decode", 4, 48), "decode 8": ("decode", 8, 48),
    "decode 16": ("decode", 16, 48), "prefill 512": ("prefill", 512),
}  # fmt: skip
TOLD = (
    "Tom has a red ball. The ball is in the box. Ann takes the ball out of the box and gives it to Tom. Tom is happy. "
)
QUOTING = f"<|im_start|>user\nRepeat this text: {TOLD}<|im_end|>\n<|im_start|>assistant\n{TOLD * 2}"


def rate_together(times: list[list[float]]) -> float:
    """Tokens a second while all streams run: from the first token of the last to start to the last of the first to end.
    `times`: when each stream's tokens came."""
    begin, end = max(at[0] for at in times), min(at[-1] for at in times)
    return sum(begin < t <= end for at in times for t in at) / (end - begin)


class Ours:
    """The engine in this process; the same two questions as llama_peer.py answers."""

    def __init__(self, engine: EngineClient):
        self.engine, self.rng, self.count = engine, random.Random(0), 0

    def _ask(self, jobs: list[tuple[int, int]]) -> list[list[float]]:
        """(prompt length, new tokens) of each request -> arrival times of its tokens since all were sent."""
        return asyncio.run(self._gather(jobs))

    async def _gather(self, jobs: list[tuple[int, int]]) -> list[list[float]]:
        started = time.perf_counter()

        async def one(prompt: int, new: int) -> list[float]:
            self.count += 1
            ids = [self.rng.randint(3, 10000) for _ in range(prompt)]
            params = SamplingParams(temperature=0.0, max_tokens=new)
            ticket = self.engine.submit(EngineRequest(f"b{self.count}", ids, params, arrival=time.monotonic()))
            return [time.perf_counter() - started async for output in ticket for _ in output.token_ids]

        return await asyncio.gather(*(one(*job) for job in jobs))

    def ask(self, what: str, *numbers: int) -> float:
        return {"decode": self.decode, "prefill": self.prefill}[what](*numbers)

    def decode(self, batch: int, tokens: int) -> float:
        """Tokens a second of all streams together."""
        return rate_together(self._ask([(16, tokens + 1)] * batch))

    def prefill(self, tokens: int) -> float:
        [[first]] = self._ask([(tokens, 1)])
        return tokens / first


class Peer:
    """llama.cpp in a process of its own, idle between questions."""

    def __init__(self, python: str, shape: str, form: str, threads: int, folder: Path):
        command = [python, HERE / "llama_peer.py", HERE / "shapes" / shape / "config.json", form]
        command += [folder / f"{shape}-{form}.gguf", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = self._line()

    def _line(self) -> str:
        line = self.process.stdout.readline().strip() if self.process.stdout else ""
        assert line, "the peer's process ended"
        return line

    def ask(self, what: str, *numbers: int) -> float:
        assert self.process.stdin is not None
        print(what, *numbers, file=self.process.stdin, flush=True)
        return float(self._line())


class Served:
    """`pagoda serve` in a process of its own, with the same engine; asked over HTTP, token ids in, text out."""

    def __init__(self, shape: str, tokenizer: Path, config: EngineConfig, folder: Path):
        model = folder / f"{shape}-served"
        shutil.copytree(tokenizer, model, dirs_exist_ok=True)
        shutil.copy(HERE / "shapes" / shape / "config.json", model)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
        flags = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "pagoda.cli.main", "serve", model, "--server-port", str(port)]
        command += ["--log-level", "warning", *flags]
        self.process = subprocess.Popen(command)
        self.rng, self.port = random.Random(0), port
        while not self._ready(port):
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.2)

    def _ready(self, port: int) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).status == 200
        except OSError:
            return False

    def ask(self, what: str, batch: int, tokens: int) -> float:
        """Looks every 10 ms what came: a client that is woken for each chunk takes from the server's cores what is to
        be measured."""
        assert what == "decode"
        ends = [self._post([self.rng.randint(3, 10000) for _ in range(16)], tokens + 1) for _ in range(batch)]
        times: list[list[float]] = [[] for _ in ends]
        rest = [b""] * batch
        while any(len(at) <= tokens for at in times):
            time.sleep(0.01)
            for i, (end, at) in enumerate(zip(ends, times, strict=True)):
                with contextlib.suppress(BlockingIOError):
                    came = end.recv(1 << 16)
                    assert came or len(at) > tokens, f"the server broke off: {rest[i]!r}"
                    data = rest[i] + came
                    counts = re.findall(rb'"completion_tokens":(\d+),', data)
                    at += [time.perf_counter()] * (int(counts[-1]) - len(at) if counts else 0)
                    rest[i] = data[-50:]  # a count may be cut
        for end in ends:
            end.close()
        return rate_together(times)

    def _post(self, prompt: list[int], tokens: int) -> socket.socket:
        fields = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        counted = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        body = json.dumps(fields | counted).encode()
        end = socket.create_connection(("127.0.0.1", self.port))
        head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        end.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        end.setblocking(False)
        return end


def measure(ask: Ask, other: Ask | None, rounds: int, *work: object) -> tuple[list[float], list[float]]:
    """`rounds` answers of each, one after the other, after one of each that is not counted."""
    ours, theirs = [], []
    for _ in range(rounds + 1):
        theirs.append(other(*work) if other else 0.0)
        ours.append(ask(*work))
    return ours[1:], theirs[1:]


def say(
    name: str, mine: list[float], theirs: list[float], beside: str | None, facts: dict[str, object], unit: str = "tok/s"
) -> None:
    """One JSON line. `beside`: what `theirs` is, None where there is no other."""
    line = {"workload": name, "value": statistics.median(mine), "unit": unit, "range": [min(mine), max(mine)]}
    if beside:
        line |= {beside: statistics.median(theirs), f"{beside}_range": [min(theirs), max(theirs)]}
        line["ratio"] = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    line |= facts | {"load": os.getloadavg()[0]}
    rounded = {k: [round(x, 2) for x in v] if isinstance(v, list) else v for k, v in line.items()}
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in rounded.items()}), flush=True)


def speculate(guesses: int, threads: int, rounds: int) -> None:
    """One JSON line: the bundled model goes on with QUOTING, guessing against not; both must say the same."""
    prompt = load_tokenizer(resolve_model("mini")).encode(QUOTING)
    said: list[list[int]] = []

    def ask(engine: EngineClient, tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        request = EngineRequest(f"s{len(said)}", prompt, params, arrival=time.monotonic())
        times = [(time.perf_counter(), output.token_ids) for output in engine.submit(request)]
        said.append([token for _, ids in times for token in ids])
        assert said[-1] == said[0], "guesses changed the output"
        return (len(said[-1]) - len(times[0][1])) / (times[-1][0] - times[0][0])

    config = EngineConfig(device="cpu", num_threads=threads, max_batch_size=1)
    told = config.replace(speculative_ngram=guesses)
    with start_engine("mini", config) as plain, start_engine("mini", told) as guessing:
        mine, theirs = measure(lambda n: ask(guessing, n), lambda n: ask(plain, n), rounds, 150)
        counted = guessing.stats().counters
    accepted = counted.accepted_tokens / counted.guessed_tokens
    say("repeat a text", mine, theirs, "plain", {"guesses": guesses, "threads": threads, "accepted": accepted})


def start(shape: str, form: str, threads: int, rounds: int, facts: dict[str, object]) -> None:
    """One JSON line: seconds to ready of a packed workspace, beside one that is not."""
    dummy = EngineConfig(load_format="dummy", weight_format="auto" if form == "bf16" else form)
    config = EngineConfig(device="cpu", session_len=2048, num_threads=threads)

    def ask(workspace: Path) -> float:
        begun = time.perf_counter()
        with start_engine(workspace, config):
            return time.perf_counter() - begun

    with tempfile.TemporaryDirectory() as folder:
        plain = write_workspace(HERE / "shapes" / shape, Path(folder) / "plain", dummy)
        packed = write_workspace(HERE / "shapes" / shape, Path(folder) / "packed", dummy.replace(device="cpu"))
        mine, theirs = measure(lambda: ask(packed), lambda: ask(plain), rounds)
    say("start", mine, theirs, "plain", facts, unit="s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("qwen2.5-0.5b", "tinyllama-1.1b"), default="qwen2.5-0.5b")
    parser.add_argument("--format", choices=("bf16", "int8", "int4"), default="bf16")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--peer", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json: measure decode over HTTP too")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()), help="folder for GGUF files")
    parser.add_argument("--speculate", type=int, metavar="K", help="measure speculation with K guesses a step instead")
    parser.add_argument("--start", action="store_true", help="measure start-up instead")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    facts = {"shape": args.shape, "format": args.format, "threads": args.threads, "commit": commit.strip()}
    if args.speculate:
        return speculate(args.speculate, args.threads, args.rounds)
    if args.start:
        return start(args.shape, args.format, args.threads, args.rounds, facts)
    peer = Peer(args.peer, args.shape, args.format, args.threads, args.models) if args.peer else None
    config = EngineConfig(
        device="cpu", dtype="bfloat16", load_format="dummy", session_len=2048, max_batch_size=16,
        weight_format="auto" if args.format == "bf16" else args.format, num_threads=args.threads,
        max_prefill_token_num=512, enable_prefix_caching=False,
    )  # fmt: skip
    served = Served(args.shape, args.tokenizer, config, args.models) if args.tokenizer else None
    try:
        with start_engine(HERE / "shapes" / args.shape, config) as engine:
            print("\n".join(engine.info.report), flush=True)
            ours = Ours(engine)
            for name in args.workloads.split(","):
                work = WORKLOADS[name]
                say(name, *measure(ours.ask, peer and peer.ask, args.rounds, *work), peer and "peer", facts)
                if served and work[0] == "decode":
                    say(f"{name} over HTTP", *measure(served.ask, ours.ask, args.rounds, *work), "engine", facts)
    finally:
        if served:
            served.process.terminate()
            served.process.wait()


if __name__ == "__main__":
    main()
