"""Logging: the standard library's, one logger per module, one format, to stderr."""

import json
import logging
import sys

LEVELS = ("debug", "info", "warning", "error")


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is the module's `__name__`."""
    return logging.getLogger(name)


class JsonLines(logging.Formatter):
    """One JSON object a line; the record's `fields` are among its own, control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, "fields", {})})


def setup_logging(level: str = "warning", as_json: bool = False) -> None:
    """Send Pagoda's messages of `level` and above to stderr. Called by programs, never by the library."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines() if as_json else plain)
    root = logging.getLogger("pagoda")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
