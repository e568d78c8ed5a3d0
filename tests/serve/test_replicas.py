"""`pagoda serve --replicas 2` with two models, from outside: over HTTP, by process ids."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pagoda

MARK = f"PAGODA_TEST_RUN={os.getpid()}-{time.time_ns()}"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


class Server:
    def __init__(self, folder: Path, address: str, *models: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        flags = "--replicas 2 --device cpu --max-batch-size 4 --num-threads 1 --session-len 512 --drain-seconds 5"
        more = ["--more-models", *models[1:]] if models[1:] else []
        command = [sys.executable, "-m", "pagoda.cli.main", "serve", models[0], *flags.split(), *more]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            environment = {**os.environ, "RAY_ADDRESS": address}
            self.process = subprocess.Popen(
                [*command, "--server-port", str(self.port)], stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while not self.log.read_text().count("\nserving "):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None, raw: bool = False) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return text.decode() if raw else json.loads(text)

    def chat(self, said: str, model: str = "mini", **more: Any) -> Any:
        messages = [{"role": "user", "content": said}]
        return self.ask("/v1/chat/completions", {"model": model, "messages": messages, "temperature": 0, **more})


def named(start: str) -> list[int]:
    """Process ids of this test's cluster by the beginning of their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = MARK.encode() in (folder / "environ").read_bytes()
            if ours and (folder / "cmdline").read_bytes().startswith(start.encode()):
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ.update([MARK.split("=")])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6, "include_dashboard": False})
    folder = tmp_path_factory.mktemp("replicas")
    shutil.copytree(Path(pagoda.__file__).parent / "mini", folder / "second")
    made = Server(folder, cluster.address, "mini", str(folder / "second"))
    yield made
    made.process.send_signal(signal.SIGTERM)
    assert made.process.wait(60) == 0
    deadline = time.monotonic() + 20
    while named("ray::ServeReplica:pagoda") or named(f"{sys.executable}\0-m\0pagoda.engine.process"):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.1)
    cluster.shutdown()
    del os.environ[MARK.split("=")[0]]


def test_models_share_the_address(server: Server) -> None:
    assert [m["id"] for m in server.ask("/v1/models")["data"]] == ["mini", "second"]
    for name in ("mini", "second"):
        answer = server.chat("12+35", name)
        assert answer["model"] == name and "47" in answer["choices"][0]["message"]["content"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.chat("hello", "third")
    assert refused.value.code == 404
    assert server.ask("/health")["status"] == "ok"


def test_prefixes_and_sessions_find_their_replica(server: Server) -> None:
    long = "Remember these words: " + " ".join(f"word{n}" for n in range(60)) + ". hello"
    server.chat(long, max_tokens=1)
    again = [server.chat(long + "!" * n, max_tokens=1)["usage"] for n in range(1, 7)]
    assert all(u["prompt_tokens_details"]["cached_tokens"] >= 64 for u in again), again
    for session, name in enumerate(("Ada", "Bob", "Eve", "Tom")):
        for said in (f"my name is {name}", "what is my name?"):
            body = {"prompt": said, "session_id": session, "interactive_mode": True, "temperature": 0.01}
            answer = server.ask("/v1/chat/interactive", body)
        assert answer["history_tokens"] > 0, answer


def test_what_concerns_all_replicas_reaches_all(server: Server) -> None:
    """Sessions are listed, forgotten and aborted, and counters told, wherever they are."""
    for session in range(100, 108):
        server.ask("/v1/chat/interactive", {"prompt": f"{session}", "session_id": session, "interactive_mode": True})
    listed = {s["id"] for s in server.ask("/v1/sessions")["data"]}
    assert {str(session) for session in range(100, 108)} <= listed
    for session in range(100, 108):
        assert server.ask(f"/v1/sessions/{session}", method="DELETE")["deleted"]
    with pytest.raises(urllib.error.HTTPError) as gone:
        server.ask("/v1/sessions/100", method="DELETE")
    assert gone.value.code == 404
    page = server.ask("/metrics", raw=True)
    running = [line for line in page.splitlines() if line.startswith("pagoda:requests_running{")]
    assert len(running) == 4 == len(set(running)), "two replicas of two models"
    assert page.count("# TYPE pagoda:requests_running ") == 1
    ends: list[str] = []

    def write() -> None:
        ends.append(server.chat("Tell me a story.", max_tokens=400, ignore_eos=True)["choices"][0]["finish_reason"])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    aborted = 0
    while any(thread.is_alive() for thread in threads):
        aborted += server.ask("/abort", {"abort_all": True})["aborted"]
    assert ends == ["abort"] * 4 and aborted == 4


def test_more_than_all_replicas_hold_is_refused_at_once(server: Server) -> None:
    """4 run and 16 wait at each; nobody waits in Ray without a word."""
    ends: list[int] = []

    def write() -> None:
        try:
            server.chat("Tell me a story.", max_tokens=300, ignore_eos=True)
            ends.append(200)
        except urllib.error.HTTPError as refused:
            told = json.loads(refused.read())["error"]["code"]
            ends.append(refused.code if told == "overloaded" and refused.headers["retry-after"] else 0)

    threads = [threading.Thread(target=write) for _ in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    first = ends[: ends.count(503)]
    assert len(ends) == 80 and set(ends) == {200, 503} and ends.count(200) >= 40
    assert first.count(503) > len(first) / 2, "refusals come before the answers"


def test_a_killed_replica_costs_only_what_it_had_begun(server: Server) -> None:
    """Requests in flight there are asked again elsewhere, for nothing was sent yet; later ones never notice."""
    failures: list[str] = []
    answered: list[float] = []
    stop = threading.Event()

    def load(n: int) -> None:
        while not stop.is_set():
            try:
                text = server.chat(f"{n}+35")["choices"][0]["message"]["content"]
                assert str(n + 35) in text, text
                answered.append(time.monotonic())
            except (OSError, AssertionError) as error:
                failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=load, args=(n,)) for n in (11, 12, 13, 14)]
    for thread in threads:
        thread.start()

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 60
        while len(answered) < count:
            assert time.monotonic() < deadline, (len(answered), failures)
            time.sleep(0.02)

    wait_for(10)
    replicas = named("ray::ServeReplica:pagoda:replica-0")
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    wait_for(len(answered) + 40)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failures
    server.ask("/v1/chat/interactive", {"prompt": "hello", "session_id": 0, "interactive_mode": True})
    deadline = time.monotonic() + 60
    while len(alive := named("ray::ServeReplica:pagoda:replica-0")) < 2 or replicas[0] in alive:
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(0.2)
