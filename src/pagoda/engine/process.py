"""The engine itself: one loop that takes messages, plans steps, launches them and reports tokens.

It runs as a thread (`InlineTransport`) or as a process of its own: `python -m pagoda.engine.process` reads its job as
JSON from standard input and serves clients on a Unix socket until it is terminated or its parent is gone.
"""

import gc
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from pagoda.config import EngineConfig
from pagoda.engine import wire
from pagoda.engine.errands import Errand, Errands
from pagoda.engine.grammars import FAILED, Grammars
from pagoda.engine.params import id_list, read_generation_defaults
from pagoda.engine.ranks import LocalRanks
from pagoda.engine.ray_ranks import RayRanks
from pagoda.engine.request import EngineRequest, Output
from pagoda.engine.runner import Runner
from pagoda.engine.schedule import Schedule
from pagoda.engine.scheduler import Scheduler
from pagoda.engine.scheduler_config import SchedulerConfig
from pagoda.engine.session_files import read_sessions, write_sessions
from pagoda.engine.sessions import Sessions
from pagoda.engine.sockets import SocketServer
from pagoda.engine.workers import Workers
from pagoda.errors import EngineError, PagodaError
from pagoda.layers.parallel import Group
from pagoda.log import get_logger, setup_logging
from pagoda.models.find import resolve_model, text_folder
from pagoda.models.loader import resolve_spec

Poll = Callable[[float | None], list[tuple[bytes, wire.ToEngine]]]
Send = Callable[[bytes, wire.FromEngine], None]

IDLE_SECONDS = 1.0
ERRAND_SECONDS = 0.01  # between looks at an errand, where there is nothing else to do
GRAMMAR_SECONDS = 0.001  # ... at a grammar that a request waits for

log = get_logger(__name__)


class EngineLoop:
    """Drives scheduler and workers. `connect` a transport, then `run` until `stop`."""

    def __init__(self, scheduler: Scheduler, workers: Workers, info: wire.EngineInfo, grammars: Grammars):
        self.info, self._scheduler, self._workers, self._grammars = info, scheduler, workers, grammars
        self._owner: dict[str, bytes] = {}
        self._flights: deque[Schedule] = deque()
        self._errands = Errands()
        self._stopping = False
        self.calls: dict[str, Callable[..., Any]] = {
            "stats": self._scheduler.stats,
            "list_sessions": self._scheduler.sessions.list,
            "delete_session": self._scheduler.sessions.delete,
            "lose_sessions": self._scheduler.sessions.lose,
            "session_tokens": self._scheduler.sessions.look_up,
            "abort_requests": self._abort_requests,
            "save_sessions": self._save_sessions,
            "restore_sessions": self._restore_sessions,
            "ping": lambda: None,
        }

    def connect(self, poll: Poll, send: Send) -> None:
        """`poll(seconds)` waits for messages (0: only looks, None: as long as it takes); `send` to b"" is to all."""
        self._poll, self._send = poll, send

    def stop(self) -> None:
        """End the loop after the step under way; safe from any thread or signal handler."""
        self._stopping = True

    def run(self) -> bool:
        """Work until stopped. Whatever goes wrong, every open request gets its end and all memory is given back.
        Returns whether it ended in order."""
        try:
            while not self._stopping:
                busy = self._scheduler.has_work or bool(self._flights)
                for sender, message in self._poll(0 if busy else self._patience()):
                    self._take(sender, message)
                self._errands.finish()
                self._settle()
                self._scheduler.sessions.expire()
                self._emit(self._scheduler.expire_waiting())
                self._step()
            self._errands.close()
            self._end("abort", "The engine is shutting down.")
            return True
        except Exception as error:
            log.exception("the engine failed")
            why = str(error) if isinstance(error, PagodaError) else f"{type(error).__name__}: {error}"
            self._end("error", f"The engine failed: {why}")
            self._send(b"", wire.Dead(("EngineDeadError", f"The engine failed: {why}")))
            return False
        finally:
            self._grammars.close()
            self._workers.close()

    def _patience(self) -> float:
        """How long messages may be waited for, where there is nothing else to do."""
        if self._grammars.num_wanted:
            return GRAMMAR_SECONDS
        return ERRAND_SECONDS if self._errands.num_open else IDLE_SECONDS

    def _settle(self) -> None:
        """Requests whose grammar is there may go on, or end with its error."""
        ends = [self._scheduler.settle(request_id, error) for request_id, error in self._grammars.settled()]
        self._emit([end for end in ends if end is not None])

    def _step(self) -> None:
        """Launch the next step, then digest the oldest one that is due."""
        schedule = self._scheduler.schedule()
        if schedule is not None:
            self._workers.launch(schedule, self._grammars.masks(schedule))
            self._flights.append(schedule)
        if self._flights and (schedule is None or len(self._flights) > self._workers.run_ahead):
            oldest, result = self._flights.popleft(), self._workers.collect()
            result.errors |= self._grammars.take_errors(oldest.step)
            self._emit(self._scheduler.digest(oldest, result))

    def _take(self, sender: bytes, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Submit):
            self._submit(sender, message.request)
        elif isinstance(message, wire.Abort):
            output = self._scheduler.abort(message.id, message.keep_tokens)
            if output is not None:
                self._emit([output])
        elif isinstance(message, wire.Call):
            self._answer(sender, message)
        else:
            for request_id in [i for i, owner in self._owner.items() if owner == sender]:
                self._scheduler.abort(request_id)
                self._forget(request_id)

    def _submit(self, sender: bytes, request: EngineRequest) -> None:
        try:
            if request.id in self._owner:
                raise EngineError(f"The request id {request.id!r} is in use: choose another.")
            self._scheduler.add(request, held=request.params.grammar is not None)
            self._owner[request.id] = sender
            if request.params.grammar is not None:
                self._grammars.begin(request.id, request.params.grammar)
        except Exception as failure:
            error = failure if isinstance(failure, PagodaError) else EngineError(FAILED)
            if error is not failure:
                log.exception("a request failed")
            refusal = Output(request.id, finish_reason="error", error=str(error), error_kind=type(error).__name__)
            self._send(sender, wire.Outputs([refusal]))

    def _answer(self, sender: bytes, call: wire.Call) -> None:
        if call.verb == "hello":
            self._send(sender, wire.Ready(self.info))
        else:
            self._report(sender, call, lambda: self.calls[call.verb](**call.arguments))

    def _report(self, sender: bytes, call: wire.Call, result: Callable[[], Any]) -> None:
        """Answer with what `result` returns or raises, or when its errand is done."""
        try:
            value = result()
            if isinstance(value, Errand):
                self._errands.start(value, lambda end: self._report(sender, call, end))
            else:
                self._send(sender, wire.Answer(call.seq, msgspec.to_builtins(value)))
        except PagodaError as error:
            self._send(sender, wire.Answer(call.seq, error=(type(error).__name__, str(error))))
        except (KeyError, TypeError) as error:
            self._send(sender, wire.Answer(call.seq, error=("EngineError", f"Bad call {call.verb!r}: {error}.")))
        except Exception as error:
            log.exception("the call %s failed", call.verb)
            why = f"The call {call.verb!r} failed ({type(error).__name__}): the engine's log says why."
            self._send(sender, wire.Answer(call.seq, error=("EngineError", why)))

    def _emit(self, outputs: list[Output]) -> None:
        """One message for each client that has news."""
        by_sender: dict[bytes, list[Output]] = {}
        now = time.monotonic()
        for output in outputs:
            output.time = now
            if not self._grammars.accept(output) and output.finish_reason is None:
                self._scheduler.abort(output.id)
                output.finish_reason, output.error = "error", FAILED
            sender = self._owner.get(output.id)
            if sender is not None:
                by_sender.setdefault(sender, []).append(output)
            if output.finish_reason is not None:
                self._forget(output.id)
        for sender, news in by_sender.items():
            self._send(sender, wire.Outputs(news))

    def _forget(self, request_id: str) -> None:
        self._owner.pop(request_id, None)
        self._grammars.drop(request_id)

    def _end(self, reason: Any, message: str) -> None:
        """Exactly one last output for every open request."""
        error = message if reason == "error" else None
        self._emit([Output(request_id, finish_reason=reason, error=error) for request_id in self._owner])

    def _save_sessions(self, path: str, prefix: str = "") -> Errand:
        """Those whose id begins with `prefix`."""
        histories = self._scheduler.sessions.snapshot(prefix)
        return Errand(lambda: write_sessions(Path(path), self.info.model, histories), lambda _: len(histories))

    def _restore_sessions(self, path: str, prefix: str = "") -> Errand:
        info = self.info
        read = partial(read_sessions, Path(path), info.model, info.vocab_size, prefix)
        return Errand(read, self._scheduler.sessions.adopt)

    def _abort_requests(self, prefix: str | None = None, session_id: str | None = None) -> int:
        """Abort by the beginning of the id, or the running turn of a session; tells how many there were."""
        prefix = self._scheduler.sessions.turn(session_id) if session_id is not None else prefix
        ends = self._scheduler.abort_all(prefix) if prefix else []
        self._emit(ends)
        return len(ends)


def build_engine(
    model: str | Path,
    config: EngineConfig,
    progress: Callable[[float], None] | None = None,
    last_words: Callable[[PagodaError], None] | None = None,
    for_grammars: bool = False,
    place: Path | None = None,
) -> EngineLoop:
    """Load a model and put an engine around it. `progress` is told the share of the weights that is loaded;
    `last_words` an error that ends this process. `for_grammars`: read the vocabulary for them beside the weights, so
    that the first grammar delays no stream. `place`: a folder for temporary files."""
    folder = resolve_model(str(model))
    spec, config = resolve_spec(folder, config)
    started = time.monotonic()
    text = text_folder(folder)
    grammars = Grammars(text, spec.vocab_size)
    reader = threading.Thread(target=grammars.read_early, daemon=True)
    if for_grammars:
        reader.start()
    workers = start_workers(folder, spec, config, progress, last_words, place)
    plan = workers.plan
    if for_grammars:
        reader.join()
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch_size=config.max_batch_size,
            max_step_tokens=max(config.max_prefill_token_num, config.max_batch_size),
            block_len=plan.block_len,
            num_blocks=plan.num_blocks,
            session_len=plan.session_len,
            prefix_caching=config.enable_prefix_caching,
            num_guesses=config.speculative_ngram,
            max_queued=config.max_queued_requests or 4 * config.max_batch_size,
            max_queued_tokens=config.max_queued_tokens or 0,
            cache_variant=spec.rope.variant,
        ),
        Sessions(ttl=config.session_ttl),
    )
    eos = dict.fromkeys((*spec.eos_ids, *id_list(read_generation_defaults(text).get("eos_token_id"))))
    info = wire.EngineInfo(
        model=str(model),
        family=spec.family,
        session_len=scheduler.max_len,
        max_batch_size=config.max_batch_size,
        block_len=plan.block_len,
        num_blocks=plan.num_blocks,
        vocab_size=spec.vocab_size,
        eos_ids=list(eos),
        max_queued=scheduler.config.max_queued,
        report=[*workers.describe(), f"ready in {time.monotonic() - started:.2f} s"],
    )
    return EngineLoop(scheduler, workers, info, grammars)


def start_workers(
    folder: Path, spec: Any, config: EngineConfig, progress: Any, last_words: Any, place: Path | None
) -> Workers:
    """The ranks that `config` asks for."""
    if config.executor == "ray":
        return RayRanks(folder, spec, config, progress)
    if config.tp > 1:
        return LocalRanks(folder, spec, config, progress, last_words, place)
    runner = Runner(folder, spec, config, Group.single(), progress)
    runner.start()
    return runner


def main() -> None:
    """Entry of the engine's process."""
    setup_logging()
    job = json.loads(sys.stdin.buffer.read())

    def leave_word(error: PagodaError) -> None:
        words = json.dumps((type(error).__name__, str(error)))
        Path(job["last_words"]).write_text(words, encoding="utf-8")

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the client
    server = SocketServer(socket.socket(fileno=job["listener"]), job["parent"])
    try:
        config, early = EngineConfig.from_mapping(job["config"]), job["for_grammars"]
        place = Path(job["last_words"]).parent
        loop = build_engine(job["model"], config, last_words=leave_word, for_grammars=early, place=place)
    except PagodaError as error:
        server.poll(5.0)
        server.send(b"", wire.Dead((type(error).__name__, str(error))))
        server.close()
        sys.exit(error.exit_code)
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    loop.connect(server.poll, server.send)
    gc.collect()
    gc.freeze()  # else each full collection walks through all modules, for a tenth of a second without a token
    in_order = loop.run()
    server.close()
    if os.getppid() != server.parent:
        shutil.rmtree(Path(job["last_words"]).parent, ignore_errors=True)
    if not in_order:  # a device or a lost rank may keep the interpreter from ending
        os._exit(1)


if __name__ == "__main__":
    main()
