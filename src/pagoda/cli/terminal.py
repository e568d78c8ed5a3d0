"""The terminal's side of a chat: several lines in, a stream of text out."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PROMPT = "\ndouble enter to end input >>> "
WORDS = ("exit", "end")
"""These end the input by themselves."""

_CONTROL = {c: None for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without control characters, so that a model cannot steer the terminal."""
    return text.translate(_CONTROL)


def history_file() -> Path:
    """Where typed lines are remembered."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "pagoda" / "chat_history"


def open_input() -> Callable[[], str]:
    """A function that asks for one input: lines up to an empty one. It raises EOFError at the end of input, and
    KeyboardInterrupt when Ctrl-C was typed."""
    return _editor() if sys.stdin.isatty() and sys.stdout.isatty() else _plain


def inputs() -> Iterator[str]:
    """What is typed, until `exit` or the end of input; empty inputs and Ctrl-C are passed over."""
    ask = open_input()
    while True:
        try:
            text = ask()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text == "exit":
            return
        if text:
            yield text


def _plain() -> str:
    print(PROMPT, end="", flush=True)
    lines: list[str] = []
    for line in sys.stdin:
        line = line.rstrip("\r\n")
        if not line.strip() and any(x.strip() for x in lines):
            break
        lines.append(line)
        if "\n".join(lines).strip() in WORDS:
            break
    else:
        if not any(x.strip() for x in lines):
            raise EOFError
    return "\n".join(lines).strip()


def _editor() -> Callable[[], str]:
    """Multi-line editing with history: Enter on an empty line sends, Enter elsewhere starts a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text.strip()
        if text in WORDS or (text and not buffer.document.current_line.strip()):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    history: History = InMemoryHistory()
    try:
        history_file().parent.mkdir(parents=True, exist_ok=True)
        history_file().touch(mode=0o600)
        history = FileHistory(str(history_file()))
    except OSError:
        pass  # a home that cannot be written to costs the memory of typed lines, no more
    session: PromptSession[str] = PromptSession(history=history, key_bindings=keys, multiline=True)
    return lambda: session.prompt(PROMPT, prompt_continuation="").strip()
