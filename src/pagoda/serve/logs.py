"""A server's log: one JSON object a line."""

import json
import logging

from pagoda.log import setup_logging


class JsonLines(logging.Formatter):
    """One JSON object a line; the record's `fields` are among its own, control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, "fields", {})})


def setup_json_logging(level: str) -> None:
    """Send Pagoda's messages of `level` and above to stderr."""
    setup_logging(level, JsonLines())
