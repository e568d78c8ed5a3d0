"""The parser of replies: known replies of each format, and equality however a reply is cut."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagoda.errors import GrammarError, TemplateError
from pagoda.text.grammar import GrammarMasks
from pagoda.text.parser import OutputParser, ParsedReply, collect, held_back
from pagoda.text.reasoning import REASONING_FORMATS, guess_reasoning
from pagoda.text.tools import TOOL_FORMATS, guess_tools, tool_grammar

CALL = '{"name": "get_weather", "arguments": {"city": "Ulm {\\"x\\"}", "days": [1, 2]}}'
ARGS = '{"city": "Ulm {\\"x\\"}", "days": [1, 2]}'
LLAMA = CALL.replace("arguments", "parameters")
TIME = '{"name": "get_time", "arguments": {}}'


def parse(text: str, cuts=(), **kwargs) -> ParsedReply:
    """Parse `text` in pieces of the lengths `cuts`, the rest at once."""
    parser = OutputParser(make_id=map(str, itertools.count()).__next__, **kwargs)
    events, start = [], 0
    for n in cuts:
        events += parser.push(text[start : start + n])
        start += n
    return collect([*events, *parser.push(text[start:]), *parser.flush()])


def shape(reply: ParsedReply) -> tuple:
    return reply.reasoning, reply.text, [(c.name, c.arguments) for c in reply.calls]


WEATHER = ("get_weather", ARGS)
KNOWN = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", ("", "", [WEATHER])),
    ("hermes", f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{TIME}</tool_call>",
     ("", "Let me see.", [WEATHER, ("get_time", "{}")])),
    ("hermes", f"<tool_call>{TIME}</tool_call> done", ("", " done", [("get_time", "{}")])),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", "{}")])),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("", "", [("f", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", [("f", '{"a": 1}')])),
    ("hermes", "a < b <tool", ("", "a < b <tool", [])),
    ("hermes", "<tool_call>no json</tool_call>", ("", "<tool_call>no json</tool_call>", [])),
    ("hermes", '<tool_call>{"name": "f", "argum', ("", '<tool_call>{"name": "f", "argum', [])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', ("", "", [("f", '{"a": [1')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, oops} x</tool_call>y', ("", "y", [("f", "{}")])),
    ("llama3", LLAMA, ("", "", [WEATHER])),
    ("llama3", f"<|python_tag|>{LLAMA}; {LLAMA}", ("", "", [WEATHER, WEATHER])),
    ("llama3", '{"answer": 42}', ("", '{"answer": 42}', [])),
    ("llama3", '{"name": "Ada", "parameters": {}}', ("", '{"name": "Ada", "parameters": {}}', [])),
    ("llama3", "Plain {text}", ("", "Plain {text}", [])),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {TIME}]", ("", "", [WEATHER, ("get_time", "{}")])),
    ("mistral", f"[TOOL_CALLS]get_weather{ARGS}[TOOL_CALLS]get_time[ARGS]{{}}",
     ("", "", [WEATHER, ("get_time", "{}")])),
    ("mistral", "[TOOL_CALLS] oh no", ("", "[TOOL_CALLS] oh no", [])),
    ("internlm", f"Sure.<|action_start|><|plugin|>\n{LLAMA}<|action_end|>\n", ("", "Sure.", [WEATHER])),
    ("internlm", f"<|action_start|> <|plugin|>\n{LLAMA}<|action_end|>", ("", "", [WEATHER])),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "text", "expected"), KNOWN)
def test_known_replies_cut_at_every_place(tools, text, expected):
    options = {"tools": tools, "tool_names": ("get_weather", "get_time")}
    assert shape(parse(text, **options)) == expected
    for at in range(len(text) + 1):
        assert shape(parse(text, [at], **options)) == expected
    assert shape(parse(text, [1] * len(text), **options)) == expected


REASONED = [
    ("<think>\nHm, 1 < 2.\n</think>\n\nYes.", False, ("Hm, 1 < 2.", "Yes.", [])),
    ("\n<think>\n\n</think>\n\nYes.", False, ("", "Yes.", [])),
    ("still going </thi", False, ("", "still going </thi", [])),
    ("Hm.</think>Yes </think>", True, ("Hm.", "Yes </think>", [])),
    ("Hm. never ended ", True, ("Hm. never ended ", "", [])),
    ("No <think>tags</think>", False, ("", "No <think>tags</think>", [])),
    (f"<think>a</think>\n<tool_call>{TIME}</tool_call>", False, ("a", "", [("get_time", "{}")])),
    (f"<think><tool_call>{TIME}</tool_call></think>x", False, (f"<tool_call>{TIME}</tool_call>", "x", [])),
]


@pytest.mark.parametrize(("text", "in_reasoning", "expected"), REASONED)
def test_reasoning_cut_at_every_place(text, in_reasoning, expected):
    options = {"reasoning": "think", "tools": "hermes", "in_reasoning": in_reasoning}
    assert shape(parse(text, **options)) == expected
    for at in range(len(text) + 1):
        assert shape(parse(text, [at], **options)) == expected


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
          "<|action_start|>", "<|plugin|>", "<|action_end|>", CALL, LLAMA, TIME, ARGS, "[", "]", ",", ";", "{", "}",
          '"', "\\", ":", "name", '"name": "f"', '"arguments"', " ", "\n", "text", "<", "<tool", "é你"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    tools=st.sampled_from([None, *TOOL_FORMATS]),
    reasoning=st.sampled_from([None, "think"]),
    in_reasoning=st.booleans(),
    data=st.data(),
)
def test_streamed_is_unstreamed(text, tools, reasoning, in_reasoning, data):
    options = {"tools": tools, "reasoning": reasoning, "in_reasoning": in_reasoning}
    whole = parse(text, **options)
    cuts = data.draw(st.one_of(st.just([1] * len(text)), st.lists(st.integers(0, 9), max_size=20)))
    assert parse(text, cuts, **options) == whole
    if tools is None and reasoning is None:
        assert whole.text == text


@given(text=st.text("ab<", max_size=8))
@example("ab <")
def test_held_back(text):
    """Brute force: what is held is exactly a trailing beginning of the mark and the space before it."""
    ends = [n for n in range(len("<ab")) if text.endswith("<ab"[:n])]
    assert held_back(text, ["<ab"]) == len(text) - len(text[: len(text) - max(ends)].rstrip())


def test_text_is_not_kept_waiting():
    parser = OutputParser(tools="hermes")
    assert collect(parser.push("Hello wor")).text == "Hello wor"
    assert collect(parser.push("ld <")).text == "ld"
    assert collect(parser.push("3")).text == " <3"


def test_arguments_stream_as_they_come():
    parser = OutputParser(tools="hermes")
    assert parser.push('<tool_call>{"name": "f", ') == []
    start, first = parser.push('"arguments": {"a"')
    assert (start.index, start.name, first.text) == (0, "f", '{"a"') and start.id.startswith("call_")
    assert [e.text for e in parser.push(": 1}}")] == [": 1}"]
    assert parser.push("</tool_call>") == [] and parser.num_calls == 1 and parser.flush() == []


def test_mistral_ids_have_nine_letters():
    start, *_ = OutputParser(tools="mistral").push(f"[TOOL_CALLS][{TIME}]")
    assert len(start.id) == 9 and start.id.isalnum()


def test_formats_are_guessed_from_templates(shared_data):
    folder = shared_data / "chat_templates"
    expected = {
        "Qwen-Qwen3-0.6B": ("hermes", "think"),
        "Qwen-Qwen2.5-7B-Instruct": ("hermes", None),
        "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", None),
        "meta-llama-Llama-3.1-8B-Instruct": ("llama3", None),
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": (None, "think"),
        "yi-6b-chat": (None, None),
    }
    for name, formats in expected.items():
        source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        assert (guess_tools(source), guess_reasoning(source)) == formats, name
    assert guess_tools("", {"<|action_start|>"}.__contains__) == "internlm"


def test_prompt_that_opens_the_reasoning():
    think = REASONING_FORMATS["think"]
    assert think.is_open("...<|Assistant|><think>\n") and not think.is_open("<think>\n\n</think>\n\n")


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time"}},
]


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_forced_calls_parse(byte_tokenizer, name):
    """Follow the grammar greedily towards a valid call of each tool: the parser reads it back."""
    masks = GrammarMasks(byte_tokenizer)
    form = TOOL_FORMATS[name]
    calls = [
        json.dumps({"name": n, form.arguments: a}) for n, a in (("get_weather", {"city": "Ulm"}), ("get_time", {}))
    ]
    if form.listed:
        text = f"[TOOL_CALLS][{calls[0]},{calls[1]}]"
    elif form.bare:
        text = ";".join(calls)
    else:
        text = "\n".join(f"{form.begins[0]}\n{c}\n{form.end}" for c in calls)
    matcher = masks.matcher(tool_grammar(TOOLS, name))
    assert all(matcher.accept(b) for b in text.encode()) and matcher.is_accepting
    reply = parse(text, tools=name, tool_names=("get_weather", "get_time"))
    assert [(c.name, json.loads(c.arguments)) for c in reply.calls] == [
        ("get_weather", {"city": "Ulm"}),
        ("get_time", {}),
    ]
    wrong = masks.matcher(tool_grammar(TOOLS[:1], name))
    assert not all(wrong.accept(b) for b in text.replace("get_weather", "get_w").encode())
    single = masks.matcher(tool_grammar(TOOLS, name, parallel=False))
    assert not all(single.accept(b) for b in text.encode())


def test_refused_tools():
    slow = {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 99991}}}
    with pytest.raises(GrammarError, match="multipleOf"):
        tool_grammar([{"function": {"name": "f", "parameters": slow}}], "hermes")
    with pytest.raises(GrammarError, match="refused"):
        tool_grammar([{"function": {"name": "f", "parameters": {"type": "nope"}}}], "hermes")
    with pytest.raises(TemplateError, match="name"):
        tool_grammar([{"function": {}}], "hermes")
