"""The queue: requests without a slot, in the order in which they get one."""

from bisect import insort
from operator import attrgetter

from pagoda.engine.sequence import Sequence
from pagoda.errors import OverloadedError

ORDER = attrgetter("order")


class Waiting:
    """`max_requests` may wait, and prompts of `max_tokens` (0: no limit; one prompt always may). Those that are `held`
    are passed over."""

    def __init__(self, max_requests: int, max_tokens: int):
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._queue: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._queue)

    def check_room(self, num_tokens: int) -> None:
        """Raises `OverloadedError` when a request of so many tokens may not wait."""
        if len(self._queue) >= self._max_requests:
            raise OverloadedError(f"{len(self._queue)} requests wait already, the most allowed: try again later.")
        waiting = sum(len(seq.request.prompt_ids) for seq in self._queue) if self._max_tokens else 0
        if waiting and waiting + num_tokens > self._max_tokens:
            raise OverloadedError(
                f"Prompts of {waiting} tokens wait already, {self._max_tokens} are allowed: try again later."
            )

    def add(self, seq: Sequence) -> None:
        insort(self._queue, seq, key=ORDER)

    def remove(self, seq: Sequence) -> None:
        self._queue.remove(seq)

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        return next((seq for seq in self._queue if not seq.held), None)

    def late(self, now: float) -> list[Sequence]:
        """Those that waited for their first slot longer than their `max_wait`."""
        return [s for s in self._queue if s.num_cached is None and 0 < s.request.max_wait < now - s.request.arrival]
