"""Messages become one prompt text: by the checkpoint's Jinja template in a sandbox, or by a format that is named.

A template is data from a stranger: it runs in Jinja's immutable sandbox, sees plain values only, and its output and
time are capped (`sandbox` says what is not). Requests never bring templates of their own.
"""

import datetime
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols

from pagoda.errors import TemplateError, TokenizerError
from pagoda.text.named_templates import NAMED, TEMPLATES, NamedTemplate
from pagoda.text.sandbox import MAX_SECONDS, UNTIL, Sandbox, check_time
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.tokenizer_files import read_json

MAX_MESSAGES = 2048
MAX_OUTPUT_CHARS = 16 << 20
MAX_KWARGS_BYTES = 8 << 10
RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "chat_template", "f")
TEXT_PARTS = ("text", "input_text", "output_text")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<eoa>", "<|action_end|>")
"""Tokens that end an assistant's turn in the templates where they occur, whatever the generation config says."""


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; here its body is simply printed."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def compile_template(source: str) -> jinja2.Template:
    """A sandboxed template with the settings that checkpoints rely on; `TemplateError` when its syntax is wrong."""
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.bound_filters()
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    environment.globals.pop("lipsum", None)
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateError as error:
        raise TemplateError(f"The chat template is not valid Jinja ({error}): name a template instead.") from None


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """One message as templates expect it: text parts joined to one text, a missing content as the empty text, a tool
    call's arguments as an object. `TemplateError` names what cannot be said in text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError("Every message must be an object with a role and a content.")
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                raise TemplateError(f"A message holds a part of type {kind!r}: this model reads text parts only.")
        plain["content"] = "".join(part["text"] for part in content)
    elif content is None:
        plain["content"] = ""
    elif not isinstance(content, str):
        raise TemplateError("A message's content must be a text or a list of text parts.")
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError("A tool call of a message must hold a function with a name and arguments.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise TemplateError(f"The arguments of the call to {function['name']} are not valid JSON.") from None
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


class ChatTemplate:
    """Renders conversations. `name` says which format it is; `stop_words` end a reply (`stop_ids`: those of them
    that are one token)."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, stop_words: Sequence[str] = (), marks: Any = None):
        self.name = name
        self.source = source
        self.stop_words = tuple(stop_words)
        ids = (tokenizer.id_of(word) for word in self.stop_words)
        self.stop_ids = tuple(i for i in ids if i is not None)
        # Without tools the name stays undefined, which a template may loop over, unless it compares it with none.
        self._asks_for_none = re.search(r"\btools\s*(is\s+(not\s+)?|[!=]=\s*)none\b", source, re.IGNORECASE) is not None
        self._compiled = compile_template(source)
        bos = tokenizer.bos_token if marks is None or tokenizer.adds_bos else ""
        self._fixed = {"bos_token": bos, "eos_token": tokenizer.eos_token, "f": marks}

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of OpenAI-style `messages`, begin-of-sequence text included. `kwargs` reach the template
        (`enable_thinking=...`). `TemplateError` when the template refuses the messages or a limit is passed."""
        if not messages:
            raise TemplateError("There are no messages: send at least one.")
        if len(messages) > MAX_MESSAGES:
            raise TemplateError(f"The conversation has {len(messages)} messages: at most {MAX_MESSAGES} are allowed.")
        reserved = sorted(set(kwargs) & set(RESERVED))
        if reserved:
            raise TemplateError(f"The template argument {reserved[0]} is reserved: leave it out.")
        try:
            # A round trip through JSON leaves plain values only, so that the sandbox meets no foreign object.
            given = json.dumps(kwargs)
            plain = json.loads(json.dumps([plain_message(m) for m in messages]))
            plain_tools = None if tools is None else json.loads(json.dumps(list(tools)))
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(
                f"The messages, tools or template arguments are not plain JSON values: {error}."
            ) from None
        if len(given) > MAX_KWARGS_BYTES:
            raise TemplateError(f"The template arguments are longer than {MAX_KWARGS_BYTES} bytes.")
        values = {"messages": plain, "add_generation_prompt": add_generation_prompt}
        if plain_tools is not None or self._asks_for_none:
            values["tools"] = plain_tools
        return self._run({**self._fixed, **json.loads(given), **values})

    def _run(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        left, until = MAX_OUTPUT_CHARS, time.monotonic() + MAX_SECONDS
        try:
            for piece in self._compiled.generate({**values, UNTIL: until}):
                check_time(until)
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise TemplateError(f"The chat template wrote more than {MAX_OUTPUT_CHARS} characters.")
        except jinja2.exceptions.TemplateError as error:
            raise TemplateError(f"The chat template refused the messages: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise TemplateError(f"The chat template could not read the messages: {error}") from None
        return "".join(pieces)


def template_names() -> list[str]:
    """All names that `load_template` knows, sorted."""
    return sorted(NAMED)


def require_name(name: str) -> NamedTemplate:
    """The record called `name`; `TemplateError` lists the names when it is unknown."""
    record = NAMED.get(name.lower())
    if record is None:
        known = ", ".join(t.names[0] for t in TEMPLATES)
        raise TemplateError(f"There is no chat template called {name!r}: use one of {known}.")
    return record


def named_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The format called `name`; `TemplateError` lists the names when it is unknown."""
    record = require_name(name)
    return ChatTemplate(record.names[0], record.source, tokenizer, record.stop_words, asdict(record))


def checkpoint_source(folder: Path) -> str | None:
    """The template that the folder brings: `chat_template.jinja`, `chat_template.json`, or `tokenizer_config.json`
    (a text, or a list of named ones of which `default` counts, else the first)."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    try:
        names = ("chat_template.json", "tokenizer_config.json")
        sources = [read_json(folder / name).get("chat_template") for name in names]
    except TokenizerError as error:
        raise TemplateError(str(error)) from None
    for source in sources:
        if isinstance(source, list):
            named = {s.get("name"): s.get("template") for s in source if isinstance(s, dict)}
            source = named.get("default") or next(iter(named.values()), None)
        if isinstance(source, str) and source:
            return source
    return None


def require_source(folder: Path | str) -> str:
    """The checkpoint's own template; `TemplateError` when it has none."""
    source = checkpoint_source(Path(folder))
    if source is None:
        raise TemplateError(
            f"{folder} has no chat template: give one with --model-name NAME (the names: `lmdeploy list`), or use raw "
            "prompts."
        )
    return source


def load_template(folder: Path | str, name: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The format called `name` when one is given, else the checkpoint's own; `TemplateError` when there is neither."""
    if name is not None:
        return named_template(name, tokenizer)
    source = require_source(folder)
    ends = [end for end in TURN_ENDS if end in source and tokenizer.id_of(end) is not None]
    return ChatTemplate("checkpoint", source, tokenizer, ends)
