"""Prompts are prepared by few threads, for a bounded time."""

import asyncio
import threading

import pytest

from pagoda import ServeConfig
from pagoda.errors import OverloadedError
from pagoda.serve import backend as backend_module
from pagoda.serve.backend import Backend


def test_wedged_threads_cost_nobody_more_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "PREPARE_SECONDS", 0.3)
    backend, go_on, began = Backend("mini", ServeConfig()), threading.Event(), []

    def wedge(name: int) -> None:
        began.append(name)
        go_on.wait(30)

    async def scene() -> None:
        ends = await asyncio.gather(*(backend.prepare(wedge, i) for i in range(12)), return_exceptions=True)
        assert all(isinstance(end, OverloadedError) for end in ends)
        go_on.set()
        assert await backend.prepare(lambda: "fine") == "fine"

    asyncio.run(scene())
    assert sorted(began) == list(range(8)), "what had not begun at the deadline never does"
