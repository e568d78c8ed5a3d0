"""How models write tool calls: one record a format, and the reading of one call's JSON character by character."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.errors import TemplateError
from pagoda.text.grammar import check_divisors, fields_of, literal, seal

ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True)
class ToolFormat:
    """`begins` open a call; `end` closes it, when the format has one. `listed`: the calls stand in one JSON list, or as
    a name followed by its arguments. `bare`: a reply that begins with a JSON object is a call too. `arguments` is the
    key that the model was trained on. `by_token`: templates do not mention the format, but its mark is a token."""

    begins: tuple[str, ...]
    end: str = ""
    listed: bool = False
    bare: bool = False
    arguments: str = "arguments"
    id_len: int = 24
    by_token: bool = False

    @property
    def mark(self) -> str:
        """The first token of the opening."""
        return re.split(r"(?<=[>\]])", self.begins[0])[0]


TOOL_FORMATS = {
    "hermes": ToolFormat(("<tool_call>",), "</tool_call>"),
    "llama3": ToolFormat(("<|python_tag|>",), bare=True, arguments="parameters"),
    "mistral": ToolFormat(("[TOOL_CALLS]",), listed=True, id_len=9),
    "internlm": ToolFormat(
        ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"),
        "<|action_end|>",
        arguments="parameters",
        by_token=True,
    ),
}
TOOL_FORMATS["qwen"] = TOOL_FORMATS["hermes"]


def guess_tools(template_source: str, has_token: Callable[[str], bool] = lambda token: False) -> str | None:
    """The format whose mark a chat template mentions, or, where templates do not, whose mark is a token."""
    for name, form in TOOL_FORMATS.items():
        if form.mark in template_source or (form.by_token and has_token(form.mark)):
            return name
    return None


def tool_grammar(tools: Sequence[Mapping[str, Any]], name: str, after: str | None = None, parallel: bool = True) -> str:
    """The serialized grammar of one or more calls in the format `name`, for `tool_choice: required` or a named tool.
    `after` as in `compile_grammar`. Raises `GrammarError` when a tool's parameters are refused."""
    form = TOOL_FORMATS[name]
    objects = []
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function.get("name"), str):
            raise TemplateError("Every tool must hold a function with a name.")
        properties = {
            "name": {"const": function["name"]},
            form.arguments: function.get("parameters") or {"type": "object"},
        }
        objects.append({"type": "object", "properties": properties, "required": ["name", form.arguments],
                        "additionalProperties": False})  # fmt: skip
    check_divisors(fields_of(objects))
    call = "call: %json " + json.dumps({"anyOf": objects}, ensure_ascii=False)
    if form.listed:
        more = '("," call)*' if parallel else ""
        start = f'start: {literal(form.begins[0])} "[" call {more} "]"'
    elif form.bare:
        start = "start: call" + (' (";" call)*' if parallel else "")
    else:
        one = f'{literal(form.begins[0])} "\\n" call "\\n" {literal(form.end)}'
        start = f"start: {one}" + (f' ("\\n" {one})*' if parallel else "")
    return seal([{"lark_grammar": f"{start}\n{call}"}], after)


class CallReader:
    """Reads the JSON object of one call. `name` is known once its value ended; `arguments` grows as it is read.

    `failed`: this is no call. Text inside the arguments is passed on as it is written.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""
        self.has_arguments = False
        self.is_done = self.failed = self.value_closed = False
        self._state, self._key, self._value = self._open, "", ""
        self._argument_key = ""
        self._depth, self._in_string, self._escaped = 0, False, False

    def push(self, char: str) -> None:
        """Read one more character; legal until `is_done` or `failed`. `value_closed`: it ended a value."""
        self.value_closed = False
        self._state(char)

    def _open(self, char: str) -> None:
        if char == "{":
            self._state = self._before_key
        elif not char.isspace():
            self.failed = True

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._key, self._state = char, self._in_key
        elif char == "}":
            self.is_done = True
        elif char != "," and not char.isspace():
            self.failed = True

    def _in_key(self, char: str) -> None:
        self._key += char
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._key = self._key[1:-1]
            self._state = self._before_value

    def _before_value(self, char: str) -> None:
        if char == ":" and not self._value:
            self._value = ":"
        elif not char.isspace():
            if not self._value:
                self.failed = True
                return
            self._value, self._depth, self._in_string = "", 0, False
            self._state = self._in_value
            self._in_value(char)

    @property
    def _streams(self) -> bool:
        """Whether the value being read is the arguments, written as an object (a text is read whole first)."""
        return self._key in ARGUMENT_KEYS and not self._value.startswith('"')

    def _in_value(self, char: str) -> None:
        if self._in_string:
            self._take(char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                if self._depth == 0:
                    self._close_value()
        elif self._depth == 0 and (char in ",}" or char.isspace()):
            self._close_value()
            self._before_key(char)
        else:
            self._take(char)
            self._in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if self._depth == 0 and char in "}]":
                self._close_value()

    def _take(self, char: str) -> None:
        self._value += char
        if self._streams and not (self.has_arguments and self._key != self._argument_key):
            self.has_arguments, self._argument_key = True, self._key
            self.arguments += char

    def _close_value(self) -> None:
        if self._value.startswith('"') and self._key in ("name", *ARGUMENT_KEYS):
            try:
                text = json.loads(self._value, strict=False)
            except ValueError:
                self.failed = True
                return
            if self._key == "name":
                self.name = text
            elif not self.has_arguments:
                self.has_arguments, self.arguments = True, text
        self._value, self._state = "", self._before_key
        self.value_closed = True


NAME_THEN_ARGUMENTS = re.compile(r"\s*([\w.-]{1,128})\s*(?:\[ARGS\])?\s*\{")
"""Newer Mistral models write `[TOOL_CALLS]name{...}` or `[TOOL_CALLS]name[ARGS]{...}`."""
