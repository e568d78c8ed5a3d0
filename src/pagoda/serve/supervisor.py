"""`pagoda serve`: starts the engine and the HTTP processes, watches them, restarts what dies, drains when told."""

import signal
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from pagoda.config import EngineConfig, ServeConfig
from pagoda.engine.client import EngineClient
from pagoda.engine.transports import SocketTransport, spawn_engine
from pagoda.errors import ConfigError, EngineDeadError, PagodaError
from pagoda.log import get_logger
from pagoda.models.find import resolve_model
from pagoda.serve.addresses import listen, reachable
from pagoda.serve.bell import Bell
from pagoda.serve.http_process import HttpProcess
from pagoda.serve.middleware import read_keys

MAX_RESTARTS, RESTART_SECONDS = 3, 600.0
PING_SECONDS, LOOK_SECONDS = 1.0, 0.5
STALL_SECONDS, HANG_SECONDS = 4.0, 120.0
"""Without an answer to a ping the engine is stalled after the first time if it does not compute either, after the
second whatever it does; it is killed after the second."""

log = get_logger(__name__)


class Stopped(BaseException):
    """SIGTERM or SIGINT came."""


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process has used; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / 100


class Watch:
    """Tells whether the engine moves: it answers pings, or at least computes."""

    def __init__(self, client: EngineClient, pid: int):
        self._client, self._pid = client, pid
        self._answered = self._computed = time.monotonic()
        self._cpu = cpu_seconds(pid)

    def look(self) -> tuple[bool, float]:
        """(moving, seconds since the last answer). Takes up to `PING_SECONDS`."""
        try:
            self._client.call("ping", timeout=PING_SECONDS)
            self._answered = time.monotonic()
        except EngineDeadError:
            pass
        now, cpu = time.monotonic(), cpu_seconds(self._pid)
        if cpu is None or self._cpu is None or cpu > self._cpu + 0.02:
            self._computed, self._cpu = now, cpu
        silent = now - self._answered
        return silent < STALL_SECONDS or (now - self._computed < STALL_SECONDS and silent < HANG_SECONDS), silent


class Supervisor:
    """One server. `run` returns the exit code."""

    def __init__(self, model: str, engine: EngineConfig, serve: ServeConfig, chat_template: str | None = None):
        resolve_model(model)
        self.model, self.engine, self.serve, self.chat_template = model, engine, serve, chat_template
        self.has_keys = bool(read_keys(serve.api_keys))
        try:
            self._listener = listen(serve.server_name, serve.server_port)
        except OSError as error:
            where = f"{serve.server_name}:{serve.server_port}"
            raise ConfigError(f"Cannot listen on {where} ({error.strerror}): choose another --server-port.") from None
        if (serve.ssl_certfile is None) != (serve.ssl_keyfile is None):
            raise ConfigError("TLS needs both ssl_certfile and ssl_keyfile.")
        self._workers: list[HttpProcess] = []
        self._deaths: deque[float] = deque()
        self._served = False  # an engine of ours has been ready once
        self._client: EngineClient | None = None
        self._transport: SocketTransport | None = None
        self._told = self._told_twice = False  # to stop
        self._state = ""

    @property
    def url(self) -> str:
        scheme = "https" if self.serve.ssl_certfile else "http"
        return f"{scheme}://{reachable(self.serve.server_name)}:{self._listener.getsockname()[1]}"

    def run(self) -> int:
        """Serve until a signal comes, or until things die too often."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._bell = Bell()
        try:
            self._workers = [self._start_worker() for _ in range(self.serve.num_http_workers)]
            while True:
                self._live()
        except Stopped:
            log.info("draining: open requests get %g s", self.serve.drain_seconds)
            return self._drain()
        finally:
            self._end()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Only noted: raised amid the start of a process, it would leave that alone in the world."""
        self._told, self._told_twice = True, self._told

    def _start_worker(self) -> HttpProcess:
        job = {"model": self.model, "serve": asdict(self.serve), "chat_template": self.chat_template}
        return HttpProcess(self._listener.fileno(), job)

    def _tell_all(self, state: str, **more: Any) -> None:
        if state != self._state or more:
            self._state = state
            for worker in self._workers:
                worker.tell({"engine": state, **more})

    def _live(self) -> None:
        """One life of the engine."""
        transport = self._transport = spawn_engine(self.model, self.engine, for_grammars=True)
        self._tell_all("start", address=transport.address)
        try:
            self._client = EngineClient(transport, lambda: self._look_around(transport.address))
        except PagodaError as error:
            if not self._served:
                raise  # the first start: what is wrong is the user's to mend
            transport.close()
            log.error("the engine could not start again: %s", error)
            self._tell_all("down")
            return self._count_death("the starting engine")
        self._served = True
        self._report(self._client)
        self._attend(self._client, transport)
        self._tell_all("down")
        self._client.close()
        self._count_death("the engine")

    def _attend(self, client: EngineClient, transport: SocketTransport) -> None:
        """Watch until the engine is dead."""
        assert transport.process is not None
        watch, looked = Watch(client, transport.process.pid), time.monotonic()
        while client.dead is None:
            self._bell.wait(LOOK_SECONDS)
            self._look_around(transport.address)
            if transport.process.poll() is not None:
                client.wait_dead()
            if time.monotonic() - looked < PING_SECONDS:
                continue
            moving, silent = watch.look()
            looked = time.monotonic()
            if client.dead is None:
                self._tell_all("moving" if moving else "stalled")
            if silent > HANG_SECONDS and not moving:
                log.error("the engine has not answered for %.0f s: it is killed", silent)
                transport.process.kill()

    def _look_around(self, address: str) -> None:
        """Replace the HTTP processes that died. Raises `Stopped`."""
        if self._told:
            raise Stopped
        for i, worker in enumerate(self._workers):
            hangs = worker.pulse.lost()
            if hangs or worker.process.poll() is not None:
                if hangs:
                    log.error("the event loop of an HTTP process hangs: it is killed")
                worker.kill()
                self._count_death("an HTTP process")
                self._workers[i] = self._start_worker()
                self._workers[i].tell({"engine": "start", "address": address})

    def _count_death(self, what: str) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > RESTART_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > MAX_RESTARTS:
            raise EngineDeadError(f"{what} died {len(self._deaths)} times within {RESTART_SECONDS:.0f} s: giving up.")
        log.error("%s died and is started again", what)

    def _report(self, client: EngineClient) -> None:
        for line in client.info.report:
            print(line, flush=True)
        if self.serve.server_name not in ("127.0.0.1", "localhost", "::1") and not self.has_keys:
            print("warning: everybody who reaches this address may use it; --api-keys closes it", flush=True)
        print(f"serving at {self.url} (the routes: {self.url}/docs)", flush=True)

    def _drain(self) -> int:
        """Workers end by themselves; whatever is left after the grace is killed."""
        self._listener.close()
        for worker in self._workers:
            worker.process.terminate()
        until = time.monotonic() + self.serve.drain_seconds + 2.0
        while any(worker.process.poll() is None for worker in self._workers):
            if time.monotonic() > until or self._told_twice:
                return 1
            self._bell.wait(LOOK_SECONDS)
        return 0

    def _end(self) -> None:
        """Nothing that we started survives us."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._listener.close()
        for worker in self._workers:
            worker.kill()
        for ours in (self._client, self._transport):
            if ours is not None:
                ours.close()
