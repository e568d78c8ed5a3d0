"""`pagoda serve [api_server | api_client | gradio] [MODEL | URL]`."""

import argparse

from pagoda.cli.flags import Parser, add_config_flags, config_from
from pagoda.config import EngineConfig, ServeConfig
from pagoda.errors import MissingExtraError


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [api_server | api_client | gradio] [MODEL | URL] [flags]",
        description="Serve a model over HTTP with OpenAI's routes. `api_client URL` talks to a server in the terminal, "
        "`gradio URL | MODEL` shows a page in front of one.",
    )
    parser.add_argument("model", nargs="?", default=None, metavar="MODEL | URL", help="default: mini")
    parser.add_argument("--chat-template", metavar="NAME", help="chat template to use (see `list`)")
    parser.add_argument("--ssl", action="store_true", help="TLS with the files that SSL_CERTFILE and SSL_KEYFILE name")
    add_config_flags(parser, ServeConfig, "server")
    add_config_flags(parser, EngineConfig, "engine")
    parser.add_argument("--api-key", metavar="KEY", help="clients: the key to send (also PAGODA_API_KEY)")
    parser.add_argument("--session-id", type=int, default=None, metavar="INT", help="api_client: the session to use")
    parser.add_argument("--restful-api", metavar="BOOL", help="accepted from older command lines: a URL says it")
    return parser


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """With the certificate that the environment names, when `--ssl` is given."""
    import os

    config = config_from(args, ServeConfig)
    if args.ssl and config.ssl_certfile is None:
        files = {f"ssl_{kind}file": os.environ.get(f"SSL_{kind.upper()}FILE") for kind in ("cert", "key")}
        config = config.replace(**files)
    return config


def run(args: argparse.Namespace) -> int:
    if args.first_word == "api_client":
        from pagoda.cli.api_client import talk

        return talk(args.model or "http://127.0.0.1:23333", args.api_key, args.session_id)
    if args.first_word == "gradio":
        from pagoda.cli.ui import show

        return show(args)
    try:
        from pagoda.serve.logs import setup_json_logging
        from pagoda.serve.supervisor import Supervisor
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Serving needs {error.name}: run `pip install 'pagoda-llm[serve]'`.") from None
    serve = serve_config(args)
    if serve.replicas:
        from pagoda.engine.ray_ranks import connect_ray

        connect_ray()  # says what to install where Ray is missing
        from pagoda.serve.replicas import run_replicas

        setup_json_logging(serve.log_level)
        return run_replicas(args.model or "mini", config_from(args, EngineConfig), serve, args.chat_template)
    server = Supervisor(args.model or "mini", config_from(args, EngineConfig), serve, args.chat_template)
    setup_json_logging(serve.log_level)
    return server.run()
