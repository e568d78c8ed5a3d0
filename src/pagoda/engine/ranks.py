"""Tensor parallel over local processes: rank 0 is the engine's own thread, each other rank a child process.

Tokens need not travel back from the children, for every rank samples the same ones. All ranks live and die together:
when one is gone, silent or failed, the others are killed and the engine ends with a sentence that says so. A child
that finds rank 0 gone or stopped ends it, and itself.
"""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.config import EngineConfig
from pagoda.engine import rank_link as say
from pagoda.engine.rank_link import LifeLine, Link
from pagoda.engine.runner import Runner, pick_device
from pagoda.engine.schedule import Schedule, StepResult
from pagoda.errors import EngineDeadError, PagodaError, UsageError, named_error
from pagoda.kernels.cpu.threads import default_threads
from pagoda.layers.parallel import Group
from pagoda.log import get_logger, setup_logging
from pagoda.models.loader import resolve_spec
from pagoda.models.spec import ModelSpec

GRACE_SECONDS = 2.0  # for the engine to end by itself once a rank is lost
CLOSE_SECONDS = 10.0
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # on one machine: nothing listens beyond it

log = get_logger(__name__)


def divided(spec: ModelSpec, config: EngineConfig) -> EngineConfig:
    """The configuration of each rank: CPU threads are shared out. `UsageError` for more ranks than query heads."""
    if config.tp > spec.num_heads:
        raise UsageError(f"tp {config.tp} is more than the model's {spec.num_heads} attention heads: lower --tp.")
    return config.replace(num_threads=max(1, (config.num_threads or default_threads()) // config.tp))


class LocalRanks:
    """All ranks of one machine, behind the face of `Workers`. Lives in an engine process: when that cannot end by
    itself after a rank was lost, `last_words` is called with the error and the process exits. The ranks meet in a
    folder in `place`. They remove it, unless all are killed at once: so `place` is one that the client removes."""

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        config: EngineConfig,
        progress: Callable[[float], None] | None = None,
        last_words: Callable[[PagodaError], None] | None = None,
        place: Path | None = None,
    ):
        device, config = pick_device(config), divided(spec, config)
        self._last_words = last_words or (lambda _: None)
        self._folder = Path(tempfile.mkdtemp(prefix="pagoda-ranks-", dir=place))
        self._fate: PagodaError | None = None
        self._fate_known, self._closing, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._waiting = set(range(1, config.tp))
        self._all_loaded = threading.Event()
        os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ and sys.platform == "linux"})
        meeting = f"file://{self._folder}/meeting"
        self._children, self._steps, self._lives = [], [], []
        for rank in range(1, config.tp):
            self._spawn(say.Job(rank, str(folder), vars(config), meeting))
        self._watch = threading.Thread(target=self._watch_ranks, name="pagoda-ranks", daemon=True)
        self._watch.start()
        self._runner: Runner | None = None
        try:
            self._group = Group.join(0, config.tp, meeting, device)
            self._runner = Runner(folder, spec, config, self._group, progress)
            self._runner.start()
            while not self._all_loaded.wait(0.1):
                if self._fate is not None:
                    raise self._fate
            for life in self._lives:
                life.promise(say.PATIENCE_RUNNING)
        except Exception as error:
            cause = self._explain(error)
            self.close()
            raise cause from error
        self.plan, self.run_ahead = self._runner.plan, self._runner.run_ahead

    def launch(self, schedule: Schedule, mask_LW: np.ndarray | None = None) -> None:
        step = say.Step.of(schedule, mask_LW)
        assert self._runner is not None
        try:
            for link in self._steps:
                link.send(step)
            self._runner.launch(schedule, mask_LW)
        except Exception as error:
            raise self._explain(error) from error

    def collect(self) -> StepResult:
        assert self._runner is not None
        try:
            return self._runner.collect()
        except Exception as error:
            raise self._explain(error) from error

    def describe(self) -> list[str]:
        assert self._runner is not None
        runs, *plan = self._runner.describe()
        return [f"{len(self._children) + 1} ranks: {runs}", self._group.describe(), *plan]

    def close(self) -> None:
        """End all ranks; waits for them at most ten seconds, then kills. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        for link in self._steps:
            link.close()
        if self._fate is None and self._runner is not None:
            self._runner.close()
            self._group.close()
        deadline = time.monotonic() + (CLOSE_SECONDS if self._fate is None else 0.0)
        for child in self._children:
            try:
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._closed.set()
        self._watch.join()
        for life in self._lives:
            life.link.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, job: say.Job) -> None:
        steps, their_steps = socket.socketpair()
        life, their_life = socket.socketpair()
        with their_steps, their_life:
            ends = (their_steps.fileno(), their_life.fileno())
            command = [sys.executable, "-m", "pagoda.engine.ranks", *map(str, ends)]
            self._children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=ends))
        self._steps.append(Link(steps))
        self._lives.append(LifeLine(Link(life)))
        self._steps[-1].send(job)

    def _watch_ranks(self) -> None:
        """Until all is closed; past a deadline the process ends from here."""
        deadline = None
        while not self._closed.is_set():
            sockets = [life.link.socket for life in self._lives] if self._fate is None else []
            select.select(sockets, [], [], 0.1)
            if self._fate is None:
                self._listen()
            if deadline is None and self._closing.is_set():
                deadline = time.monotonic() + 2 * CLOSE_SECONDS
            if deadline is None and self._fate is not None:
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self._die()

    def _listen(self) -> None:
        for rank, life in enumerate(self._lives, 1):
            try:
                for message in life.tick():
                    if isinstance(message, say.Failed):
                        self._lose(rank, message.message, message.kind)
                    elif isinstance(message, say.Loaded):
                        self._waiting.discard(rank)
            except (EOFError, TimeoutError) as error:
                why = str(error)
                if isinstance(error, EOFError):
                    why = f"ended unexpectedly ({_how(self._children[rank - 1])})"
                self._lose(rank, why)
        if not self._waiting:
            self._all_loaded.set()

    def _lose(self, rank: int, why: str, kind: str = "EngineDeadError") -> None:
        """Fix the engine's fate and kill the other ranks, so that whoever waits for them wakes up."""
        if self._closing.is_set() or self._fate is not None:
            return
        error = named_error(kind, why)
        if not isinstance(error, UsageError):
            error = EngineDeadError(f"Rank {rank} of {len(self._children) + 1} {why}: all ranks end with it.")
        log.error(str(error))
        for child in self._children:
            child.kill()
        self._fate = error
        self._fate_known.set()

    def _explain(self, error: Exception) -> Exception:
        """What went wrong here is often only the echo of a rank that was lost."""
        self._fate_known.wait(GRACE_SECONDS / 2)
        return self._fate or error

    def _die(self) -> None:
        if self._fate is not None:
            self._last_words(self._fate)
        for child in self._children:
            child.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)


def _how(child: "subprocess.Popen[bytes]") -> str:
    try:
        code = child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return "it hung up"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class RankProcess:
    """A child: loads its part, then runs every step that arrives until rank 0 hangs up."""

    def __init__(self, steps: Link, life: LifeLine):
        self._steps, self._life, self._parent = steps, life, os.getppid()
        job = steps.receive()
        assert isinstance(job, say.Job)
        self._job = job
        threading.Thread(target=self._live, name="pagoda-life", daemon=True).start()

    def run(self) -> None:
        job, config = self._job, EngineConfig.from_mapping(self._job.config)
        folder = Path(job.model)
        spec, config = resolve_spec(folder, config)
        group = Group.join(job.rank, config.tp, job.meeting, pick_device(config, job.rank))
        runner = Runner(folder, spec, config, group)
        runner.start()
        self._life.promise(say.PATIENCE_RUNNING)
        self._life.link.send(say.Loaded())
        flights: deque[Schedule] = deque()
        try:
            while True:
                step = self._steps.receive()
                assert isinstance(step, say.Step)
                runner.launch(step.schedule, step.mask_LW())
                flights.append(step.schedule)
                if len(flights) > runner.run_ahead:
                    flights.popleft()
                    runner.collect()
        except EOFError:
            runner.close()
            group.close()

    def fail(self, error: Exception) -> None:
        log.exception("rank %d failed", self._job.rank)
        words = str(error) if isinstance(error, PagodaError) else f"failed ({type(error).__name__}: {error})"
        self._life.link.send(say.Failed(type(error).__name__, words))

    def _live(self) -> None:
        """Signs of life until rank 0 is gone; a stopped rank 0 is killed, for its clients wait."""
        try:
            while True:
                self._life.tick(say.BEAT_SECONDS / 2)
        except TimeoutError:
            log.error("rank 0 gives no sign of life: all ranks end")
            if os.getppid() == self._parent:
                os.kill(self._parent, signal.SIGKILL)
        except EOFError:
            pass
        shutil.rmtree(Path(self._job.meeting.removeprefix("file://")).parent, ignore_errors=True)
        os._exit(1)


def main(arguments: list[str]) -> Any:
    """Entry of a child; arguments: the file descriptors of its two sockets."""
    setup_logging()
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when all end
        signal.signal(number, signal.SIG_IGN)
    steps, life = (Link(socket.socket(fileno=int(fd))) for fd in arguments)
    try:
        process = RankProcess(steps, LifeLine(life))
    except EOFError:
        os._exit(1)
    try:
        process.run()
    except Exception as error:
        process.fail(error)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
