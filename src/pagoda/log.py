"""Logging: the standard library's, one logger per module, one format, to stderr by a thread of its own."""

import atexit
import logging
import queue
import sys
import time
from logging.handlers import QueueHandler, QueueListener

MAX_WAITING_LINES = 10_000
LAST_SECONDS = 1.0


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is the module's `__name__`."""
    return logging.getLogger(name)


def setup_logging(level: str = "warning", formatter: logging.Formatter | None = None) -> None:
    """Send Pagoda's messages of `level` and above, and the warnings of the libraries that it uses, to stderr. Called by
    programs, never by the library."""
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(formatter or logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING_LINES)
    QueueListener(waiting, writer).start()
    atexit.register(_finish, waiting)
    everybody, ours = logging.getLogger(), logging.getLogger("pagoda")
    everybody.handlers[:] = ours.handlers[:] = [_Unhurried(waiting)]
    ours.setLevel(level.upper())
    ours.propagate = False


class _Unhurried(QueueHandler):
    """Hands records to the writing thread, and drops what that cannot keep up with: a reader of the log that stands
    still must not stop a server."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def _finish(waiting: "queue.Queue[logging.LogRecord]") -> None:
    """The last lines are written, unless nobody takes them."""
    until = time.monotonic() + LAST_SECONDS
    while not waiting.empty() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.01)
