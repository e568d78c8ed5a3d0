"""Ranks live and die together: whatever happens to one, every open request ends with a clear error within 10 s, no
process stays behind and no file."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.cli.main import main
from pagoda.config import EngineConfig
from pagoda.engine.client import EngineClient, start_engine
from pagoda.engine.request import EngineRequest, Output, SamplingParams
from pagoda.errors import CheckpointError, EngineDeadError
from pagoda.models.convert import write_workspace

CONFIG = EngineConfig(device="cpu", tp=3, max_batch_size=4, session_len=512, cache_block_seq_len=16)
LONG = SamplingParams(temperature=0.0, max_tokens=450)
DEADLINE = 10.0


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def wait_gone(pids: list[int], folders: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while any(state(p) not in ("gone", "Z") for p in pids) or list(folders.iterdir()):
        left = {p: state(p) for p in pids}, list(folders.iterdir())
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.02)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's processes put their temporary folders."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    return tmp_path / "t"


class Running:
    """An engine of three ranks in the middle of several requests."""

    def __init__(self, model: Path):
        self.engine: EngineClient = start_engine(model, CONFIG)
        self.pid = self.engine._transport.process.pid  # type: ignore[attr-defined]
        self.ranks = [self.pid, *children(self.pid)]
        assert len(self.ranks) == 3
        self.last: dict[str, Output] = {}
        self.ended: dict[str, float] = {}
        self._started = threading.Barrier(4)
        self._threads = [threading.Thread(target=self._ask, args=(f"r{i}",)) for i in range(3)]
        for thread in self._threads:
            thread.start()
        self._started.wait(30)

    def _ask(self, name: str) -> None:
        for n, output in enumerate(self.engine.submit(EngineRequest(name, [5, 6, 7], LONG))):
            if n == 2:
                self._started.wait(30)
            self.last[name] = output
        self.ended[name] = time.monotonic()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)


@pytest.fixture
def running(tiny_llama: Path, folders: Path) -> Iterator[Running]:
    made = Running(tiny_llama)
    yield made
    for pid in made.ranks:
        if state(pid) not in ("gone", "Z"):
            os.kill(pid, signal.SIGKILL)
    made.engine.close()


@pytest.mark.parametrize(
    ("victim", "number", "words"),
    [
        (1, signal.SIGKILL, "Rank 1 of 3 ended unexpectedly (signal SIGKILL)"),
        pytest.param(2, signal.SIGSTOP, "Rank 2 of 3 gave no sign of life", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, "ended unexpectedly", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, "ended unexpectedly", marks=pytest.mark.slow),
    ],
    ids=["kill-rank", "stop-rank", "kill-engine", "stop-engine"],
)
def test_a_lost_rank_ends_all(running: Running, folders: Path, victim: int, number: int, words: str) -> None:
    struck = time.monotonic()
    os.kill(running.ranks[victim], number)
    running.join()
    assert set(running.ended) == {"r0", "r1", "r2"}
    for name, at in running.ended.items():
        last = running.last[name]
        assert last.finish_reason == "error" and words in str(last.error), last
        assert at - struck < DEADLINE
    with pytest.raises(EngineDeadError, match=r"ended|sign of life"):
        running.engine.call("ping", timeout=DEADLINE)
    running.engine.close()
    wait_gone(running.ranks, folders)


@pytest.mark.slow
def test_ranks_that_are_killed_at_once_leave_no_file(running: Running, folders: Path) -> None:
    for rank in reversed(running.ranks):
        os.kill(rank, signal.SIGKILL)
    running.join()
    assert {last.finish_reason for last in running.last.values()} == {"error"}
    running.engine.close()
    wait_gone(running.ranks, folders)


@pytest.mark.slow
def test_an_idle_engine_ends_when_a_rank_is_killed(tiny_llama: Path, folders: Path) -> None:
    with start_engine(tiny_llama, CONFIG) as engine:
        pid = engine._transport.process.pid  # type: ignore[attr-defined]
        ranks = [pid, *children(pid)]
        os.kill(ranks[2], signal.SIGKILL)
        deadline = time.monotonic() + DEADLINE
        while engine.dead is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "Rank 2 of 3 ended unexpectedly (signal SIGKILL)" in str(engine.dead)
    wait_gone(ranks, folders)


@pytest.mark.slow
def test_closing_leaves_nothing_behind(tiny_llama: Path, folders: Path) -> None:
    engine = start_engine(tiny_llama, CONFIG)
    pid = engine._transport.process.pid  # type: ignore[attr-defined]
    ranks = [pid, *children(pid)]
    engine.close()
    wait_gone(ranks, folders)
    assert engine._transport.process.returncode == 0  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_killed_client_leaves_no_orphans(tiny_llama: Path, folders: Path) -> None:
    script = (
        "import sys; from pagoda.config import EngineConfig; from pagoda.engine.client import start_engine\n"
        f"e = start_engine({str(tiny_llama)!r}, EngineConfig(**{ {**vars(CONFIG), 'tp': 2}!r}))\n"
        "print(e._transport.process.pid, flush=True); sys.stdin.read()"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    ranks = [pid, *children(pid)]
    client.kill()
    client.wait()
    wait_gone(ranks, folders)


@pytest.mark.slow
def test_a_rank_that_cannot_load_is_heard(tiny_llama: Path, tmp_path: Path, folders: Path) -> None:
    workspace = write_workspace(tiny_llama, tmp_path / "workspace", EngineConfig(tp=2))
    shard = workspace / "weights" / "rank-1-of-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="rank-1-of-2"):
        start_engine(workspace, EngineConfig(device="cpu", max_batch_size=4))
    assert time.monotonic() - started < 30
    assert not list(folders.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "5", "--device", "cpu"], "tp 5 is more than the model's 4 attention heads"),
        (["--tp", "2", "--device", "cuda"], "CUDA device"),
    ],
)
def test_too_many_ranks_are_one_sentence(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    if flags[-1] == "cuda" and Path("/dev/nvidia1").exists():
        pytest.skip("two devices are here")
    assert main(["chat", "mini", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1
