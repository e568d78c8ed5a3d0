"""One HTTP process: `python -m pagoda.serve.worker`. Reads its job, then the supervisor's messages, as JSON lines from
standard input; when that ends the supervisor is gone, and so is the worker."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
from typing import Any

import uvicorn
import uvloop

from pagoda.config import ServeConfig
from pagoda.errors import ConfigError
from pagoda.serve.app import make_app
from pagoda.serve.backend import Backend
from pagoda.serve.bounded_http import BoundedHttp
from pagoda.serve.http_process import BEAT_SECONDS
from pagoda.serve.logs import setup_json_logging

LAST_SECONDS = 1.0
"""After the drain: time for aborted answers to say so."""


class Server(uvicorn.Server):
    """Drains on SIGTERM: no new connections, open answers get `drain_seconds`, then they are aborted."""

    def __init__(self, config: uvicorn.Config, backend: Backend):
        super().__init__(config)
        self._backend = backend

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._backend.state = "draining"
        timer = asyncio.get_running_loop().call_later(self._backend.config.drain_seconds, self._backend.abort_all)
        await super().shutdown(sockets)
        timer.cancel()


def uvicorn_config(backend: Backend, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn listens; our own middleware writes the log."""
    return uvicorn.Config(
        make_app(backend, config),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=BoundedHttp,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(config.drain_seconds + LAST_SECONDS + 0.999),
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )


def follow(backend: Backend, lines: Any) -> None:
    """Obey the supervisor until it is gone."""
    for line in lines:
        backend.follow(json.loads(line))
    os.kill(os.getpid(), signal.SIGTERM)


async def beat(fd: int) -> None:
    """Tell the supervisor that this event loop turns."""
    os.set_blocking(fd, False)
    while True:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # it does not read, or is gone
            os.write(fd, b".")
        await asyncio.sleep(BEAT_SECONDS)


async def serve(server: Server, listener: socket.socket, beats: int) -> None:
    """Until SIGTERM, and the drain."""
    beating = asyncio.create_task(beat(beats))
    await server.serve(sockets=[listener])
    beating.cancel()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    config = ServeConfig.from_mapping(job["serve"])
    setup_json_logging(config.log_level)
    backend = Backend(job["model"], config, job["chat_template"])
    try:
        server = Server(uvicorn_config(backend, config), backend)
        server.config.load()
    except (ConfigError, OSError) as error:
        print(f"pagoda: {error}", file=sys.stderr)
        sys.exit(2)
    gc.collect()
    gc.freeze()  # full collections leave out what lives as long as the process: the modules
    threading.Thread(target=follow, args=(backend, sys.stdin), daemon=True).start()
    uvloop.run(serve(server, socket.socket(fileno=job["fd"]), job["beats"]))


if __name__ == "__main__":
    main()
