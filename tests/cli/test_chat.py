"""The chat: its loop with a model that is made up, and the whole command on a real checkpoint, also in a terminal."""

import io
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field

import pytest

from pagoda.cli import chat, terminal
from pagoda.cli.chat import Speed, talk_to
from pagoda.config import GenerationConfig
from pagoda.errors import RequestError


@dataclass
class Piece:
    text: str
    token_ids: list = field(default_factory=lambda: [1])
    finish_reason: str | None = None


class Echo:
    """Answers with what it hears, letter by letter; remembers what happened to it."""

    def __init__(self, log):
        self.log = log

    def session(self, session_id=None, system=None):
        self.log.append(f"session {system}")
        return self

    def stream(self, text, gen_config):
        self.log.append(text)
        if text == "too long":
            raise RequestError("The prompt is too long.")
        try:
            for n, letter in enumerate(text):
                if letter == "^":
                    raise KeyboardInterrupt
                yield Piece(letter, finish_reason="length" if n == 9 else None)
        finally:
            self.log.append("closed stream")

    def close(self):
        self.log.append("closed")


def converse(monkeypatch, typed: str) -> tuple[list[str], Speed]:
    log: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return log, talk_to(Echo(log), GenerationConfig(), "S")


def test_loop(monkeypatch, capsys):
    log, speed = converse(monkeypatch, "a\nb\n\nend\n\nab^cd\n\ntoo long\n\n0123456789\n\nexit\nnever\n\n")
    assert log == ["session S", "a\nb", "closed stream", "closed", "session S", "ab^cd", "closed stream", "too long",
                   "0123456789", "closed stream"]  # fmt: skip
    seen = capsys.readouterr()
    assert "ab\n[stopped]" in seen.out and "0123456789\n[token limit]" in seen.out and "new conversation" in seen.out
    assert seen.err.startswith("The prompt is too long.")
    assert (speed.num_replies, speed.num_tokens) == (3, 3 + 2 + 10) and "tokens/s" in speed.report()


def test_end_of_input_ends_the_chat(monkeypatch):
    log, speed = converse(monkeypatch, "hello")
    assert log == ["session S", "hello", "closed stream"] and speed.num_tokens == 5
    log, speed = converse(monkeypatch, "\n\n")
    assert log == ["session S"] and speed.report() == ""


def test_models_cannot_steer_the_terminal():
    assert terminal.printable("a\x1b[2Jb\x9b\r\n\tü") == "a[2Jb\n\tü"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pagoda.cli.main", *words]


def run(*words: str, typed: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), input=typed, capture_output=True, text=True, timeout=200)


OPTIONS = ("--do_sample", "False", "--max-new-tokens", "24", "--device", "cpu", "--num-threads", "1")


@pytest.fixture(scope="module")
def story(shared_data):
    """A real model's folder and the text that transformers continues a prompt with, greedily."""
    folder = shared_data / "models" / "stories260k-llama"
    record = json.loads((shared_data / "models" / "expected" / "stories260k-llama.json").read_text())["prompts"][0]
    from pagoda.text.tokenizer import load_tokenizer

    return folder, record["prompt"], load_tokenizer(folder).decode(record["ids_64_ignore_eos"][:24])


def test_chat_on_a_real_checkpoint(story):
    folder, prompt, expected = story
    done = run("chat", "turbomind", str(folder), "--model-name", "base", *OPTIONS, typed=f"{prompt}\n\nexit\n")
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout and "24 tokens in 1 reply" in done.stdout


def test_speculation_says_the_same_and_how_well_it_guessed(story):
    folder, prompt, expected = story
    words = ("chat", str(folder), "--model-name", "base", *OPTIONS, "--speculative-ngram", "4")
    done = run(*words, typed=f"{prompt}\n\nexit\n")
    assert expected in done.stdout and "guessed tokens were right" in done.stdout, done


@pytest.mark.parametrize("packed", [(), ("--device", "cpu")])
def test_convert_and_chat_on_the_workspace(packed, story, tmp_path):
    folder, prompt, expected = story
    workspace = tmp_path / "workspace"
    done = run("convert", "base", str(folder), "--dst_path", str(workspace), "--session_len", "128", *packed)
    assert done.returncode == 0 and "is ready" in done.stdout, done.stderr
    done = run("chat", "turbomind", str(workspace), *OPTIONS, typed=f"{prompt}\n\nexit\n")
    assert done.returncode == 0 and expected in done.stdout, done.stderr
    done = run("chat", "torch", str(workspace))
    assert done.returncode == 2 and "is a workspace" in done.stderr


def test_chat_on_transformers_says_the_same(story):
    folder, prompt, expected = story
    words = ("chat", "torch", str(folder), "--model-name", "base", *OPTIONS)
    done = run(*words, typed=f"{prompt}\n\nend\n{prompt}\n\nexit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(expected) == 2


def test_missing_template_is_said_before_loading(story):
    done = run("chat", str(story[0]))
    assert done.returncode == 2 and "has no chat template: give one with --model-name NAME" in done.stderr
    assert done.stderr.count("\n") == 1


SLOW_MODEL = """
    import threading
    from dataclasses import dataclass
    from pagoda.cli.chat import talk_to
    from pagoda.config import GenerationConfig

    @dataclass
    class Piece:
        text: str
        token_ids: tuple = (1,)
        finish_reason: str | None = None

    class Slow:
        def session(self, session_id=None, system=None): return self
        def close(self): pass
        def stream(self, text, gen_config):
            yield Piece(f"<{text!r}>")
            if "wait" in text:
                threading.Event().wait()

    print(talk_to(Slow(), GenerationConfig(), None).report())
"""


def test_in_a_terminal(tmp_path):
    """Multi-line input, history, Ctrl-C during a reply and during input, exit."""
    pexpect = pytest.importorskip("pexpect")
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW_MODEL))
    env = {
        "XDG_STATE_HOME": str(tmp_path),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    child = pexpect.spawn(sys.executable, [str(script)], env=env, encoding="utf-8", timeout=60, dimensions=(40, 100))
    child.expect_exact(">>>")
    child.send("one\rtwo\r\r")
    child.expect_exact("<'one\\ntwo'>")
    child.expect_exact(">>>")
    child.send("wait\r\r")
    child.expect_exact("<'wait'>")
    child.sendintr()
    child.expect_exact("[stopped]")
    child.expect_exact(">>>")
    child.send("dropped")
    child.sendintr()
    child.expect_exact(">>>")
    child.send("exit\r")
    child.expect("2 tokens in 2 replies")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "wait" in (tmp_path / "pagoda" / "chat_history").read_text()


def test_chat_module_needs_no_torch():
    code = "import sys, pagoda.cli.chat; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert chat.make_parser("x").prog == "x"
