"""`pagoda VERB ...`, also installed as `lmdeploy`. Knows the verbs; imports one when it is used."""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from pagoda import __version__
from pagoda.errors import PagodaError, UsageError


@dataclass(frozen=True)
class Verb:
    """A verb's module offers `make_parser(prog) -> Parser` and `run(args) -> int`; `first_words` may stand before its
    arguments and arrive as `args.first_word`."""

    module: str
    help: str
    aliases: tuple[str, ...] = ()
    first_words: tuple[str, ...] = ()


VERBS: dict[str, Verb] = {
    "chat": Verb("pagoda.cli.chat", "talk to a model in the terminal", first_words=("turbomind", "torch", "pytorch")),
    "convert": Verb("pagoda.cli.convert", "write a workspace: weights fused, cut and packed once"),
    "quantize": Verb("pagoda.cli.quantize", "write a quantized checkpoint, and report what it costs"),
    "lite": Verb(
        "pagoda.cli.lite",
        "quantization in its older spellings",
        first_words=("calibrate", "kv_qparams", "auto_awq", "smooth_quant"),
    ),
    "eval": Verb("pagoda.cli.eval", "measure perplexity and accuracy under an engine setting"),
    "bench": Verb(
        "pagoda.cli.bench",
        "measure throughput, latency and serving; or profile steps",
        first_words=("throughput", "latency", "serving"),
    ),
    "serve": Verb(
        "pagoda.cli.serve", "answer over HTTP, with OpenAI's routes", first_words=("api_server", "api_client", "gradio")
    ),
    "ui": Verb("pagoda.cli.ui", "a web page to talk to a model"),
    "plan": Verb("pagoda.cli.plan", "what fits on which devices, and how fast it can be"),
    "list": Verb("pagoda.cli.list_templates", "the names of the chat templates"),
    "env": Verb("pagoda.cli.env", "this machine and the versions of what matters", aliases=("check_env",)),
}


def find_verb(word: str) -> str | None:
    """The verb that `word` means, in either spelling or by an alias."""
    word = word.replace("-", "_")
    return next((name for name, v in VERBS.items() if word == name or word in v.aliases), None)


def usage(prog: str) -> str:
    """The text of `--help`."""
    lines = [f"usage: {prog} VERB ...", "", "Compress, deploy and serve large language models.", "", "verbs:"]
    lines += [f"  {name:<12} {verb.help}" for name, verb in VERBS.items()]
    lines += ["", f"`{prog} VERB --help` tells a verb's arguments; MODEL is a checkpoint folder, a workspace, a hub id"]
    lines += ["(OWNER/NAME), or mini, the bundled model."]
    return "\n".join(lines)


def run(prog: str, words: list[str]) -> int:
    """Run one command; returns the exit code, raises `PagodaError`."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(prog))
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(__version__)
        return 0
    name = find_verb(words[0])
    if name is None:
        raise UsageError(f"there is no verb {words[0]!r}: use one of {', '.join(VERBS)}.")
    verb = VERBS[name]
    module: ModuleType = importlib.import_module(verb.module)
    parser = module.make_parser(f"{prog} {words[0]}")
    from pagoda.cli.flags import first_word

    word, rest = first_word(words[1:], verb.first_words)
    args = parser.parse_args(parser.spelled(rest))
    args.first_word = word
    return module.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """The console command. A mistake of the user is one sentence on stderr and exit code 2."""
    prog = os.path.basename(sys.argv[0]) or "pagoda"
    prog = prog if prog in ("pagoda", "lmdeploy") else "pagoda"
    try:
        return run(prog, list(sys.argv[1:] if argv is None else argv))
    except PagodaError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
