"""Which running request is held to which grammar, and the masks of a step."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagoda.engine.request import Output
from pagoda.engine.schedule import Schedule
from pagoda.errors import GrammarError
from pagoda.log import get_logger
from pagoda.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pagoda.text.grammar import GrammarMasks

FAILED = "The engine failed on this request; its log says why."

log = get_logger(__name__)


class Grammars:
    """The grammar state of running requests. The vocabulary is read by `read`, or when the first grammar comes. What
    goes wrong with a grammar ends its own request."""

    def __init__(self, text: Path, vocab_size: int):
        self._text, self._vocab_size = text, vocab_size
        self._masks: GrammarMasks | None = None
        self._matchers: dict[str, Any] = {}
        self._by_slot: dict[int, str] = {}
        self._errors: dict[int, dict[int, str]] = {}  # by step and slot

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

    def add(self, request_id: str, grammar: str) -> None:
        if self._masks is None:
            self.read()
        assert self._masks is not None
        self._matchers[request_id] = self._masks.matcher(grammar)

    def drop(self, request_id: str) -> None:
        self._matchers.pop(request_id, None)

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
