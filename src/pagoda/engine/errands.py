"""Work that must not hold up the engine's loop, such as writing files: done by one thread, ended by the loop."""

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from pagoda.errors import OverloadedError

MAX_OPEN = 16


class Errand(NamedTuple):
    """`work` runs in the thread and touches nothing of the engine's; `then` takes its result, in the loop, and returns
    the answer."""

    work: Callable[[], Any]
    then: Callable[[Any], Any]


class Errands:
    """One after the other. All methods are for the loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pagoda-errand")
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.num_open = 0

    def start(self, errand: Errand, report: Callable[[Callable[[], Any]], None]) -> None:
        """`finish` will give `report` a call that returns the answer or raises the error. Raises `OverloadedError`."""
        if self.num_open >= MAX_OPEN:
            raise OverloadedError("Many sessions files are being written and read already: try again later.", 5.0)
        self.num_open += 1

        def over(future: "Future[Any]") -> None:
            self._done.put(lambda: report(lambda: errand.then(future.result())))

        self._thread.submit(errand.work).add_done_callback(over)

    def finish(self) -> None:
        """Report those that are done."""
        while not self._done.empty():
            self.num_open -= 1
            self._done.get()()

    def close(self) -> None:
        """Wait for all of them, and report."""
        self._thread.shutdown()
        self.finish()
