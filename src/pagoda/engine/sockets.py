"""The engine's end of its Unix socket, and how messages lie in a stream of bytes."""

import contextlib
import itertools
import os
import selectors
import socket
import struct
import time

from pagoda.engine import wire
from pagoda.errors import EngineError

LENGTH = struct.Struct("<I")
READ_BYTES = 1 << 20
LINGER_SECONDS = 1.0


def framed(data: bytes) -> bytes:
    """A message behind its length: 4 bytes, little endian."""
    return LENGTH.pack(len(data)) + data


class Frames:
    """Finds the messages in a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take(self) -> bytes | None:
        """The next message, once it is whole."""
        if len(self._buffer) < LENGTH.size:
            return None
        end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[LENGTH.size : end])
        del self._buffer[:end]
        return message


class Backlog:
    """Sends on a socket that does not block; what it does not take at once waits here. Raises `OSError` when the other
    end is gone."""

    def __init__(self, end: socket.socket):
        self._socket, self._waiting = end, bytearray()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def send(self, frame: bytes) -> None:
        if self._waiting:
            self._waiting += frame
            return
        try:
            sent = self._socket.send(frame)
        except BlockingIOError:
            sent = 0
        self._waiting += frame[sent:]

    def flush(self) -> None:
        """As much as the socket takes now."""
        if not self._waiting:
            return
        try:
            del self._waiting[: self._socket.send(self._waiting[:READ_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self._waiting.clear()
            raise

    def linger(self, seconds: float) -> None:
        """The last chance for what waits, before the socket is closed."""
        with contextlib.suppress(OSError):  # its reader is too slow, or gone
            self._socket.settimeout(seconds)
            self._socket.sendall(self._waiting)


class _Client:
    def __init__(self, name: bytes, end: socket.socket):
        self.name, self.socket, self.frames, self.backlog = name, end, Frames(), Backlog(end)


class SocketServer:
    """Any number of clients on one listening socket. `poll` says `Leave` for one whose connection ended. A client that
    is slow to read misses nothing and keeps nobody waiting."""

    def __init__(self, listener: socket.socket, parent: int):
        self.parent = parent  # told, not looked up: it may have died while this process was starting
        self._listener = listener
        listener.setblocking(False)
        listener.set_inheritable(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._clients: dict[bytes, _Client] = {}
        self._names = itertools.count(1)
        self._gone: list[tuple[bytes, wire.ToEngine]] = []

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def poll(self, timeout: float | None) -> list[tuple[bytes, wire.ToEngine]]:
        """All messages that are there, or that come within `timeout` seconds (0: only looks, None: as long as it
        takes); an orphaned engine ends itself."""
        if timeout != 0 and os.getppid() != self.parent:
            raise EngineError("the parent process is gone")
        until = None if timeout is None else time.monotonic() + timeout
        messages: list[tuple[bytes, wire.ToEngine]] = []
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            for key, events in self._selector.select(0 if self._gone else left):
                if key.data is None:
                    self._accept()
                    continue
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ:
                    messages += self._read(key.data)
            messages, self._gone = messages + self._gone, []
            if messages or left == 0:
                return messages

    def send(self, name: bytes, message: wire.FromEngine) -> None:
        """To one client, or to all when `name` is empty."""
        frame = framed(wire.encode(message))
        for client in list(self._clients.values()) if not name else filter(None, [self._clients.get(name)]):
            waited = bool(client.backlog)
            try:
                client.backlog.send(frame)
            except OSError:
                self._forget(client)
                continue
            if client.backlog and not waited:
                self._selector.modify(client.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, client)

    def close(self) -> None:
        for client in self._clients.values():
            client.backlog.linger(LINGER_SECONDS)
            client.socket.close()
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except OSError:  # it left again, or there is no file descriptor now: it waits in line
            return
        end.setblocking(False)
        client = _Client(b"%d" % next(self._names), end)
        self._clients[client.name] = client
        self._selector.register(end, selectors.EVENT_READ, client)

    def _read(self, client: _Client) -> list[tuple[bytes, wire.ToEngine]]:
        try:
            data = client.socket.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._forget(client)
            return []
        client.frames.feed(data)
        return [(client.name, wire.decode_to_engine(data)) for data in iter(client.frames.take, None)]

    def _flush(self, client: _Client) -> None:
        try:
            client.backlog.flush()
        except OSError:
            self._forget(client)
            return
        if not client.backlog:
            self._selector.modify(client.socket, selectors.EVENT_READ, client)

    def _forget(self, client: _Client) -> None:
        if self._clients.pop(client.name, None) is not None:
            self._selector.unregister(client.socket)
            client.socket.close()
            self._gone.append((client.name, wire.Leave()))
