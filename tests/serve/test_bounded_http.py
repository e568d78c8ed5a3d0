"""Heads of requests that are too large, or that never end."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from pagoda.serve import bounded_http

START = b"GET / HTTP/1.1\r\nhost: here\r\n"


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(bounded_http, "HEAD_SECONDS", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=bounded_http.BoundedHttp, lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join(timeout=10)


def connect(address: tuple[str, int]) -> socket.socket:
    made = socket.create_connection(address)
    made.settimeout(10)
    return made


@pytest.mark.parametrize(("size", "answer"), [(60_000, b"204"), (70_000, b"400"), (8 << 20, b"400")])
@pytest.mark.parametrize("ended", [True, False])
def test_a_head_has_at_most_64_kilobytes(address: tuple[str, int], size: int, answer: bytes, ended: bool) -> None:
    with connect(address) as client:
        try:
            client.sendall(START + b"x-long: " + b"a" * size + (b"\r\n\r\n" if ended else b""))
            answered = client.recv(1000)
        except ConnectionError:  # it was closed before it had read all
            answered = b"HTTP/1.1 400"
        assert answered[9:12] == (answer if ended or answer == b"400" else b"")


@pytest.mark.parametrize("begun", [b"", START, START + b"\r\n" + START])
def test_a_head_that_does_not_end_is_cut_off(address: tuple[str, int], begun: bytes) -> None:
    with connect(address) as client:
        client.sendall(begun)
        assert client.recv(1000).count(b"204") == begun.count(b"\r\n\r\n")
        assert client.recv(1000) == b"" if b"\r\n\r\n" in begun else True


def test_a_connection_may_idle_between_requests(address: tuple[str, int]) -> None:
    idle = threading.Event()
    with connect(address) as client:
        for _ in range(3):
            client.sendall(START + b"\r\n")
            assert client.recv(1000)[9:12] == b"204"
            idle.wait(0.4)  # longer than a head may take
