"""How messages travel between a client and its engine: to a thread of this process, or over a socket to another."""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import zmq

from pagoda.config import EngineConfig
from pagoda.engine import wire
from pagoda.errors import PagodaError, named_error

LAST_WORDS = "last_words"  # the file in which a dying engine leaves its error


class Transport(Protocol):
    """How messages travel. `receive` waits up to `timeout` seconds; None: nothing came."""

    def send(self, message: wire.ToEngine) -> None: ...

    def receive(self, timeout: float) -> wire.FromEngine | None: ...

    def alive(self) -> bool: ...

    def last_words(self) -> PagodaError | None:
        """Why the engine is no longer alive, if it could leave word."""

    def close(self) -> None: ...


class InlineTransport:
    """The engine as a thread of this process."""

    def __init__(self, model: str | Path, config: EngineConfig, progress: Callable[[float], None] | None = None):
        from pagoda.engine.process import build_engine  # torch comes with it

        self._to_engine: queue.SimpleQueue[tuple[bytes, wire.ToEngine]] = queue.SimpleQueue()
        self._from_engine: queue.SimpleQueue[wire.FromEngine] = queue.SimpleQueue()
        self._loop = build_engine(model, config, progress)
        self._loop.connect(self._poll, lambda _sender, message: self._from_engine.put(message))
        self._from_engine.put(wire.Ready(self._loop.info))
        self._thread = threading.Thread(target=self._loop.run, name="pagoda-engine", daemon=True)
        self._thread.start()

    def _poll(self, timeout: float | None) -> list[tuple[bytes, wire.ToEngine]]:
        messages = []
        try:
            messages.append(self._to_engine.get(block=timeout != 0, timeout=timeout or None))
            while True:
                messages.append(self._to_engine.get_nowait())
        except queue.Empty:
            return messages

    def send(self, message: wire.ToEngine) -> None:
        self._to_engine.put((b"", message))

    def receive(self, timeout: float) -> wire.FromEngine | None:
        try:
            return self._from_engine.get(timeout=timeout)
        except queue.Empty:
            return None

    def alive(self) -> bool:
        return self._thread.is_alive()

    def last_words(self) -> PagodaError | None:
        return None

    def close(self) -> None:
        self._loop.stop()
        self._to_engine.put((b"", wire.Leave()))
        self._thread.join(timeout=30)


class SocketTransport:
    """A ZeroMQ connection to an engine process. With `process`, the engine is ours and ends with us."""

    def __init__(self, address: str, process: subprocess.Popen[bytes] | None = None, folder: Path | None = None):
        self.address, self.process, self._folder = address, process, folder
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)  # no message is dropped, and `send` never blocks
        self._socket.connect(address)
        # A socket belongs to one thread: senders hand over through a local pipe that the receiving thread also polls.
        self._pending: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._closed = False
        self._receiving, self._waking = threading.Lock(), threading.Lock()
        self.send(wire.Call(0, "hello"))

    def send(self, message: wire.ToEngine) -> None:
        self._pending.put(wire.encode(message))
        self._wake()

    def _wake(self) -> None:
        with self._waking, contextlib.suppress(BlockingIOError):  # the pipe is full: a wake-up is under way already
            if not self._closed:
                os.write(self._wake_write, b"x")

    def receive(self, timeout: float) -> wire.FromEngine | None:
        deadline = time.monotonic() + timeout
        with self._receiving:
            while not self._closed:
                left = max(0.0, deadline - time.monotonic())
                ready = dict(self._poller.poll(left * 1000))
                if self._wake_read in ready:
                    os.read(self._wake_read, 1 << 16)
                    self._flush()
                if self._socket in ready:
                    return wire.decode_from_engine(self._socket.recv())
                if left == 0.0:
                    break
        return None

    def _flush(self) -> None:
        while not self._pending.empty():
            self._socket.send(self._pending.get_nowait())

    def alive(self) -> bool:
        return not self._closed and (self.process is None or self.process.poll() is None)

    def last_words(self) -> PagodaError | None:
        if self._folder is None or not (self._folder / LAST_WORDS).exists():
            return None
        return named_error(*json.loads((self._folder / LAST_WORDS).read_text(encoding="utf-8")))

    def close(self) -> None:
        if self._closed:
            return
        if self.process is None:
            self.send(wire.Leave())
        else:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._wake()
        with self._waking:
            self._closed = True
        with self._receiving:
            self._flush()
            self._socket.close(linger=200)
            self._context.term()
            os.close(self._wake_read)
            os.close(self._wake_write)


def spawn_engine(model: str | Path, config: EngineConfig, for_grammars: bool = False) -> SocketTransport:
    """Start an engine process on a private socket (a folder of mode 0700) and connect to it. `for_grammars`: it will
    serve many, so the first grammar must delay no stream."""
    folder = Path(tempfile.mkdtemp(prefix="pagoda-"))
    address = f"ipc://{folder}/engine"
    job = {
        "model": str(model),
        "config": vars(config),
        "address": address,
        "for_grammars": for_grammars,
        "parent": os.getpid(),
        "last_words": str(folder / LAST_WORDS),
    }
    process = subprocess.Popen([sys.executable, "-m", "pagoda.engine.process"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(job).encode())
    process.stdin.close()
    return SocketTransport(address, process, folder)
