"""What the ranks of one engine say to each other: typed msgpack in frames over inherited socket pairs.

A pair has no name, no port and no late subscriber, and tells at once when the other end is gone. Each rank has two: one
brings its steps, the other (`LifeLine`) carries signs of life both ways, read by a thread of its own, because the
thread that computes may be waiting for the very rank that is gone.
"""

import contextlib
import select
import socket
import threading
import time
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from pagoda.engine.schedule import Schedule
from pagoda.engine.sockets import READ_BYTES, Frames, framed

BEAT_SECONDS = 0.5
PATIENCE_STARTING = 60.0  # imports and compilers may keep every thread of a process waiting
PATIENCE_RUNNING = 6.0


class Job(Struct, tag=True):
    """Who a rank is, and where it meets the others."""

    rank: int
    model: str
    config: dict[str, Any]
    meeting: str


class Step(Struct, tag=True):
    """One step. `mask`: the packed grammar bitmasks, row by row."""

    schedule: Schedule
    mask: bytes | None = None
    mask_width: int = 0

    @classmethod
    def of(cls, schedule: Schedule, mask_LW: np.ndarray | None) -> "Step":
        return cls(schedule) if mask_LW is None else cls(schedule, mask_LW.tobytes(), mask_LW.shape[1])

    def mask_LW(self) -> np.ndarray | None:
        return None if self.mask is None else np.frombuffer(self.mask, np.int32).reshape(-1, self.mask_width).copy()


class Beat(Struct, tag=True):
    """A sign of life; the next one comes within `patience` seconds."""

    patience: float


class Loaded(Struct, tag=True):
    """The rank can run steps."""


class Failed(Struct, tag=True):
    """The rank ends: class name and sentence of its error."""

    kind: str
    message: str


Message = Job | Step | Beat | Loaded | Failed

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class Link:
    """One end of a socket pair. `send` is safe from any thread, `receive` belongs to one."""

    def __init__(self, end: socket.socket):
        self.socket = end
        self._lock, self._frames = threading.Lock(), Frames()

    def send(self, message: Message) -> None:
        """Raises `OSError` when the other end is gone."""
        frame = framed(_encode(message))
        with self._lock:
            self.socket.sendall(frame)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; None when there was none for `timeout` seconds. Raises `EOFError` at the end."""
        while (data := self._frames.take()) is None:
            if timeout is not None and not select.select([self.socket], [], [], timeout)[0]:
                return None
            try:
                more = self.socket.recv(READ_BYTES)
            except OSError:
                more = b""
            if not more:
                raise EOFError("the other end is gone")
            self._frames.feed(more)
        return _decode(data)

    def close(self) -> None:
        """The other end reads an end, also where forked processes still hold ours."""
        with contextlib.suppress(OSError):  # the other end was faster
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class LifeLine:
    """Signs of life over a link. Call `tick` at least twice a second from one thread."""

    def __init__(self, link: Link):
        self.link = link
        self._patience = self._theirs = PATIENCE_STARTING
        self._sent = self._heard = self._ticked = time.monotonic()

    def promise(self, patience: float) -> None:
        """From now on a beat comes within that many seconds; the other end learns of it at once."""
        self._patience = patience
        self.link.send(Beat(patience))

    def tick(self, timeout: float = 0.0) -> list[Message]:
        """Beat if it is time, read what came (waits for it `timeout` seconds). Raises `EOFError` when the other end is
        gone, `TimeoutError` when it was silent for longer than it had promised."""
        now = time.monotonic()
        if now - self._ticked > 2.0:  # we were stopped ourselves, as by Ctrl-Z: others may have been, too
            self._heard = now
        self._ticked = now
        if now - self._sent >= BEAT_SECONDS:
            self._sent = now
            try:
                self.link.send(Beat(self._patience))
            except OSError:
                raise EOFError("the other end is gone") from None
        news: list[Message] = []
        while (message := self.link.receive(0.0 if news else timeout)) is not None:
            self._heard = time.monotonic()
            if isinstance(message, Beat):
                self._theirs = message.patience
            news.append(message)
        silent = time.monotonic() - self._heard
        if silent > self._theirs:
            raise TimeoutError(f"gave no sign of life for {silent:.0f} s")
        return news
