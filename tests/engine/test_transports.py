"""The socket between a client and its engine."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pagoda.engine import wire
from pagoda.engine.client import EngineClient
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.engine.sockets import SocketServer, framed
from pagoda.engine.transports import SocketTransport, listen_at
from pagoda.errors import EngineDeadError


@pytest.fixture
def server(tmp_path: Path):
    made = SocketServer(listen_at(f"{tmp_path}/engine"), os.getppid())
    yield made
    made.close()


def test_a_slow_reader_misses_nothing(server: SocketServer, tmp_path: Path) -> None:
    transport = SocketTransport(f"{tmp_path}/engine")
    transport.receive(0.0)  # says hello
    assert server.poll(5.0)
    for i in range(10_000):
        server.send(b"", wire.Answer(i, "x" * 500))
    read: list[int] = []
    reader = threading.Thread(target=lambda: read.extend(transport.receive(5.0).seq for _ in range(10_000)))
    reader.start()
    while reader.is_alive():
        assert not server.poll(0.01)
    assert read == list(range(10_000))
    transport.close()


def test_senders_never_wait_for_a_slow_engine(server: SocketServer, tmp_path: Path) -> None:
    transport = SocketTransport(f"{tmp_path}/engine")
    for i in range(10_000):  # far more than the system's buffers hold
        transport.send(wire.Call(i + 1, "x" * 500))
    reader = threading.Thread(target=transport.receive, args=(5.0,))
    reader.start()
    seen: list[int] = []
    while len(seen) <= 10_000:
        seen += [message.seq for _, message in server.poll(5.0)]
    server.send(b"", wire.Answer(1))
    reader.join()
    assert seen == list(range(10_001))
    transport.close()


@pytest.mark.timeout(30)
def test_a_closed_client_takes_its_leave_and_holds_no_descriptors(server: SocketServer, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        transport = SocketTransport(f"{tmp_path}/engine")
        transport.receive(0.0)
        transport.close()
        transport.close()
        transport.send(wire.Leave())  # too late, and harmless
        while not any(isinstance(message, wire.Leave) for _, message in server.poll(5.0)):
            pass
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.timeout(60)
def test_an_engine_whose_parent_died_while_it_started_ends(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "own").mkdir()
    listener = listen_at(f"{tmp_path}/own/engine")
    job = {
        "model": "mini",
        "config": {"device": "cpu", "session_len": 64, "max_batch_size": 2},
        "listener": listener.fileno(),
        "for_grammars": False,
        "parent": gone.pid,
        "last_words": str(tmp_path / "own" / "last_words"),
    }
    command, told = [sys.executable, "-m", "pagoda.engine.process"], json.dumps(job).encode()
    with listener:
        engine = subprocess.run(command, input=told, timeout=50, pass_fds=[listener.fileno()])
    assert engine.returncode == 1 and not (tmp_path / "own").exists()


def test_an_event_loop_that_ended_early_costs_nobody_else_an_answer(engines) -> None:
    engine = engines()

    async def leave() -> None:
        engine.submit(EngineRequest("left", [5, 6]))

    asyncio.run(leave())
    assert list(engine.submit(EngineRequest("next", [5, 6])))[-1].finish_reason == "length"
    assert engine.call("stats") is not None


def test_a_client_that_is_killed_has_left(server: SocketServer, tmp_path: Path) -> None:
    """It says nothing; the server finds out by itself, also when it has news for it, and forgets it."""
    for news in (True, False):
        client = socket.socket(socket.AF_UNIX)
        client.connect(f"{tmp_path}/engine")
        client.sendall(framed(wire.encode(wire.Call(1, "ping"))))
        [(sender, _)] = server.poll(5.0)
        client.close()
        if news:
            server.send(sender, wire.Answer(1))
        assert server.poll(5.0) == [(sender, wire.Leave())]
        assert not server.num_clients


def test_a_client_that_left_is_forgotten(server: SocketServer, tmp_path: Path) -> None:
    transport = SocketTransport(f"{tmp_path}/engine")
    transport.receive(0.0)
    assert server.poll(5.0) and server.num_clients == 1
    transport.close()
    assert [message for _, message in server.poll(5.0)] == [wire.Leave()] and server.num_clients == 0


def test_a_connection_that_breaks_is_told_to_all_who_wait(engines) -> None:
    engine = engines()
    broken = threading.Event()
    receive = engine._transport.receive

    def garbled(timeout: float):
        if broken.is_set():
            raise ValueError("no message")
        return receive(timeout)

    engine._transport.receive = garbled
    outputs = iter(engine.submit(EngineRequest("long", [5, 6], SamplingParams(max_tokens=200))))
    next(outputs)
    broken.set()
    assert list(outputs)[-1].finish_reason == "error"
    with pytest.raises(EngineDeadError, match="ValueError"):
        engine.call("stats", timeout=5.0)


@pytest.mark.timeout(60)
def test_a_connection_that_breaks_is_hung_up(server: SocketServer, tmp_path: Path, engines, monkeypatch) -> None:
    """The engine ends what ran for it."""
    transport, made = SocketTransport(f"{tmp_path}/engine"), []
    starter = threading.Thread(target=lambda: made.append(EngineClient(transport)))
    starter.start()
    [(sender, _)] = server.poll(5.0)
    server.send(sender, wire.Ready(engines().info))
    starter.join()
    [client] = made
    monkeypatch.setattr(wire, "decode_from_engine", lambda data: json.loads("no message"))
    server.send(sender, wire.Answer(1))
    assert [message for _, message in server.poll(5.0)] == [wire.Leave()]
    client.wait_dead()
    assert isinstance(client.dead, EngineDeadError) and not transport.alive()
    client.close()
