"""How messages travel between a client and its engine: to a thread of this process, or over a socket to another."""

import contextlib
import json
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pagoda.config import EngineConfig
from pagoda.engine import wire
from pagoda.engine.sockets import READ_BYTES, Backlog, Frames, framed
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
    """A connection to an engine process at a Unix socket's path. With `process`, the engine is ours and ends with us.
    `send` is for any thread and never blocks, `receive` for one. Raises `OSError` where nobody listens."""

    def __init__(self, address: str, process: subprocess.Popen[bytes] | None = None, folder: Path | None = None):
        self.address, self.process, self._folder = address, process, folder
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(address)
            self._wake_read, self._wake_write = os.pipe()
        except OSError:
            self._socket.close()
            raise
        for end in (self._socket.fileno(), self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        self._frames, self._backlog = Frames(), Backlog(self._socket)
        self._poll = select.poll()
        self._poll.register(self._wake_read, select.POLLIN)
        self._closed = self._ended = False
        self._receiving, self._sending = threading.Lock(), threading.Lock()
        self.send(wire.Call(0, "hello"))

    def send(self, message: wire.ToEngine) -> None:
        frame = framed(wire.encode(message))
        with self._sending:
            if self._closed:
                return
            with contextlib.suppress(OSError):  # the engine is gone, as `receive` finds after its last messages
                self._backlog.send(frame)
            if self._backlog:
                self._wake()

    def _wake(self) -> None:
        """The receiving thread looks again at what there is to do."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: a wake-up is under way already
            os.write(self._wake_write, b"x")

    def receive(self, timeout: float) -> wire.FromEngine | None:
        until = time.monotonic() + timeout
        with self._receiving:
            while not self._closed:
                data = self._frames.take()
                if data is not None:
                    return wire.decode_from_engine(data)
                if self._ended:
                    return None
                left = max(0.0, until - time.monotonic())
                self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._backlog else 0))
                ready = dict(self._poll.poll(left * 1000))
                if self._wake_read in ready:
                    os.read(self._wake_read, 1 << 16)
                if self._socket.fileno() in ready:
                    self._exchange()
                elif left == 0.0:
                    break
        return None

    def _exchange(self) -> None:
        """Send what waits, read what came."""
        with self._sending, contextlib.suppress(OSError):
            self._backlog.flush()
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._frames.feed(data)
        self._ended = not data

    def alive(self) -> bool:
        return not self._closed and not self._ended and (self.process is None or self.process.poll() is None)

    def last_words(self) -> PagodaError | None:
        if self._folder is None or not (self._folder / LAST_WORDS).exists():
            return None
        return named_error(*json.loads((self._folder / LAST_WORDS).read_text(encoding="utf-8")))

    def close(self) -> None:
        if self._closed:
            return
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        with self._sending:
            self._closed = True
            self._wake()
        with self._receiving:
            self._backlog.linger(0.2)
            self._socket.close()  # which tells the engine that we left
            os.close(self._wake_read)
            os.close(self._wake_write)


def listen_at(address: str) -> socket.socket:
    """A Unix socket at a path, open for as many clients as the system lets wait."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(socket.SOMAXCONN)
    return listener


def spawn_engine(model: str | Path, config: EngineConfig, for_grammars: bool = False) -> SocketTransport:
    """Start an engine process on a private socket (a folder of mode 0700) and connect to it. `for_grammars`: it will
    serve many, so the first grammar must delay no stream."""
    folder = Path(tempfile.mkdtemp(prefix="pagoda-"))
    address = str(folder / "engine")
    listener = listen_at(address)  # here, so that whoever knows the address can connect; open in the engine alone
    job = {
        "model": str(model),
        "config": vars(config),
        "listener": listener.fileno(),
        "for_grammars": for_grammars,
        "parent": os.getpid(),
        "last_words": str(folder / LAST_WORDS),
    }
    with listener:
        command = [sys.executable, "-m", "pagoda.engine.process"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    assert process.stdin is not None
    process.stdin.write(json.dumps(job).encode())
    process.stdin.close()
    return SocketTransport(address, process, folder)
