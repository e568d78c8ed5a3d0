"""Tensor parallel over local processes: rank 0 is the engine's own thread, each other rank a child process.

Schedules travel as msgpack over a private socket; tokens need not travel back, for every rank samples the same ones.
All ranks live and die together: children send a sign of life twice a second, and when one is gone or silent the
engine's process ends with a sentence that says so (its clients learn of it at once, see `EngineClient`).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import zmq
from msgspec import Struct

from pagoda.config import EngineConfig
from pagoda.engine.runner import Runner, pick_device
from pagoda.engine.schedule import Schedule, StepResult
from pagoda.layers.parallel import Group
from pagoda.log import get_logger, setup_logging
from pagoda.models.loader import resolve_spec
from pagoda.models.spec import ModelSpec

HEARTBEAT_SECONDS = 0.5
SILENCE_SECONDS = 5.0

log = get_logger(__name__)


class RankStep(Struct):
    """One step for the other ranks. `mask`: the packed grammar bitmasks, row by row."""

    schedule: Schedule
    mask: bytes | None = None
    mask_width: int = 0


class LocalRanks:
    """All ranks of one machine, behind the face of `Workers`."""

    def __init__(
        self, folder: Path, spec: ModelSpec, config: EngineConfig, progress: Callable[[float], None] | None = None
    ):
        device = pick_device(config)
        self._folder = Path(tempfile.mkdtemp(prefix="pagoda-ranks-"))
        self._context = zmq.Context()
        self._steps = self._context.socket(zmq.PUB)
        self._steps.linger = 0
        self._steps.sndhwm = 0
        self._steps.bind(f"ipc://{self._folder}/steps")
        meeting = f"tcp://127.0.0.1:{free_port()}"
        self._children = [self._spawn(rank, folder, config, meeting) for rank in range(1, config.tp)]
        self._closing = False
        self._seen = dict.fromkeys(range(1, config.tp), time.monotonic() + 600.0)  # loading may take its time
        self._watch = threading.Thread(target=self._watch_children, name="pagoda-ranks", daemon=True)
        self._watch.start()
        self._runner = Runner(folder, spec, config, Group.join(0, config.tp, meeting, device), progress)
        self._runner.start()
        self.plan = self._runner.plan
        self.run_ahead = 1 if device.type == "cuda" else 0

    def launch(self, schedule: Schedule, mask_LW: np.ndarray | None = None) -> None:
        mask = None if mask_LW is None else mask_LW.tobytes()
        self._steps.send(msgspec.msgpack.encode(RankStep(schedule, mask, 0 if mask_LW is None else mask_LW.shape[1])))
        self._runner.launch(schedule, mask_LW)

    def collect(self) -> StepResult:
        return self._runner.collect()

    def describe(self) -> list[str]:
        return [f"{len(self._children) + 1} ranks: {self._runner.executor.describe()}", *self.plan.lines()]

    def close(self) -> None:
        """End all ranks; waits for them at most ten seconds, then kills."""
        self._closing = True
        self._runner.close()
        for child in self._children:
            child.terminate()
        for child in self._children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._watch.join()
        self._steps.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, rank: int, folder: Path, config: EngineConfig, meeting: str) -> subprocess.Popen[bytes]:
        job = {
            "rank": rank,
            "model": str(folder),
            "config": {name: getattr(config, name) for name in config.__dataclass_fields__},
            "meeting": meeting,
            "folder": str(self._folder),
        }
        child = subprocess.Popen([sys.executable, "-m", "pagoda.engine.ranks"], stdin=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.write(json.dumps(job).encode())
        child.stdin.close()
        return child

    def _watch_children(self) -> None:
        """Runs in a thread of its own, because rank 0 may be waiting for the very rank that is gone."""
        beats = self._context.socket(zmq.PULL)
        beats.bind(f"ipc://{self._folder}/beats")
        while not self._closing:
            if beats.poll(100):
                self._seen[int(beats.recv())] = time.monotonic()
            for rank, child in enumerate(self._children, 1):
                code, silent = child.poll(), time.monotonic() - self._seen[rank]
                if (code is not None or silent > SILENCE_SECONDS) and not self._closing:
                    why = f"ended with code {code}" if code is not None else f"gave no sign of life for {silent:.0f} s"
                    self._die(f"Rank {rank} {why}: all ranks of this engine end with it.")
        beats.close()

    def _die(self, sentence: str) -> None:
        log.error(sentence)
        for child in self._children:
            child.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Entry of a child: load this rank's part, then run every schedule that arrives until the parent is gone."""
    setup_logging()
    job = json.loads(sys.stdin.buffer.read())
    parent, rank, config = os.getppid(), job["rank"], EngineConfig.from_mapping(job["config"])
    context = zmq.Context()
    steps = context.socket(zmq.SUB)
    steps.rcvhwm = 0
    steps.subscribe(b"")
    steps.connect(f"ipc://{job['folder']}/steps")
    folder = Path(job["model"])
    spec, config = resolve_spec(folder, config)
    group = Group.join(rank, config.tp, job["meeting"], pick_device(config, rank))
    runner = Runner(folder, spec, config, group)
    runner.start()
    threading.Thread(target=_beat, args=(context, job["folder"], rank), daemon=True).start()
    decode = msgspec.msgpack.Decoder(RankStep).decode
    while os.getppid() == parent:
        if steps.poll(500):
            step = decode(steps.recv())
            mask = None
            if step.mask is not None:
                mask = np.frombuffer(step.mask, np.int32).reshape(-1, step.mask_width).copy()
            runner.launch(step.schedule, mask)
            runner.collect()
    os._exit(0)


def _beat(context: zmq.Context, folder: str, rank: int) -> None:
    beats = context.socket(zmq.PUSH)
    beats.linger = 0
    beats.connect(f"ipc://{folder}/beats")
    while True:
        beats.send(str(rank).encode())
        time.sleep(HEARTBEAT_SECONDS)


if __name__ == "__main__":
    main()
