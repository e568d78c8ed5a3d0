"""The supervisor's side of one HTTP process: its job and news go to its standard input, its event loop beats back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

BEAT_SECONDS = 1.0
SILENT_SECONDS, START_SECONDS = 10.0, 120.0
"""An event loop without a beat for so long hangs; the second is for the first beat."""


class Pulse:
    """Reads beats from a pipe."""

    def __init__(self, fd: int, clock: Callable[[], float] = time.monotonic):
        os.set_blocking(fd, False)
        self._fd, self._clock, self._looked = fd, clock, clock()
        self._silence, self._limit = 0.0, START_SECONDS

    def lost(self) -> bool:
        """Whether the beats ceased. A long time between two looks proves nothing: both sides may have stood still."""
        now = self._clock()
        self._silence += min(now - self._looked, 2 * BEAT_SECONDS)
        self._looked = now
        try:
            if os.read(self._fd, 1 << 16):
                self._silence, self._limit = 0.0, SILENT_SECONDS
        except BlockingIOError:
            pass
        return self._silence > self._limit


class HttpProcess:
    """One `pagoda.serve.worker` that accepts from the socket `listener`."""

    def __init__(self, listener: int, job: dict[str, Any]):
        self._beats, beats = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pagoda.serve.worker"],
                stdin=subprocess.PIPE,
                pass_fds=[listener, beats],
                start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone
            )
        finally:
            os.close(beats)
        self.pulse = Pulse(self._beats)
        self.tell({**job, "fd": listener, "beats": beats})

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it died: it will be replaced
            return

    def kill(self) -> None:
        """End it now, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._beats)
