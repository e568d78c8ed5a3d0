"""The client's side of an engine: submit requests, read their outputs. Imports no torch unless the engine is inline."""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from pagoda import errors
from pagoda.config import EngineConfig
from pagoda.engine import wire
from pagoda.engine.metrics import EngineStats
from pagoda.engine.request import EngineRequest, Output
from pagoda.engine.sessions import SessionInfo
from pagoda.engine.transports import InlineTransport, Transport, spawn_engine
from pagoda.errors import EngineDeadError, PagodaError, named_error
from pagoda.log import get_logger
from pagoda.models.workspace import is_workspace, open_workspace

Answered = wire.Answer | EngineDeadError
log = get_logger(__name__)


class Ticket:
    """One request's outputs, in order, until the one with a finish reason. Iterate it from one thread, or with
    `async for` from the event loop that submitted it. `abort` may be called from anywhere, at any time."""

    def __init__(
        self, client: "EngineClient", request_id: str, loop: asyncio.AbstractEventLoop | None, inbox: Any = None
    ):
        self.id, self.loop, self._client = request_id, loop, client
        self._queue: Any = inbox or (queue.SimpleQueue() if loop is None else asyncio.Queue())

    def deliver(self, output: Output) -> None:
        """Called by the client, on the ticket's own event loop when it has one."""
        self._queue.put_nowait(output) if self.loop is not None else self._queue.put(output)

    def abort(self, keep_tokens: int | None = None) -> None:
        """End the request; see `wire.Abort`."""
        self._client.abort(self.id, keep_tokens)

    def __iter__(self) -> Iterator[Output]:
        while True:
            output = self._queue.get()
            yield output
            if output.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Output]:
        while True:
            output = await self._queue.get()
            yield output
            if output.finish_reason is not None:
                return


class EngineClient:
    """One program's door to one engine. Safe to use from several threads and event loops."""

    def __init__(self, transport: Transport, meanwhile: Callable[[], None] = lambda: None):
        """Waits until the engine is ready, calling `meanwhile` ten times a second."""
        self._transport = transport
        self._lock, self._hanging_up = threading.Lock(), threading.Lock()
        self._tickets: dict[str, Ticket] = {}
        self._answers: dict[int, Callable[[Answered], Any]] = {}
        self._seq = itertools.count(1)
        self._death: PagodaError | None = None
        self._closing = False
        self.info = self._wait_ready(meanwhile)
        self._thread = threading.Thread(target=self._read, name="pagoda-engine-client", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, inbox: "asyncio.Queue[Output] | None" = None) -> Ticket:
        """Send a request. Called inside a running event loop, the ticket is for `async for` there; or several requests
        share an `inbox` of that loop, which is then read instead of the tickets."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        ticket = Ticket(self, request.id, loop, inbox)
        with self._lock:
            if self._death is not None:
                raise self._death
            if request.id in self._tickets:
                raise errors.RequestError(f"A request with the id {request.id!r} is still running.", "request_id")
            self._tickets[request.id] = ticket
        try:
            self._transport.send(wire.Submit(request))
        except BaseException:  # it cannot be encoded
            del self._tickets[request.id]
            raise
        return ticket

    def abort(self, request_id: str, keep_tokens: int | None = None) -> None:
        """End a request, in whatever state it is; an unknown one is ignored."""
        if self._death is None:
            self._transport.send(wire.Abort(request_id, keep_tokens))

    def abort_all(self) -> None:
        """End all requests of this client; their tickets are told."""
        with self._lock:
            ids = list(self._tickets)
        for request_id in ids:
            self.abort(request_id)

    def tell(self, verb: str, **arguments: Any) -> None:
        """Ask the engine without waiting for the answer; nothing happens when it is gone."""
        if self._death is None:
            self._transport.send(wire.Call(0, verb, arguments))

    def call(self, verb: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """Ask the engine and wait for the answer; a hung or dead engine raises `EngineDeadError`."""
        answers: queue.SimpleQueue[Answered] = queue.SimpleQueue()
        seq = self._ask(verb, arguments, answers.put)
        try:
            return _value(answers.get(timeout=timeout))
        except queue.Empty:
            raise _silent(timeout) from None
        finally:
            self._answers.pop(seq, None)

    async def ask(self, verb: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """`call`, while the event loop goes on."""
        loop, answers = asyncio.get_running_loop(), asyncio.Queue[Answered]()

        def deliver(answer: Answered) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(answers.put_nowait, answer)

        seq = self._ask(verb, arguments, deliver)
        try:
            return _value(await asyncio.wait_for(answers.get(), timeout))
        except asyncio.TimeoutError:
            raise _silent(timeout) from None
        finally:
            self._answers.pop(seq, None)

    def _ask(self, verb: str, arguments: dict[str, Any], deliver: "Callable[[Answered], Any]") -> int:
        with self._lock:
            if self._death is not None:
                raise self._death
            seq = next(self._seq)
            self._answers[seq] = deliver
        self._transport.send(wire.Call(seq, verb, arguments))
        return seq

    def stats(self) -> EngineStats:
        """The engine's counters at this moment."""
        return msgspec.convert(self.call("stats"), EngineStats)

    def sessions(self) -> list[SessionInfo]:
        """The conversations that the engine remembers."""
        return msgspec.convert(self.call("list_sessions"), list[SessionInfo])

    @property
    def dead(self) -> PagodaError | None:
        """Why the engine is gone, or None while it lives."""
        return self._death

    def wait_dead(self) -> None:
        """Block until the engine is gone, or cannot be reached from here any more, or this client is closed."""
        self._thread.join()

    def close(self, reason: str = "The engine was closed.") -> None:
        """End open requests, stop the engine if it is ours, give back its memory. May be called twice."""
        if self._closing:
            return
        self._closing = True
        self._hang_up()
        self._thread.join(timeout=10)
        self._die(EngineDeadError(reason))

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_ready(self, meanwhile: Callable[[], None]) -> wire.EngineInfo:
        while True:
            meanwhile()
            message = self._transport.receive(0.1)
            if isinstance(message, wire.Ready):
                return message.info
            if isinstance(message, wire.Dead):
                self._transport.close()
                raise named_error(*message.error)
            if message is None and not self._transport.alive():
                why = self._transport.last_words()
                self._transport.close()
                raise why or EngineDeadError(
                    "The engine's process ended while it was starting; its last lines say why."
                )

    def _read(self) -> None:
        """Whatever ends it, nobody waits for ever."""
        try:
            self._read_on()
        except Exception as error:
            log.exception("the connection to the engine failed")
            self._die(EngineDeadError(f"The connection to the engine failed ({type(error).__name__}): try again."))
            self._hang_up()  # the engine ends what ran for us

    def _hang_up(self) -> None:
        with self._hanging_up:  # one closes at a time
            self._transport.close()

    def _read_on(self) -> None:
        while not self._closing:
            message = self._transport.receive(0.1)
            if isinstance(message, wire.Outputs):
                self._dispatch(message.outputs)
            elif isinstance(message, wire.Answer):
                self._answers.get(message.seq, _nobody)(message)
            elif isinstance(message, wire.Dead):
                self._die(EngineDeadError(message.error[1]))
                return
            elif message is None and not self._transport.alive():
                why = self._transport.last_words() or "The engine's process ended unexpectedly."
                self._die(EngineDeadError(str(why)))
                return

    def _dispatch(self, outputs: list[Output]) -> None:
        """Hand outputs to their tickets, waking each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Output]]] = {}
        with self._lock:
            found = [(self._tickets.get(output.id), output) for output in outputs]
            for output in outputs:
                if output.finish_reason is not None:
                    self._tickets.pop(output.id, None)
        for ticket, output in found:
            if ticket is None:
                continue
            if ticket.loop is None:
                ticket.deliver(output)
            else:
                by_loop.setdefault(ticket.loop, []).append((ticket, output))
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(_deliver_all, pairs)

    def _die(self, error: EngineDeadError) -> None:
        """Every open request and call learns that the engine is gone."""
        with self._lock:
            self._death = self._death or error
            waiting, self._answers = list(self._answers.values()), {}
            open_ids = list(self._tickets)
        for deliver in waiting:
            deliver(error)
        kind = type(error).__name__
        self._dispatch([Output(i, finish_reason="error", error=str(error), error_kind=kind) for i in open_ids])


def _value(answer: Answered) -> Any:
    if isinstance(answer, EngineDeadError):
        raise answer
    if answer.error is not None:
        raise named_error(*answer.error)
    return answer.value


def _silent(timeout: float) -> EngineDeadError:
    return EngineDeadError(f"The engine did not answer within {timeout:g} s.")


def _nobody(answer: Answered) -> None:
    """An answer that nobody waits for any more."""


def _deliver_all(pairs: list[tuple[Ticket, Output]]) -> None:
    for ticket, output in pairs:
        ticket.deliver(output)


def start_engine(
    model: str | Path, config: EngineConfig, inline: bool = True, progress: Callable[[float], None] | None = None
) -> EngineClient:
    """Start an engine for `model` (folder, workspace, hub id or `mini`) and wait until it can serve.

    `inline`: a thread of this process; else a process of its own, which ends with this one. Raises the `PagodaError`
    that the start raised.
    """
    if inline and config.executor == "local" and num_ranks(model, config) == 1:
        return EngineClient(InlineTransport(model, config, progress))
    return EngineClient(spawn_engine(model, config))


def num_ranks(model: str | Path, config: EngineConfig) -> int:
    """`tp`, from a workspace where the configuration leaves it open."""
    folder = Path(model).expanduser()
    return config.under(open_workspace(folder).settings).tp if is_workspace(folder) else config.tp
