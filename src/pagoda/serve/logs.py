"""A server's log: one JSON object a line, written by a thread of its own."""

import atexit
import json
import logging
import queue
import sys
import time
from logging.handlers import QueueHandler, QueueListener

from pagoda.log import install

MAX_WAITING_LINES = 10_000
LAST_SECONDS = 1.0


class JsonLines(logging.Formatter):
    """One JSON object a line; the record's `fields` are among its own, control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, "fields", {})})


class Unhurried(QueueHandler):
    """Hands records to the writing thread, and drops what that cannot keep up with: a reader of the log that stands
    still must not stop a server."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def setup_json_logging(level: str) -> None:
    """Send Pagoda's messages of `level` and above to stderr."""
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(JsonLines())
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING_LINES)
    QueueListener(waiting, writer).start()
    atexit.register(_finish, waiting)
    install(Unhurried(waiting), level)


def _finish(waiting: "queue.Queue[logging.LogRecord]") -> None:
    """The last lines are written, unless nobody takes them."""
    until = time.monotonic() + LAST_SECONDS
    while not waiting.empty() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.01)
