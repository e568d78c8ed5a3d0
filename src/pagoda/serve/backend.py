"""The engine as one HTTP process sees it: on its way, ready, stalled or gone."""

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request

from pagoda.config import ServeConfig
from pagoda.engine import wire
from pagoda.engine.client import EngineClient
from pagoda.engine.sessions import MAX_SESSIONS
from pagoda.engine.transports import SocketTransport
from pagoda.errors import EngineDeadError, NotFoundError, OverloadedError, PagodaError
from pagoda.log import get_logger
from pagoda.offline import Pipeline, Prepared
from pagoda.text.template import template_names

PREPARE_SECONDS = 10.0
RECONNECT_SECONDS, RETRY_SECONDS = 0.5, 2.0
R = TypeVar("R")
log = get_logger(__name__)


class Backend:
    """Holds the pipeline of the engine's present life. `state`: loading, ready, stalled (alive but not moving), down
    (being restarted) or draining."""

    def __init__(self, model: str, config: ServeConfig, chat_template: str | None = None):
        self.model, self.config = model, config
        self.name = config.model_name or Path(model.rstrip("/")).name
        named = config.model_name if config.model_name in template_names() else None
        self.chat_template = chat_template or named
        self._state = "loading"
        self._pipe: Pipeline | None = None
        self._transport: SocketTransport | None = None
        self._address: str | None = None  # of the engine that there should be
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, None] = OrderedDict()  # that had a turn here
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="pagoda-prepare")

    @property
    def state(self) -> str:
        """See above; an engine that cannot be reached from here is down, whatever the supervisor sees."""
        broken = self._pipe is not None and self._pipe.engine.dead is not None
        return "down" if broken and self._state != "draining" else self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state

    @property
    def pipe(self) -> Pipeline:
        """Raises `EngineDeadError` while there is no engine."""
        if self._pipe is None:
            raise EngineDeadError(f"The engine is {self.state}: try again in a moment.")
        return self._pipe

    @property
    def max_open(self) -> int:
        """HTTP requests that this process holds at once: as many as the engine runs and queues."""
        info = self._pipe.engine.info if self._pipe is not None else None
        return 1024 if info is None else info.max_batch_size + info.max_queued

    def attach(self, pipe: Pipeline) -> None:
        """An engine is ready."""
        self._pipe, self.state = pipe, "ready"

    def stay_connected(self, address: str) -> None:
        """`connect`, and again whenever that fails or the connection breaks; blocks until `lose` is called."""
        while self._address == address:
            try:
                pipe = self._connect(address)
            except Exception:  # there may be a file descriptor, or a thread, in a moment
                log.exception("the engine cannot be reached from here")
                time.sleep(RETRY_SECONDS)
                continue
            if pipe is None:
                return
            pipe.engine.wait_dead()
            time.sleep(RECONNECT_SECONDS)

    def connect(self, address: str) -> Pipeline | None:
        """Wait for the engine at `address`; blocks, and gives up (None) when `lose` is called meanwhile. Raises what
        goes wrong on this side."""
        self._address = address
        return self._connect(address)

    def _connect(self, address: str) -> Pipeline | None:
        transport = SocketTransport(address)
        with self._lock:
            if self._address != address:
                transport.close()
                return None
            self._pipe, self._transport, self.state = None, transport, "loading"
            lost = list(self._sessions)
        if lost:  # the engine tells the clients of those that it does not know
            transport.send(wire.Call(0, "lose_sessions", {"session_ids": lost}))
        try:
            client = EngineClient(transport)
        except PagodaError as error:  # the supervisor tells why
            log.debug("no engine: %s", error)
            return None
        except Exception:
            transport.close()
            raise
        try:
            pipe = Pipeline(self.model, chat_template=self.chat_template, engine=client)
            pipe.check_length("")  # reads the vocabulary, which the first request need not wait for
        except Exception:
            client.close()
            raise
        with self._lock:
            if self._transport is not transport:
                return None
            self.attach(pipe)
        return pipe

    def lose(self) -> None:
        """The engine is gone: open requests end with an error."""
        with self._lock:
            pipe, transport = self._pipe, self._transport
            self._pipe, self._transport, self._address, self.state = None, None, None, "down"
        if pipe is not None:
            pipe.engine.close("The engine's process ended unexpectedly: try again in a moment.")
        elif transport is not None:
            transport.close()

    def remember(self, session: str) -> None:
        """A session has a turn: should its engine die, the next one will know that it was."""
        with self._lock:
            self._sessions[session] = None
            self._sessions.move_to_end(session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def forget(self, session: str) -> None:
        """A session is over."""
        with self._lock:
            self._sessions.pop(session, None)

    def abort_all(self) -> None:
        """End every open request; the clients are told."""
        if self._pipe is not None:
            self._pipe.engine.abort_all()

    def follow(self, event: dict[str, Any]) -> None:
        """One message of the supervisor."""
        if event["engine"] == "start":
            self._address = event["address"]
            threading.Thread(target=self.stay_connected, args=(event["address"],), daemon=True).start()
        elif event["engine"] == "down":
            self.lose()
        elif self._pipe is not None:
            self.state = {"stalled": "stalled", "moving": "ready"}[event["engine"]]

    def check_model(self, name: str | None) -> None:
        """Raises `NotFoundError` for a model that is not served here."""
        if name and name not in (self.name, self.model):
            raise NotFoundError(f"There is no model {name[:128]!r}: this server has {self.name!r}.")

    def log_prompt(self, request: Request, prepared: Prepared) -> None:
        """The beginning of a prompt, where the operator asked for it."""
        most = self.config.max_log_len
        if most:
            text = self.pipe.tokenizer.decode(prepared.request.prompt_ids[:most], skip_special=False)[:most]
            log.info("prompt", extra={"fields": {"request_id": request.state.request_id, "prompt": text}})

    async def prepare(self, work: Callable[..., R], *arguments: Any) -> R:
        """Run templates, tokenization and grammars in one of eight threads, with a deadline. The routes that ask are
        the guard's `LIMITED` ones, so no more wait for these threads than may be open. A thread that is past the
        deadline goes on until its work's own limits end it: templates have a time limit, texts and grammars one of
        size. What had not begun never will."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.wait_for(running, PREPARE_SECONDS)
        except asyncio.TimeoutError:
            raise OverloadedError(f"The prompt was not prepared within {PREPARE_SECONDS:g} s.") from None

    async def call(self, verb: str, timeout: float = 10.0, **arguments: Any) -> Any:
        """Ask the engine."""
        return await self.pipe.engine.ask(verb, timeout, **arguments)

    def tenant_of(self, key_digest: bytes) -> str:
        """The name under which a key's sessions and cached blocks are kept apart."""
        return hashlib.sha256(key_digest).hexdigest()[:16]
