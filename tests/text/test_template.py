"""Templates against transformers' renders (`expected_renders.jsonl`) and against hostile input."""

import json
import time
from pathlib import Path

import jinja2
import pytest

from pagoda.errors import TemplateError
from pagoda.text import template as template_module
from pagoda.text.named_templates import NAMED
from pagoda.text.template import ChatTemplate, checkpoint_source, load_template, named_template, template_names

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]


class Marks:
    """Only what a template asks of a tokenizer."""

    adds_bos = True

    def __init__(self, bos: str = "<s>", eos: str = "</s>", known: tuple[str, ...] = ()):
        self.bos_token, self.eos_token, self._known = bos, eos, known

    def id_of(self, token: str) -> int | None:
        return self._known.index(token) if token in self._known else None


def test_renders_equal_transformers(shared_data):
    folder = shared_data / "chat_templates"
    given = json.loads((folder / "conversations.json").read_text(encoding="utf-8"))
    num_rendered = 0
    for line in (folder / "expected_renders.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        source = (folder / f"{row['template']}.jinja").read_text(encoding="utf-8")
        template = ChatTemplate("checkpoint", source, Marks(row["bos_token"], row["eos_token"]))
        messages, tools = given["conversations"][row["conversation"]], given["tools"] if row["tools"] else None
        if row["rendered"] is None:
            with pytest.raises(TemplateError):
                template.render(messages, row["add_generation_prompt"], tools)
            continue
        # The reference was made without the clock: these templates then write this date.
        text = template.render(messages, row["add_generation_prompt"], tools, date_string="26 Jul 2024")
        assert text == row["rendered"], row["template"]
        num_rendered += 1
    assert num_rendered == 126


SAME_AS_CHECKPOINT = [
    ("internlm2-chat", "internlm2-chat"),
    ("yi", "yi-6b-chat"),
    ("chatml", "yi-6b-chat"),
    ("qwen2_5", "Qwen-Qwen2.5-7B-Instruct"),
    ("qwen3", "Qwen-Qwen3-0.6B"),
    ("gemma", "google-gemma-2-2b-it"),
    ("phi-3", "microsoft-Phi-3.5-mini-instruct"),
]


@pytest.mark.parametrize(("name", "file"), SAME_AS_CHECKPOINT)
def test_named_templates_write_what_the_checkpoints_write(shared_data, name, file):
    source = (shared_data / "chat_templates" / f"{file}.jinja").read_text(encoding="utf-8")
    reference = ChatTemplate("checkpoint", source, Marks())
    named = named_template(name, Marks())
    with_system = [{"role": "system", "content": "Be brief."}, *CHAT]
    for messages in [with_system] if name == "internlm2-chat" else [CHAT] if name == "gemma" else [CHAT, with_system]:
        assert named.render(messages) == reference.render(messages)


def test_mistral_and_llama_formats():
    assert named_template("mistral", Marks()).render(CHAT) == "<s>[INST] hi [/INST]hello</s>[INST] bye [/INST]"
    assert named_template("codellama", Marks()).render(CHAT) == "<s>[INST] hi [/INST] hello </s><s>[INST] bye [/INST]"
    llama = named_template("llama2", Marks()).render([{"role": "system", "content": "Be brief."}, *CHAT])
    assert llama == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST] hello </s><s>[INST] bye [/INST]"
    assert named_template("llama2", Marks()).render(CHAT[:1]).startswith("<s>[INST] <<SYS>>\nYou are a helpful, ")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    expected = head.format("user", "hi<|eot_id|>") + head.format("assistant", "")
    assert named_template("llama3", Marks("<|begin_of_text|>")).render(CHAT[:1]) == "<|begin_of_text|>" + expected


def test_internlm_chat_7b():
    template = named_template("internlm-chat-7b", Marks())
    text = template.render([{"role": "system", "content": "S"}, *CHAT])
    assert text == "<s><|System|>:S\n<|User|>:hi\n<|Bot|>:hello<eoa>\n<|User|>:bye\n<|Bot|>:"
    assert "InternLM (书生·浦语)" in template.render(CHAT) and template.stop_words == ("<eoa>",)


def test_vicuna_baichuan_base():
    vicuna = named_template("vicuna", Marks()).render([{"role": "system", "content": "S"}, *CHAT])
    assert vicuna == "<s>S\nUSER: hi\nASSISTANT: hello</s>\nUSER: bye\nASSISTANT: "
    baichuan = named_template("baichuan2-chat", Marks()).render(CHAT)
    assert baichuan == "<reserved_106>hi<reserved_107>hello<reserved_106>bye<reserved_107>"
    assert named_template("base", Marks()).render(CHAT[:1]) == "<s>hi"


def test_every_name_renders():
    names = {"internlm-chat-7b", "internlm2-chat", "internlm2_5-chat", "internlm3", "llama2", "llama3", "llama3_1",
             "qwen", "qwen2_5", "qwen3", "chatml", "mistral", "baichuan", "baichuan2", "yi", "vicuna", "gemma", "phi-3",
             "puyu", "codellama", "solar", "ultralm", "base"}  # fmt: skip
    assert names <= set(template_names()) == set(NAMED)
    for name in template_names():
        text = named_template(name, Marks()).render(CHAT)
        assert "hi" in text and "hello" in text and text.index("hello") < text.index("bye")


def test_where_the_template_comes_from(tmp_path: Path):
    marks = Marks(known=("<|im_end|>",))
    with pytest.raises(TemplateError, match="--model-name"):
        load_template(tmp_path, None, marks)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "A{{ messages[0].content }}"}))
    assert load_template(tmp_path, None, marks).render(CHAT) == "Ahi"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert checkpoint_source(tmp_path) == "D"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert checkpoint_source(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_text("F<|im_end|>")
    template = load_template(tmp_path, None, marks)
    assert template.render(CHAT) == "F<|im_end|>"
    assert template.stop_words == ("<|im_end|>",) and template.stop_ids == (0,)
    assert load_template(tmp_path, "chatml", marks).name == "chatml"
    with pytest.raises(TemplateError, match="no chat template called 'nope': use one of base, internlm-chat-7b"):
        load_template(tmp_path, "nope", marks)


def test_messages_are_made_plain():
    city = "{{ m.tool_calls[0].function.arguments.city if m.tool_calls }}"
    source = "{% for m in messages %}{{ m.content }}|" + city + "{% endfor %}"
    template = ChatTemplate("t", source, Marks())
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Ulm"}'}}
    assert template.render([parts, {"role": "assistant", "content": None, "tool_calls": [call]}]) == "ab||Ulm"
    for wrong in ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, {"content": "x"},
                  {"role": "user", "content": 3}, {"role": "user", "content": "x", "extra": {1, 2}}):  # fmt: skip
        with pytest.raises(TemplateError):
            template.render([wrong])
    call["function"]["arguments"] = "{"
    with pytest.raises(TemplateError, match="not valid JSON"):
        template.render([{"role": "assistant", "content": None, "tool_calls": [call]}])


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ (messages|attr('__class__')).mro() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{% include '/etc/passwd' %}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}{{ messages.sort() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_sandbox(source):
    with pytest.raises(TemplateError):
        ChatTemplate("evil", source, Marks()).render(CHAT)


def test_limits(monkeypatch):
    template = ChatTemplate("t", "{{ messages|length }}", Marks())
    with pytest.raises(TemplateError, match="at most 2048"):
        template.render([CHAT[0]] * 2049)
    with pytest.raises(TemplateError, match="reserved"):
        template.render(CHAT, chat_template="{{ 1 }}")
    with pytest.raises(TemplateError, match="longer than"):
        template.render(CHAT, big="x" * 9000)
    monkeypatch.setattr(template_module, "MAX_OUTPUT_CHARS", 100)
    with pytest.raises(TemplateError, match="more than 100"):
        ChatTemplate("t", "{% for i in range(99) %}long {% endfor %}", Marks()).render(CHAT)
    with pytest.raises(TemplateError, match="not valid Jinja"):
        ChatTemplate("t", "{% for %}", Marks())


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro m() %}{% for a in range(9999) %}{{ m() if a }}{% endfor %}{% endmacro %}{{ m() }}",
    "{{ 9**9**9 }}",
    "{% set n = namespace(x=9) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set x = 'a' * 10**12 %}",
    "{% for a in m %}{% for b in m %}{% for c in m %}{% for d in m %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in m %}{% for b in m %}{% for c in m %}{{ loop.length if 0 }}{% endfor %}{% endfor %}{% endfor %}",
    "{% set _until = 10**9 %}{% for a in range(9999) %}{% for b in range(9999) %}{{ 1 if 0 }}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='abcdefgh') %}{% for a in range(30) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='abcdefgh') %}{% for a in range(30) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a,') %}{% for a in range(30) %}{% set n.x = n.x|replace('a', 'aaaaaaaa') %}{% endfor %}",
    "{% set n = namespace(x='a,') %}{% for a in range(30) %}{% set n.x = n.x.replace('a', 'aaaaaaaa') %}{% endfor %}",
    "{% set x = ['a' * 10**6] * 1000 %}{{ x|join|length }}",
    "{% set x = ['a' * 10**6] * 1000 %}{{ ''.join(x)|length }}",
    *(f"{{{{ ({made})|string|length }}}}" for made in (
        "'%0300000000d' % 1", "'%(a(b))300000000s' % {'a(b)': 1}", "'%*d' % (300000000, 1)", "'%.300000000f' % 1.5",
        "'%300000000d'|format(1)", "'{:300000000}'.format(1)", "'{:{}}'.format(1, 300000000)",
        "'{a:300000000}'.format_map({'a': 1})", "'a'|center(300000000)", "'a'|center(width=300000000)",
        "'a'.center(300000000)", "'a'.ljust(300000000)", "'a'.zfill(300000000)", "'\\t'.expandtabs(300000000)",
        "'a\\nb'|indent(300000000)", "'a b'|wordwrap(1, true, 'x' * 10**7)", "[1]|batch(300000000, 0)|first",
        "1|round(300000000, 'ceil')", "[1]|tojson(indent=300000000)", "'%s' * 1000 % (('a' * 10**6,) * 1000)",
    )),
]  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_ends_in_time(source, monkeypatch):
    monkeypatch.setattr(template_module, "MAX_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"took longer|too large|recursion"):
        ChatTemplate("evil", source, Marks()).render(CHAT, m=[0] * 900)
    assert time.monotonic() - started < 2
    assert (
        ChatTemplate("good", "{{ 3 * 4 }}{{ '-' * 3 }}{{ 2 ** 3 }}{{ 0.5 * 3 }}", Marks()).render(CHAT) == "12---81.5"
    )


def test_values_are_made_as_jinja_makes_them():
    """The bounds change nothing that is small; plain Jinja is the reference."""
    source = """{% for m in messages if m.content != 'hello' %}{{ loop.index ~ '/' ~ loop.length ~ m.no ~ loop.last }};
    {%- else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 1 + 2.5 }}
    {{ 7 % 4 }}{{ '%s of %(a)s' if 0 }}{{ '%5d|%-4s|%.2f' % (3, 'x', 1.5) }}{{ '%(k)s' % {'k': 1} }}{{ '**%s**' % 'b' }}
    {{ 'x'|center(5) }}{{ 'x\ny'|indent(2, true) }}{{ '%s!'|format('a') }}{{ 'aXa'|replace('a', 'bb') }}
    {{ [1, 2]|join(', ') }}{{ messages|join('+', attribute='role') }}{{ messages|map(attribute='role')|join }}
    {{ '-'.join(['a', 'b']) }}{{ '{:>4}{a}'.format(1, a=2) }}{{ 1.256|round(2) }}{{ [1, 2, 3]|batch(2, 0)|list }}
    {{ 'a b c'|wordwrap(2) }}{{ none ~ true ~ 1.0 }}{{ 'ab'.replace('', '-') }}{{ 'a\tb'.expandtabs() }}
    {%- for x in [[1, [2]]] recursive %}{{ loop.depth }}{{ loop(x) if x is not number }}{% endfor %}"""
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source).render(messages=CHAT)
    assert ChatTemplate("t", source, Marks()).render(CHAT) == plain


def test_generation_tag_loop_controls_and_json():
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ {'ü': '<'} | tojson }}{{ dict(a=1)['a'] }}"
    )
    assert ChatTemplate("t", source, Marks()).render(CHAT) == 'hi{"ü": "<"}1'
