"""A server as a user starts it: processes, found and ended by their ids."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

LINE = "serve api_server mini --server_name 127.0.0.1 --server_port 0 --instance_num 8 --tp 1 --session_len 1024"


def children(pid: int, module: str) -> list[int]:
    """Process ids of a process's children that run `python -m module`."""
    pids = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [p for p in pids if module.encode() in Path(f"/proc/{p}/cmdline").read_bytes()]


class Server:
    def __init__(self, *flags: str, verify: bool = True):
        command = [sys.executable, "-m", "pagoda.cli.main", *LINE.split(), "--num_threads", "1", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.report = ""
        while not (found := re.search(r"serving at (\S+)", self.report)):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.report += line
        self.http = httpx.Client(base_url=found[1], timeout=30, verify=verify)
        self.until("ready", 200)

    def until(self, route: str, status: int, seconds: float = 30.0) -> float:
        """Seconds until a route answers with a status."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get(f"/{route}").status_code == status:
                    return time.monotonic() - started
        raise AssertionError(f"/{route} did not become {status} within {seconds} s")

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors
