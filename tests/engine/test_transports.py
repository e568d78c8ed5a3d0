"""The socket between a client and its engine."""

import asyncio
import os
from pathlib import Path

import pytest

from pagoda.engine import wire
from pagoda.engine.process import SocketServer
from pagoda.engine.request import EngineRequest
from pagoda.engine.transports import SocketTransport


@pytest.fixture
def server(tmp_path: Path):
    made = SocketServer(f"ipc://{tmp_path}/engine")
    yield made
    made.close()


def test_a_slow_reader_misses_nothing(server: SocketServer, tmp_path: Path) -> None:
    transport = SocketTransport(f"ipc://{tmp_path}/engine")
    transport.receive(0.0)  # says hello
    assert server.poll(5.0)
    for i in range(10_000):
        server.send(b"", wire.Answer(i, "x" * 500))
    assert [transport.receive(5.0).seq for _ in range(10_000)] == list(range(10_000))
    transport.close()


def test_a_closed_client_takes_its_leave_and_holds_no_descriptors(server: SocketServer, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        transport = SocketTransport(f"ipc://{tmp_path}/engine")
        transport.receive(0.0)
        transport.close()
        transport.close()
        transport.send(wire.Leave())  # too late, and harmless
        news = [message for _ in range(2) for _, message in server.poll(5.0)]
        assert isinstance(news[-1], wire.Leave)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_an_event_loop_that_ended_early_costs_nobody_else_an_answer(engines) -> None:
    engine = engines()

    async def leave() -> None:
        engine.submit(EngineRequest("left", [5, 6]))

    asyncio.run(leave())
    assert list(engine.submit(EngineRequest("next", [5, 6])))[-1].finish_reason == "length"
    assert engine.call("stats") is not None
