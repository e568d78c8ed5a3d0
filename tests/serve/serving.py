"""A server in a thread of the test process."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import uvicorn

from pagoda import ServeConfig
from pagoda.offline import Pipeline
from pagoda.serve.app import make_app
from pagoda.serve.backend import Backend


@dataclass
class Running:
    url: str
    pipe: Pipeline
    backend: Backend
    http: httpx.Client


def serve(pipe: Pipeline, config: ServeConfig, headers: dict[str, str] | None = None) -> Iterator[Running]:
    """Listen on a free port until the test is over."""
    backend = Backend("mini", config)
    backend.attach(pipe)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(make_app(backend, config), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        yield Running(url, pipe, backend, http)
    server.should_exit = True
    thread.join(timeout=10)
