"""Flags derived from the config dataclasses: name, type, default and help stand there and nowhere else."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pagoda.config import Checked, parse_bool
from pagoda.errors import UsageError

BOOLEANS = ("true", "false", "1", "0", "yes", "no", "on", "off")
BOOL: dict[str, Any] = {"metavar": "BOOL", "type": parse_bool}
"""Arguments of a flag that is True or False; the bare flag is True (`Parser.spelled`)."""
ALIASES = {"max_batch_size": ("instance_num",), "random_seed": ("seed",), "max_new_tokens": ("request_output_len",),
           "server_name": ("host",), "server_port": ("port",)}  # fmt: skip
"""Other names of fields, as flags: those of the old system, and those that users of others type."""

C = TypeVar("C", bound=Checked)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, by raising `UsageError`. Abbreviated flags are not guessed."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")

    def spelled(self, words: Sequence[str]) -> list[str]:
        """`words` with flags in the spelling of this parser: `_` as `-`, and a bare boolean flag as `--flag=True`."""
        switches = {s for a in self._actions if a.metavar == "BOOL" for s in a.option_strings}
        out: list[str] = []
        for n, word in enumerate(words):
            if word == "--":
                return [*out, *words[n:]]
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            following = words[n + 1].lower() if n + 1 < len(words) else ""
            if name in switches and not equals and following not in BOOLEANS:
                equals, value = "=", "True"
            out.append(name + equals + value)
        return out


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def _reader(annotation: Any) -> tuple[Any, bool, bool]:
    """(how one word is read, whether it is a boolean, whether it takes several words) for a field's type."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(o for o in options if o is not type(None))
    if typing.get_origin(kind) is list:
        return typing.get_args(kind)[0], False, True
    return (str if kind is bool else kind), kind is bool, False


def add_config_flags(
    parser: argparse.ArgumentParser, config: type[Checked], title: str, only: Sequence[str] | None = None
) -> None:
    """Add one flag per field of `config` that belongs on the command line (`only`: these). A flag that is not given
    leaves the field's default."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        meta = field.metadata
        if not meta["cli"] or (only is not None and field.name not in only):
            continue
        read, is_bool, several = _reader(field.type)
        names = [f"--{n.replace('_', '-')}" for n in (field.name, *ALIASES.get(field.name, ()))]
        text = meta["help"].replace("%", "%%")
        if field.default is not None and field.default is not dataclasses.MISSING:
            text += f" (default: {field.default})"
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if meta["choices"] is not None:  # the dataclass checks them, and knows their other spellings
            options["metavar"] = "{" + ",".join(map(str, meta["choices"])) + "}"
        else:
            options["metavar"] = "BOOL" if is_bool else read.__name__.upper()
        if several:
            options["nargs"] = "+"
        group.add_argument(*names, type=parse_bool if is_bool else read, **options)


def config_from(args: argparse.Namespace, config: type[C]) -> C:
    """The config that the given flags make; `ConfigError` for a value out of range."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config.from_mapping({name: value for name, value in vars(args).items() if name in names})


def first_word(words: list[str], known: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take one of the `known` words off the front, in either spelling, where it stands before MODEL."""
    if words and words[0].replace("-", "_") in known:
        return words[0].replace("-", "_"), words[1:]
    return None, words
