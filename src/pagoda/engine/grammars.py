"""Which running request is held to which grammar, and the masks of a step."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagoda.engine.request import Output
from pagoda.engine.schedule import Schedule
from pagoda.errors import EngineError, GrammarError, PagodaError
from pagoda.log import get_logger
from pagoda.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pagoda.text.grammar import GrammarMasks

MAX_MADE = 16
"""Matchers kept for requests to come, of up to some megabytes each."""
FAILED = "The engine failed on this request; its log says why."

log = get_logger(__name__)


class Grammars:
    """The grammar state of requests. Matchers are made by threads of its own (the library lets go of Python's lock,
    and takes up to tenths of a second), one for all requests of the same grammar; the other methods are for the loop.
    The vocabulary is read by `read`, or when the first grammar comes. What goes wrong with a grammar ends its own
    requests."""

    def __init__(self, text: Path, vocab_size: int):
        self._text, self._vocab_size = text, vocab_size
        self._masks: GrammarMasks | None = None
        self._matchers: dict[str, Any] = {}
        self._by_slot: dict[int, str] = {}
        self._errors: dict[int, dict[int, str]] = {}  # by step and slot
        self._threads, self._reading = ThreadPoolExecutor(4, thread_name_prefix="pagoda-grammar"), threading.Lock()
        self._wanted: dict[str, list[str]] = {}  # by grammar: the requests that wait for it
        self._made: OrderedDict[str, Any] = OrderedDict()  # by grammar, to be copied
        self._ends: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()  # a grammar, and its matcher or its error

    def read(self) -> None:
        """Read the vocabulary: seconds for a large one, and Python's lock is held for tenths of a second on the way, in
        which streams stand still."""
        from pagoda.text.grammar import GrammarMasks  # its library is slow to import

        self._masks = GrammarMasks(load_tokenizer(self._text), self._vocab_size)

    def read_early(self) -> None:
        """`read`, where nobody needs it yet: what is wrong is told to the first request that does."""
        try:
            self.read()
        except Exception as error:
            log.debug("no grammars: %s", error)

    def begin(self, request_id: str, grammar: str) -> None:
        """A request waits for its matcher until `settled` says that it is there."""
        waiting = self._wanted.setdefault(grammar, [])
        waiting.append(request_id)
        if grammar in self._made:
            self._ends.put((grammar, self._made[grammar]))
        elif len(waiting) == 1:
            try:
                self._threads.submit(self._make, grammar)
            except RuntimeError as error:  # no more threads can be had
                self._ends.put((grammar, error))

    def _make(self, grammar: str) -> None:
        """In a thread."""
        if grammar not in self._wanted:  # those who waited have left
            return
        try:
            with self._reading:
                if self._masks is None:
                    self.read()
            assert self._masks is not None
            self._ends.put((grammar, self._masks.matcher(grammar)))
        except Exception as error:
            self._ends.put((grammar, error))

    @property
    def num_wanted(self) -> int:
        return len(self._wanted)

    def settled(self) -> Iterator[tuple[str, PagodaError | None]]:
        """The requests that need not wait any more, each with the error that ends it, if any."""
        while not self._ends.empty():
            grammar, made = self._ends.get()
            error = made if isinstance(made, PagodaError) else EngineError(FAILED)
            if not isinstance(made, Exception):
                self._made[grammar] = made
                self._made.move_to_end(grammar)
                while len(self._made) > MAX_MADE:
                    self._made.popitem(last=False)
            elif error is not made:
                log.error("a grammar failed", exc_info=made)
            for request_id in self._wanted.pop(grammar, ()):
                if isinstance(made, Exception):
                    yield request_id, error
                else:
                    self._matchers[request_id] = made.copy()
                    yield request_id, None

    def drop(self, request_id: str) -> None:
        """The request has ended; also one that never came."""
        self._matchers.pop(request_id, None)
        for grammar in [g for g, waiting in self._wanted.items() if request_id in waiting]:
            self._wanted[grammar].remove(request_id)
            if not self._wanted[grammar]:
                del self._wanted[grammar]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def accept(self, output: Output) -> bool:
        """Follow a request's new tokens; False when its grammar failed."""
        matcher = self._matchers.get(output.id)
        try:
            for token in output.token_ids if matcher is not None else ():
                matcher.accept(token)
        except Exception:
            log.exception("a grammar failed")
            return False
        return True

    def masks(self, schedule: Schedule) -> np.ndarray | None:
        """Packed bitmasks beside the sampling positions, where a step needs them; those without a grammar allow all,
        and so do those whose grammar fails: `take_errors` tells of them. Must see every schedule: a slot's tenant may
        arrive in one step and sample in a later one."""
        self._by_slot.update((init.slot, init.id) for init in schedule.inits)
        if not schedule.needs_masks:
            return None
        slots = [row.slot for row in schedule.rows for _ in range(row.samples)]
        mask_LW = np.full((len(slots), -(-self._vocab_size // 32)), -1, np.int32)
        for i, slot in enumerate(slots):
            matcher = self._matchers.get(self._by_slot.get(slot, ""))
            if matcher is not None:
                try:
                    matcher.fill_mask(mask_LW[i])
                except Exception as error:
                    known = isinstance(error, GrammarError)
                    if not known:
                        log.exception("a grammar failed")
                    self._errors.setdefault(schedule.step, {})[slot] = str(error) if known else FAILED
        return mask_LW

    def take_errors(self, step: int) -> dict[int, str]:
        """Sentences for the slots whose grammar failed in a step."""
        return self._errors.pop(step, {})
