"""`pagoda ui [MODEL | URL]`, `pagoda serve gradio ...`: the web page, before a server or with its own."""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pagoda.cli.flags import Parser, add_config_flags, config_from
from pagoda.config import Checked, EngineConfig, ServeConfig
from pagoda.errors import ConfigError, EngineDeadError, MissingExtraError

DEFAULT_PORT = 6006


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [MODEL | URL] [flags]",
        description="A web page to talk to a model: that of the server at URL, or MODEL on a server of its own.",
    )
    parser.add_argument("model", nargs="?", default=None, metavar="MODEL | URL", help="default: mini")
    parser.add_argument("--chat-template", metavar="NAME", help="chat template to use (see `list`)")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (also PAGODA_API_KEY)")
    parser.add_argument("--restful-api", metavar="BOOL", help="accepted from older command lines: a URL says it")
    add_config_flags(parser, ServeConfig, "page", only=("server_name", "server_port"))
    add_config_flags(parser, EngineConfig, "engine")
    return parser


def changed(config: Checked) -> list[str]:
    """The flags that differ from the defaults."""
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    values = {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}
    return [f"--{name}={value}" for name, value in values.items()]


@contextmanager
def own_server(args: argparse.Namespace) -> Iterator[str]:
    """A server of `args.model` on a free port of this machine; ends with the page. Gives its URL."""
    command = [sys.executable, "-m", "pagoda.cli.main", "serve", args.model or "mini", "--server-port=0"]
    command += ["--log-level=warning", *changed(config_from(args, EngineConfig))]
    if args.chat_template:
        command.append(f"--chat-template={args.chat_template}")
    environment = {k: v for k, v in os.environ.items() if k != "PAGODA_API_KEYS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = re.search(r"serving at (http\S+)", line)
            if found:
                break
        else:
            raise EngineDeadError("The page's server did not start; the lines above say why.")
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def show(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from pagoda.serve.addresses import reachable
        from pagoda.serve.client import Client
        from pagoda.serve.ui import launch
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"The page needs {error.name}: run `pip install 'pagoda-llm[ui]'`.") from None
    config = config_from(args, ServeConfig)
    port: Any = getattr(args, "server_port", DEFAULT_PORT)
    given = args.model or ""
    where = nullcontext(given) if given.startswith(("http://", "https://")) else own_server(args)
    with where as url:
        client = Client(url, args.api_key or os.environ.get("PAGODA_API_KEY"), patience=60.0)
        print(f"the page: http://{reachable(config.server_name)}:{port}", flush=True)
        try:
            launch(client, config.server_name, port)
        except OSError as error:
            raise ConfigError(f"Cannot listen on port {port} ({error}): choose another --server-port.") from None
    return 0


def run(args: argparse.Namespace) -> int:
    return show(args)
