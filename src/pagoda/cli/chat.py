"""`pagoda chat [turbomind|torch] [MODEL]`: a conversation in the terminal."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pagoda.cli.flags import Parser, add_config_flags, config_from
from pagoda.cli.progress import progress_bar
from pagoda.cli.terminal import inputs, printable
from pagoda.config import EngineConfig, GenerationConfig
from pagoda.errors import CheckpointError, UsageError
from pagoda.models.find import resolve_model, text_folder
from pagoda.models.workspace import is_workspace, remembered_template
from pagoda.text.template import require_name, require_source


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [turbomind | torch] [MODEL] [flags]",
        description="Talk to a model. An empty line ends your input, `end` starts a new conversation, `exit` leaves, "
        "Ctrl-C stops one reply. `torch` runs transformers instead of Pagoda's engine, for comparison.",
    )
    parser.add_argument("model", nargs="?", default="mini", metavar="MODEL", help="default: mini, the bundled model")
    parser.add_argument("--model-name", "--chat-template", metavar="NAME", help="chat template to use (see `list`)")
    parser.add_argument("--meta-instruction", "--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--backend", choices=("turbomind", "torch", "pytorch"), help="the same as the first word")
    add_config_flags(parser, EngineConfig, "engine")
    add_config_flags(parser, GenerationConfig, "generation")
    return parser


class Talk(Protocol):
    """A conversation: `pagoda.offline.Session`, or transformers' (`torch_reference`)."""

    def stream(self, text: str, gen_config: GenerationConfig) -> Iterator[Any]: ...

    def close(self) -> None: ...


class Model(Protocol):
    def session(self, session_id: str | None = None, system: str | None = None) -> Talk: ...

    def close(self) -> None: ...


@dataclass
class Speed:
    """What the replies cost together."""

    num_replies: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0

    def report(self) -> str:
        if not self.num_tokens:
            return ""
        decode = max(self.seconds - self.first_token_seconds, 1e-9)
        rate = (self.num_tokens - self.num_replies) / decode if self.num_tokens > self.num_replies else 0.0
        first = self.first_token_seconds / self.num_replies * 1000
        replies = "1 reply" if self.num_replies == 1 else f"{self.num_replies} replies"
        return f"{self.num_tokens} tokens in {replies}: {rate:.1f} tokens/s, first token after {first:.0f} ms"


def say(talk: Talk, text: str, gen: GenerationConfig, speed: Speed) -> None:
    """One turn: print the reply as it comes; Ctrl-C stops it."""
    started, first, num_tokens = time.monotonic(), None, 0
    pieces = talk.stream(text, gen)
    reason = None
    try:
        for piece in pieces:
            if first is None and piece.token_ids:
                first = time.monotonic()
            num_tokens += len(piece.token_ids)
            reason = piece.finish_reason
            print(printable(piece.text), end="", flush=True)
    except KeyboardInterrupt:
        reason = "stopped"
    finally:
        pieces.close()  # type: ignore[attr-defined]
    print({"stopped": "\n[stopped]", "length": "\n[token limit]"}.get(reason or "", ""), flush=True)
    if first is not None:
        speed.num_replies += 1
        speed.num_tokens += num_tokens
        speed.seconds += time.monotonic() - started
        speed.first_token_seconds += first - started


def talk_to(model: Model, gen: GenerationConfig, system: str | None) -> Speed:
    """The loop of a chat, until `exit` or the end of input."""
    speed, talk = Speed(), model.session(system=system)
    for text in inputs():
        if text == "end":
            talk.close()
            talk = model.session(system=system)
            print("A new conversation.")
        else:
            try:
                say(talk, text, gen, speed)
            except UsageError as error:
                print(f"{error} `end` starts a new conversation.", file=sys.stderr)
    return speed


def check_template(model: str, name: str | None) -> None:
    """Say that the template is unknown or missing before the weights are loaded."""
    folder = resolve_model(model)
    if not is_workspace(folder) and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}/config.json does not exist: give the folder of a Hugging Face checkpoint.")
    name = name or remembered_template(folder)
    if name is None:
        require_source(text_folder(folder))
    else:
        require_name(name)


def open_model(args: argparse.Namespace) -> Model:
    """Pagoda's engine, or transformers for `torch`."""
    config = config_from(args, EngineConfig)
    check_template(args.model, args.model_name)
    if "torch" in str(args.first_word or args.backend):
        from pagoda.cli.torch_reference import TorchModel

        return TorchModel(args.model, config, args.model_name)
    from pagoda.offline import pipeline

    with progress_bar("loading") as progress:
        return pipeline(args.model, config, chat_template=args.model_name, progress=progress)


def guess_report(model: Model) -> str:
    """How well speculation guessed; nothing where the engine is not ours."""
    engine = getattr(model, "engine", None)
    counters = engine.stats().counters if engine is not None else None
    return f", {counters.accepted_tokens} of {counters.guessed_tokens} guessed tokens were right" if counters else ""


def run(args: argparse.Namespace) -> int:
    gen = config_from(args, GenerationConfig)
    model = open_model(args)
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"{args.model}: `exit` leaves, `end` starts a new conversation, Ctrl-C stops a reply.")
    try:
        speed = talk_to(model, gen, args.meta_instruction)
        guessed = guess_report(model) if config_from(args, EngineConfig).speculative_ngram else ""
    finally:
        model.close()
    if speed.num_tokens:
        print(f"\n{speed.report()}{guessed}")
    return 0
