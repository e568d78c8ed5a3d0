"""`pagoda serve` as processes: the literal command line, the engine's death, draining."""

import contextlib
import json
import os
import random
import re
import signal
import ssl
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest
from processes import Server, children

from pagoda.serve.http_process import Pulse


@pytest.fixture
def start() -> Iterator[type[Server]]:
    started: list[Server] = []

    def make(*flags: str, verify: bool = True) -> Server:
        started.append(Server(*flags, verify=verify))
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
    turn = {"prompt": "My name is Ada.", "interactive_mode": True, "request_output_len": 4}
    for session in (1, 2, 3):
        assert server.http.post("/v1/chat/interactive", json={**turn, "session_id": session}).status_code == 200
    assert server.http.delete("/v1/sessions/3").status_code == 200
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
    told = [server.http.post("/v1/chat/interactive", json={**turn, "session_id": i}) for i in (1, 1, 3)]
    assert [t.status_code for t in told] == [404, 200, 200] and told[0].json()["error"]["code"] == "session_expired"
    assert [t.json()["history_tokens"] for t in told[1:]] == [0, 0]
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


@pytest.mark.parametrize("again", [False, True])
def test_sigterm_while_the_engine_loads(again: bool) -> None:
    """Once, or again and again until it is over."""
    command = [sys.executable, "-m", "pagoda.cli.main", "serve", "mini", "--server-port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (engine := children(server.pid, "pagoda.engine.process")):
        assert server.poll() is None
    all_of_them = [*engine, *children(server.pid, "pagoda.serve.worker")]
    server.terminate()
    until = time.monotonic() + 15.0
    while server.poll() is None:
        assert time.monotonic() < until, "it does not end"
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.02)
        if again:
            server.terminate()
    assert server.returncode in ((0, 1) if again else (0,))
    assert len(all_of_them) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in all_of_them)


@pytest.mark.slow
def test_an_engine_that_stands_still_is_told(start) -> None:
    server = start()
    engine = children(server.process.pid, "pagoda.engine.process")[0]
    os.kill(engine, signal.SIGSTOP)
    try:
        assert server.until("health", 503, 8.0) < 7.0
    finally:
        os.kill(engine, signal.SIGCONT)
    server.until("health", 200, 8.0)
    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(start) -> None:
    server = start()
    endless = {**LONG, "max_tokens": 1000}
    with contextlib.suppress(httpx.TransportError), server.http.stream("POST", "/v1/completions", json=endless) as told:
        news = told.iter_lines()
        next(news)
        os.kill(children(server.process.pid, "pagoda.serve.worker")[0], signal.SIGKILL)
        list(news)
    server.until("ready", 200)
    until = time.monotonic() + 3.0
    while (gauges := gauges_of(server))["requests_running"] or gauges["kv_cache_usage"]:
        assert time.monotonic() < until, "its requests run on"
    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_a_worker_whose_event_loop_hangs_is_replaced(start) -> None:
    """Also one that hangs while a new engine is on its way."""
    server = start()
    for engine_dies in (False, True):
        worker = children(server.process.pid, "pagoda.serve.worker")[0]
        endless = {**LONG, "max_tokens": 1000}
        with (
            contextlib.suppress(httpx.TransportError),
            server.http.stream("POST", "/v1/completions", json=endless) as answer,
        ):
            news = answer.iter_lines()
            next(news)
            os.kill(worker, signal.SIGSTOP)
            if engine_dies:
                os.kill(children(server.process.pid, "pagoda.engine.process")[0], signal.SIGKILL)
            list(news)
        server.http.close()
        server.http = httpx.Client(base_url=server.http.base_url, timeout=30)
        server.until("ready", 200)
        assert worker not in children(server.process.pid, "pagoda.serve.worker")
        until = time.monotonic() + 3.0
        while gauges_of(server)["requests_running"]:
            assert time.monotonic() < until, "its requests run on"
    assert server.end()[0] == 0


def test_the_beats_of_a_worker() -> None:
    read, write = os.pipe()
    now = [0.0]
    pulse = Pulse(read, lambda: now[0])

    def after(*seconds: float) -> list[bool]:
        told = []
        for step in seconds:
            now[0] += step
            told.append(pulse.lost())
        return told

    assert after(*[1.0] * 100) == [False] * 100  # it starts
    os.write(write, b"..")
    assert after(*[1.0] * 11) == [False] * 11
    os.write(write, b".")
    assert after(1.0, 3600.0, 3600.0) == [False] * 3  # the machine slept
    assert after(*[1.0] * 7)[-1]
    os.close(write)
    os.close(read)


@pytest.mark.slow
def test_tls(start, tmp_path: Path) -> None:
    cert, secret = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-keyout",
            secret,
            "-out",
            cert,
            *names,
        ],
        check=True,
        capture_output=True,
    )
    server = start("--ssl-certfile", cert, "--ssl-keyfile", secret, verify=False)
    assert str(server.http.base_url).startswith("https://")
    with httpx.Client(base_url=server.http.base_url, verify=ssl.create_default_context(cafile=cert)) as strict:
        assert strict.get("/v1/models").status_code == 200


@pytest.mark.slow
def test_many_streams_a_third_of_which_leave_and_a_log_that_nobody_reads(start) -> None:
    """200 at once for PAGODA_LOAD_SECONDS (20): every stream ends properly, nothing is left behind, memory is flat;
    then the engine is killed under them: who listens is told, who waits is refused."""
    server = start("--max_batch_size", "64", "--session_len", "512", "--max_queued_requests", "512")
    worker = children(server.process.pid, "pagoda.serve.worker")[0]
    url, seconds = str(server.http.base_url), float(os.environ.get("PAGODA_LOAD_SECONDS", "20"))
    engine = children(server.process.pid, "pagoda.engine.process")[0]
    anyio.run(storm, url, 2.0)
    before = open_files(worker)
    sizes: dict[int, list[int]] = {server.process.pid: [], engine: [], worker: []}
    ends = anyio.run(storm, url, seconds, 0, sizes)
    print(dict(ends), report := growth(sizes))
    assert ends["done"] > 20 and ends["left"] > 5 and not ends["broken"], ends
    server.until("ready", 200)
    for _ in range(200):
        gauges = gauges_of(server)
        if gauges["requests_running"] == 0 and open_files(worker) <= before + 2:
            break
    assert gauges["requests_waiting"] == gauges["kv_cache_usage"] == gauges["sessions"] == 0
    assert open_files(worker) <= before + 2
    assert all(late < middle * 1.04 + 4 for _, middle, late in report), report
    ends = anyio.run(storm, url, 6.0, engine)
    assert ends["broken"] == 0 and ends["told"] > 10 and ends["told"] + ends["refused"] > 100, ends
    server.until("ready", 200)


def gauges_of(server: Server) -> dict[str, float]:
    found = re.findall(r"^pagoda:(\w+)\{.*\} ([\d.]+)$", server.http.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) << 10


def growth(sizes: dict[int, list[int]]) -> list[tuple[float, ...]]:
    """Median MiB of each process (supervisor, engine, HTTP) in each third of the time."""
    thirds = [[seen[i * len(seen) // 3 : (i + 1) * len(seen) // 3] for i in range(3)] for seen in sizes.values()]
    return [tuple(round(statistics.median(part) / 2**20, 1) for part in parts) for parts in thirds]


async def storm(url: str, seconds: float, kill: int = 0, sizes: dict[int, list[int]] | None = None) -> Counter[str]:
    """200 clients; counts how their streams ended. `kill`: a process to kill in the middle; `sizes`: processes whose
    memory is noted meanwhile."""
    ends: Counter[str] = Counter()
    until = time.monotonic() + seconds

    async def client(http: httpx.AsyncClient, rnd: random.Random) -> None:
        while time.monotonic() < until:
            leaves_at = rnd.randint(1, 40) if rnd.random() < 0.33 else 10**6
            tokens = 400 if kill else rnd.randint(1, 60)  # long enough to be open when the engine dies
            body = {"prompt": f"{rnd.random()}", "max_tokens": tokens, "ignore_eos": True, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code == 503:
                    ends["refused"] += 1
                    await anyio.sleep(0.2)
                    continue
                seen, error, last = 0, False, ""
                with contextlib.suppress(httpx.ReadTimeout):  # such a stream is broken
                    async for line in answer.aiter_lines():
                        seen, error, last = seen + bool(line), error or "error" in line, line or last
                        if seen >= leaves_at:
                            break
            how = "left" if seen >= leaves_at else "broken" if last != "data: [DONE]" else "told" if error else "done"
            ends[how] += 1

    async def look() -> None:
        while sizes and time.monotonic() < until:
            for pid, seen in sizes.items():
                seen.append(resident(pid))
            await anyio.sleep(seconds / 90)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=90, limits=limits) as http, anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(client, http, random.Random(number))
        group.start_soon(look)
        if kill:
            await anyio.sleep(seconds / 2)
            os.kill(kill, signal.SIGKILL)
    return ends
