"""Waiting that a signal ends, so that nobody has to look twenty times a second whether one came."""

import os
import select
import signal


class Bell:
    """Signals that have a handler, and the end of a child, ring it. For the main thread, which takes all signals."""

    def __init__(self) -> None:
        self._ear, mouth = os.pipe()
        for fd in (self._ear, mouth):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # else it would not ring

    def wait(self, seconds: float) -> None:
        """Until it rings, or has rung since the last wait."""
        if select.select([self._ear], [], [], seconds)[0]:
            os.read(self._ear, 1 << 16)
