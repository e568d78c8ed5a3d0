"""The documents against the code: commands parse with the real parsers, Python compiles and its names exist, links lead
somewhere, scripts are there."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from pagoda.cli.flags import first_word
from pagoda.cli.main import VERBS, find_verb

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
PLACEHOLDERS = {"N": "1", "BOOL": "True", "KIND": "none"}


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def command_lines(page: Path) -> list[str]:
    """Lines in blocks, and inline code, that call one of our commands."""
    text = page.read_text(encoding="utf-8")
    lines = [line for _, block in fences(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))
    parts = [part.strip() for line in lines for part in re.split(r" && | \| (?=pagoda|lmdeploy)|\s#|\s->", line)]
    return [part[part.index(m[1]) :] for part in parts if (m := re.match(r"(?:\S*/)?(pagoda|lmdeploy) ", part + " "))]


def words_of(command: str) -> list[str]:
    """The words of a command as a reader would type them: options are given, of alternatives the first is taken."""
    command = command.replace("\\|", "|")
    command = re.sub(r"\[flags\]|\.\.\.|…", "", command)
    command = re.sub(r"[\[\]]", " ", command)
    command = re.sub(r"\s*\|\s*\S+", "", command)
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]


COMMANDS = [pytest.param(c, id=f"{p.name}: {c}") for p in PAGES for c in dict.fromkeys(command_lines(p))]


def test_the_documents_have_commands():
    assert len(COMMANDS) > 20
    assert "pagoda chat" in command_lines(ROOT / "README.md")
    assert "lmdeploy convert internlm-chat-7b /path/to/internlm-chat-7b" in command_lines(ROOT / "README.md")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    _, *words = words_of(command)
    if not words or words[0] in ("--help", "--version", "VERB"):
        return  # the program's name, or what it prints about itself
    name = find_verb(words[0])
    assert name is not None, f"there is no verb {words[0]}"
    verb = VERBS[name]
    parser = importlib.import_module(verb.module).make_parser(f"pagoda {name}")
    _, rest = first_word(words[1:], verb.first_words)
    if len(words) > 1 and "--help" not in rest:  # a verb alone is the verb's name
        parser.parse_args(parser.spelled(rest))


def names_of(code: str) -> list[tuple[str, str]]:
    """(module, name) of everything that a piece of Python imports from us."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pagoda":
            found += [(node.module, alias.name) for alias in node.names]
    return found


def knobs_of(code: str) -> list[tuple[str, str]]:
    """(class, keyword) of every configuration that is made."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [(c.func.id, k.arg or "") for c in calls if isinstance(c.func, ast.Name) and c.func.id.endswith("Config")
            for k in c.keywords]  # fmt: skip


BLOCKS = [pytest.param(text, id=f"{p.name} {i}") for p in PAGES for i, (lang, text) in enumerate(fences(p))
          if lang == "python"]  # fmt: skip


@pytest.mark.parametrize("code", BLOCKS)
def test_python_compiles_and_its_names_exist(code):
    compile(code, "block", "exec")
    for module, name in names_of(code):
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
    for cls, knob in knobs_of(code):
        assert knob in getattr(importlib.import_module("pagoda"), cls).__dataclass_fields__, f"{cls} has no {knob}"


def test_the_readme_has_python():
    assert any("README.md" in str(block.id) for block in BLOCKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_scripts_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        assert not link or (page.parent / link).exists(), f"{link} is not there"
    for script in re.findall(r"python ((?:benchmarks|examples)/\S+\.py)", text):
        assert (ROOT / script).exists(), f"{script} is not there"
    for source in re.findall(r"`(src/pagoda/[\w/.]+|tests/[\w/.]+\.py|examples/[\w/.]+)`", text):
        assert (ROOT / source).exists(), f"{source} is not there"
