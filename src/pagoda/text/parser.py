"""One incremental parser for a reply's parts: reasoning, text, tool calls.

The joined events are the same however the reply is cut into pushes. What might still become a mark is held back.
"""

import re
import secrets
import string
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from pagoda.text.reasoning import REASONING_FORMATS
from pagoda.text.stream import beginning_len
from pagoda.text.tools import NAME_THEN_ARGUMENTS, TOOL_FORMATS, CallReader


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins: `index` counts the calls of the reply from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the arguments' JSON text of call `index`."""

    index: int
    text: str


Event = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass
class ParsedReply:
    """A whole reply: what its events add up to."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def collect(events: Iterable[Event]) -> ParsedReply:
    """Add up the events of one reply."""
    reply = ParsedReply()
    for event in events:
        if isinstance(event, TextDelta):
            reply.text += event.text
        elif isinstance(event, ReasoningDelta):
            reply.reasoning += event.text
        elif isinstance(event, ToolCallStart):
            reply.calls.append(ToolCall(event.id, event.name))
        else:
            reply.calls[event.index].arguments += event.text
    return reply


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that may grow into one of `marks`, with the white space before it."""
    sure = text[: len(text) - beginning_len(text, marks)]
    return len(text) - len(sure.rstrip())


class OutputParser:
    """Push text, get events; `flush` at the end.

    `reasoning`, `tools`: names of `REASONING_FORMATS`, `TOOL_FORMATS`, or None. `in_reasoning`: the prompt already
    opened the reasoning. `tool_names`: the tools that were offered; a reply without an opening mark is a call only when
    it names one of them. With tools, decode special tokens too, for they are the marks.
    """

    def __init__(
        self,
        reasoning: str | None = None,
        tools: str | None = None,
        *,
        in_reasoning: bool = False,
        tool_names: Collection[str] = (),
        make_id: Callable[[], str] | None = None,
    ):
        self._think = REASONING_FORMATS[reasoning] if reasoning else None
        self._form = TOOL_FORMATS[tools] if tools else None
        self._names = frozenset(tool_names)
        self._make_id = make_id or self._random_id
        self._buffer = ""
        self._events: list[Event] = []
        self._state = self._lead if self._think else self._start
        if self._think and in_reasoning:
            self._state = self._open_reasoning
        self._final = False
        self._raw = ""  # of a call, from its mark on: becomes text when it is no call
        self._marked = self._in_list = self._bare_arguments = False
        self._reader: CallReader | None = None
        self._started = self._said_since_call = False
        self._num_sent = 0
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        """The events that became certain with this text."""
        self._buffer += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def flush(self) -> list[Event]:
        """The rest, when no more text will come."""
        self._final = True
        return self.push("")

    def _random_id(self) -> str:
        length = self._form.id_len if self._form else 24
        letters = string.ascii_letters + string.digits
        body = "".join(secrets.choice(letters) for _ in range(length))
        return body if length == 9 else f"call_{body}"

    def _say(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))
            self._said_since_call = True

    # Each state reads the buffer and says whether there is more to do now.

    def _lead(self) -> bool:
        """At the start of a reply that may begin with reasoning."""
        assert self._think is not None
        text, begin = self._buffer.lstrip(), self._think.begin
        if text.startswith(begin):
            self._buffer, self._state = text[len(begin) :], self._open_reasoning
            return True
        if begin.startswith(text) and not self._final:
            return False
        self._state = self._start
        return True

    def _open_reasoning(self) -> bool:
        return self._without_space(self._in_reasoning)

    def _in_reasoning(self) -> bool:
        assert self._think is not None
        body, end, rest = self._buffer.partition(self._think.end)
        keep = 0 if end or self._final else held_back(body, [self._think.end])
        text = body.rstrip() if end else body[: len(body) - keep]
        if text:
            self._events.append(ReasoningDelta(text))
        if not end:
            self._buffer = self._buffer[len(text) :]
            return False
        self._buffer, self._state = rest, self._after_reasoning
        return True

    def _after_reasoning(self) -> bool:
        return self._without_space(self._start)

    def _without_space(self, then: Callable[[], bool]) -> bool:
        """White space is left out before the state `then`."""
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = then
        return bool(self._buffer)

    def _start(self) -> bool:
        """At the start of the answer, where a bare JSON object is a call in some formats."""
        if self._form is not None and self._form.bare:
            text = self._buffer.lstrip()
            if not text and not self._final:
                return False
            if text.startswith("{"):
                self._raw, self._buffer = self._buffer[: -len(text)], text
                self._marked, self._in_list = False, False
                self._begin_call()
                return True
        self._state = self._in_text
        return bool(self._buffer)

    def _in_text(self) -> bool:
        marks = self._form.begins if self._form else ()
        found = [(at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0]
        if not found:
            keep = held_back(self._buffer, marks) if marks and not self._final else 0
            cut = len(self._buffer) - keep
            space_only = self._buffer[:cut].isspace() and self.num_calls and not self._said_since_call
            self._say("" if space_only else self._buffer[:cut])
            self._buffer = self._buffer[cut:]
            return False
        at, mark = min(found)
        before = self._buffer[:at].rstrip()
        self._say(before)
        self._raw = self._buffer[len(before) : at] + mark
        self._buffer = self._buffer[at + len(mark) :]
        self._marked, self._in_list = True, False
        self._state = self._after_mark if self._form and self._form.listed else self._call
        if self._state == self._call:
            self._begin_call()
        return True

    def _after_mark(self) -> bool:
        """Behind `[TOOL_CALLS]`: a list, an object, or a name and its arguments."""
        text = self._buffer.lstrip()
        if not text:
            return self._give_up() if self._final else False
        if text[0] in "[{":
            self._in_list = text[0] == "["
            taken = len(self._buffer) - len(text) + self._in_list
            self._raw, self._buffer = self._raw + self._buffer[:taken], self._buffer[taken:]
            self._begin_call()
            return True
        match = NAME_THEN_ARGUMENTS.match(self._buffer)
        if match is None:
            possible = re.fullmatch(r"\s*[\w.-]{1,128}\s*(\[A?R?G?S?\]?\s*)?", self._buffer)
            return False if possible and not self._final else self._give_up()
        self._raw, self._buffer = self._raw + match[0], self._buffer[match.end() :]
        self._begin_call()
        assert self._reader is not None
        for char in f'{{"name":"{match[1]}","arguments":{{':
            self._reader.push(char)
        self._bare_arguments = True
        return True

    def _begin_call(self) -> None:
        self._reader, self._started, self._num_sent = CallReader(), False, 0
        self._bare_arguments = False
        self._state = self._call

    def _call(self) -> bool:
        reader = self._reader
        assert reader is not None
        used = 0
        while used < len(self._buffer) and not (reader.is_done or reader.failed):
            reader.push(self._buffer[used])
            used += 1
            if self._bare_arguments and reader.value_closed:
                reader.push("}")
            if not self._started and not reader.failed:
                self._try_start(reader)
        self._raw, self._buffer = self._raw + self._buffer[:used], self._buffer[used:]
        if self._started and len(reader.arguments) > self._num_sent:
            self._events.append(ToolCallArguments(self.num_calls - 1, reader.arguments[self._num_sent :]))
            self._num_sent = len(reader.arguments)
        if reader.is_done and self._started:
            if not reader.has_arguments:
                self._events.append(ToolCallArguments(self.num_calls - 1, "{}"))
            self._raw, self._state = "", self._between
            return True
        if reader.failed or reader.is_done:
            if not self._started:
                return self._give_up()
            self._state = self._skip
            return True
        return self._give_up() if self._final and not self._started else False

    def _try_start(self, reader: CallReader) -> None:
        if not reader.name or not (reader.has_arguments or (reader.is_done and self._marked)):
            return
        if not self._marked and self._names and reader.name not in self._names:
            return
        self._events.append(ToolCallStart(self.num_calls, self._make_id(), reader.name))
        self.num_calls += 1
        self._started, self._said_since_call = True, False

    def _give_up(self) -> bool:
        """What looked like a call is text."""
        self._say(self._raw)
        self._raw, self._state = "", self._in_text
        return True

    def _skip(self) -> bool:
        """A call broke off after it had begun: drop what is left of it."""
        end = self._form.end if self._form else ""
        if not end:
            self._state = self._in_text
            return True
        at = self._buffer.find(end)
        if at < 0:
            self._buffer = "" if self._final else self._buffer[-(len(end) - 1) :]
            return False
        self._buffer, self._state = self._buffer[at + len(end) :], self._in_text
        return True

    def _between(self) -> bool:
        """After a call: its end, or one more."""
        form = self._form
        assert form is not None
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        if form.end and self._buffer.startswith(form.end):
            self._buffer, self._state = self._buffer[len(form.end) :], self._in_text
            return True
        if form.end and form.end.startswith(self._buffer) and not self._final:
            return False
        head = self._buffer[0]
        if head == "{" and (self._marked or form.bare) and not self._bare_arguments:
            self._begin_call()
        elif (head == "," and self._in_list) or (head == ";" and form.bare):
            self._raw, self._buffer, self._state = head, self._buffer[1:], self._between_objects
        elif head == "]" and self._in_list:
            self._buffer, self._state, self._in_list = self._buffer[1:], self._in_text, False
        else:
            self._state = self._in_text
        return True

    def _between_objects(self) -> bool:
        """After `,` or `;`: the next call, or text."""
        text = self._buffer.lstrip()
        if not text and not self._final:
            return False
        taken = len(self._buffer) - len(text)
        self._raw, self._buffer = self._raw + self._buffer[:taken], text
        if not text.startswith("{"):
            return self._give_up()
        self._begin_call()
        return True
