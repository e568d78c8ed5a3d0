"""`pagoda serve` as processes: the literal command line, the engine's death, draining."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

LINE = "serve api_server mini --server_name 127.0.0.1 --server_port 0 --instance_num 8 --tp 1 --session_len 1024"


def children(pid: int, module: str) -> list[int]:
    """Process ids of a process's children that run `python -m module`."""
    pids = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [p for p in pids if module.encode() in Path(f"/proc/{p}/cmdline").read_bytes()]


class Server:
    def __init__(self, *flags: str):
        command = [sys.executable, "-m", "pagoda.cli.main", *LINE.split(), "--num_threads", "1", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.report = ""
        while not (found := re.search(r"serving at (\S+)", self.report)):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.report += line
        self.http = httpx.Client(base_url=found[1], timeout=30)
        self.until("ready", 200)

    def until(self, route: str, status: int, seconds: float = 30.0) -> float:
        """Seconds until a route answers with a status."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get(f"/{route}").status_code == status:
                    return time.monotonic() - started
        raise AssertionError(f"/{route} did not become {status} within {seconds} s")

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def start() -> Iterator[type[Server]]:
    started: list[Server] = []

    def make(*flags: str) -> Server:
        started.append(Server(*flags))
        return started[-1]

    yield make  # type: ignore[misc]
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


LONG = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True, "n": 8}


def test_a_dead_engine_is_told_and_replaced_and_sigterm_drains(start) -> None:
    server = start("--num_http_workers", "2")
    assert re.search(r"KV cache .* tokens", server.report)
    engine = children(server.process.pid, "pagoda.engine.process")[0]
    assert len(children(server.process.pid, "pagoda.serve.worker")) == 2
    with server.http.stream("POST", "/v1/completions", json=LONG) as answer:
        news = answer.iter_lines()
        next(news)
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        events = [line[6:] for line in news if line.startswith("data: ")]
        assert time.monotonic() - killed < 1.0
    assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["type"] == "unavailable_error"
    server.http.close()
    server.http = httpx.Client(base_url=server.http.base_url, timeout=30)
    assert server.until("health", 503, 1.0) < 1.0
    server.until("ready", 200)
    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    again = children(server.process.pid, "pagoda.engine.process")
    assert again and again != [engine]
    workers = children(server.process.pid, "pagoda.serve.worker")
    with server.http.stream("POST", "/v1/completions", json=LONG) as answer:
        news = answer.iter_lines()
        next(news)
        server.process.send_signal(signal.SIGTERM)
        events = [json.loads(line[6:]) for line in news if line.startswith("data: {")]
    ends = [c["choices"][0]["finish_reason"] for c in events if c["choices"][0]["finish_reason"]]
    assert ends == ["length"] * 8
    assert server.process.wait(timeout=20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in [*again, *workers])


@pytest.mark.slow
def test_the_drain_has_a_limit(start) -> None:
    server = start("--drain_seconds", "0")
    with server.http.stream("POST", "/v1/completions", json=LONG) as answer:
        news = answer.iter_lines()
        next(news)
        server.process.send_signal(signal.SIGTERM)
        events = [json.loads(line[6:]) for line in news if line.startswith("data: {")]
    assert "abort" in [c["choices"][0]["finish_reason"] for c in events]
    started = time.monotonic()
    server.process.wait(timeout=20)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("words", "about"),
    [
        ("serve /nowhere/model", "does not exist"),
        ("serve mini --server-port 99999", "0 to 65535"),
        ("serve mini --server-prot 1", "--server-prot"),
        ("serve mini --server-port 0 --api-keys @/nowhere", "cannot be read"),
        ("serve mini --server-port 0 --ssl-certfile x", "both"),
    ],
)
def test_mistakes_are_one_sentence(words: str, about: str) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "pagoda.cli.main", *words.split()], capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 2 and about in made.stderr and made.stderr.count("\n") == 1
