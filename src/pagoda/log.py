"""Logging: the standard library's, one logger per module, one format, to stderr."""

import logging
import sys


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is the module's `__name__`."""
    return logging.getLogger(name)


def setup_logging(level: str = "warning") -> None:
    """Send Pagoda's messages of `level` and above to stderr. Called by programs, never by the library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    install(handler, level)


def install(handler: logging.Handler, level: str) -> None:
    """Send them to `handler`."""
    root = logging.getLogger("pagoda")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
