"""Grammars: the mask, the accepted tokens and the refusals; JSON schemas against real ones with known instances."""

import json

import numpy as np
import pytest

from pagoda.errors import GrammarError
from pagoda.text.grammar import GrammarMasks, GrammarMatcher, compile_grammar
from pagoda.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CASES = [
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, None, '{"a": 12}', '{"b"'),
    ({"type": "json_schema", "schema": SCHEMA}, "</think>", '<b> x </think>{"a":1}', "</think>x"),
    ({"type": "json_object"}, None, '{"a": [null, "ü\\n"]}', "[1]"),
    ({"type": "regex", "regex": "a/b+"}, None, "a/bbb", "ab"),
    ({"type": "choice", "choices": ['yes "q"', "no\n"]}, None, 'yes "q"', "maybe"),
    ({"type": "grammar", "grammar": 'start: "x"+'}, None, "xxx", "y"),
    ({"type": "grammar", "grammar": 'root ::= "x"+ y\ny ::= [0-9]'}, None, "xx1", "1"),
]


@pytest.fixture(scope="module")
def masks(byte_tokenizer: Tokenizer) -> GrammarMasks:
    return GrammarMasks(byte_tokenizer, vocab_size=320)


def allowed(matcher: GrammarMatcher, num_words: int) -> set[int]:
    row = np.full(num_words, -1, np.int32)
    matcher.fill_mask(row)
    return {i for i in range(num_words * 32) if (row[i // 32] >> (i % 32)) & 1}


def accepts(matcher: GrammarMatcher, ids: list[int]) -> bool:
    return all(matcher.accept(i) for i in ids) and matcher.is_accepting


@pytest.mark.parametrize(("response_format", "after", "good", "bad"), CASES)
def test_mask_and_accept_agree(masks, byte_tokenizer, response_format, after, good, bad):
    grammar = compile_grammar(response_format, after)
    matcher = masks.matcher(grammar)
    for token in good.encode():
        legal = allowed(matcher, masks.num_words)
        assert token in legal and 257 not in legal and max(legal) < 258
        illegal = next(i for i in range(258) if i not in legal)
        assert not matcher.accept(illegal)
        assert matcher.accept(token)
    assert matcher.is_accepting and 256 in allowed(matcher, masks.num_words)
    assert not accepts(masks.matcher(grammar), list(bad.encode()))


def test_finished_means_only_the_end(masks):
    matcher = masks.matcher(compile_grammar({"type": "choice", "choices": ["ab"]}))
    assert accepts(matcher, list(b"ab"))
    assert allowed(matcher, masks.num_words) == {256}
    assert matcher.accept(256)


@pytest.mark.parametrize("folder", ["llama-2-7b-chat", "internlm2-chat", "llama-3.2-3b-instruct/original"])
def test_real_vocabularies(tokenizer_at, folder):
    tokenizer = tokenizer_at(folder)
    masks = GrammarMasks(tokenizer)
    matcher = masks.matcher(compile_grammar({"type": "json_schema", "schema": SCHEMA}))
    for token in tokenizer.encode_continuation('{"a": 12}'):
        assert token in allowed(matcher, masks.num_words)
        assert matcher.accept(token)
    assert allowed(matcher, masks.num_words) == set(tokenizer.eos_ids)


def test_schemas_with_known_instances(shared_data, masks):
    """Most schemas compile, and those that do never accept an invalid instance (valid ones may, in another order)."""
    lines = (shared_data / "schemas" / "maskbench_sample.jsonl").read_text(encoding="utf-8").splitlines()
    compiled = checked = wrong = 0
    rows = [json.loads(line) for line in lines[::8]]
    for row in rows:
        try:
            matcher = masks.matcher(compile_grammar({"type": "json_schema", "schema": row["schema"]}))
        except GrammarError:
            continue
        compiled += 1
        for test in row["tests"]:
            fresh = masks.matcher(compile_grammar({"type": "json_schema", "schema": row["schema"]}))
            text = json.dumps(test["data"], ensure_ascii=False).encode()
            wrong += accepts(fresh, list(text)) and not test["valid"]
            checked += 1
        assert matcher is not None
    assert compiled > 0.6 * len(rows) and checked > compiled and wrong == 0


DATES = [
    ("date", "2024-02-29", "2023-02-29"),
    ("date", "2000-02-29", "1900-02-29"),
    ("date", "0001-01-31", "0000-01-31"),
    ("time", "23:59:59Z", "23:59:60Z"),
    ("date-time", "2024-02-29T00:00:00.5+01:00", "2023-02-29T00:00:00Z"),
    ("date-time", "1999-12-31T23:59:59z", "1999-12-31T23:59:60z"),
]


@pytest.mark.parametrize(("form", "good", "bad"), DATES)
def test_texts_of_a_format_are_ones_that_calendars_take(masks, form, good, bad):
    bare = {"type": "string", "format": form}
    for schema in (bare, {"items": bare}, {"properties": {"enum": bare}}, {"anyOf": [{**bare, "allOf": [{}]}]}):
        for text, legal in ((good, True), (bad, False)):
            value = [text] if "items" in schema else {"enum": text} if "properties" in schema else text
            grammar = compile_grammar({"type": "json_schema", "schema": schema})
            assert accepts(masks.matcher(grammar), list(json.dumps(value).encode())) == legal, (schema, text)


def test_a_format_that_is_a_value_or_a_name_is_none(masks):
    names = {"type": "object", "properties": {"format": {"const": {"format": "date"}}}, "required": ["format"]}
    matcher = masks.matcher(compile_grammar({"type": "json_schema", "schema": names}))
    assert accepts(matcher, list(b'{"format": {"format": "date"}}'))


REFUSED = [
    ({"type": "json_schema", "schema": {"type": "foo"}}, "Invalid type"),
    ({"type": "json_schema", "schema": {"$ref": "http://example.com/x"}}, "refused"),
    ({"type": "json_schema", "schema": []}, "must be an object"),
    ({"type": "json_schema"}, "needs the field"),
    ({"type": "regex", "regex": "a("}, "unclosed"),
    ({"type": "regex", "regex": "(?=a)b"}, "look-around"),
    ({"type": "regex", "regex": "a" * 70000}, "longer than"),
    ({"type": "choice", "choices": []}, "one or more"),
    ({"type": "choice", "choices": [1]}, "must be a text"),
    ({"type": "grammar", "grammar": "start: foo"}, "unknown name"),
    ({"type": "grammar", "grammar": "((("}, "refused"),
    ({"type": "xml"}, "use one of"),
    ({"type": "json_schema", "schema": {"type": "integer", "multipleOf": 999983}}, "multipleOf"),
    ({"type": "json_schema", "schema": {"type": "number", "multipleOf": 99991e-3}}, "multipleOf"),
    ({"type": "json_schema", "schema": {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}}, "multipleOf"),
    ({"type": "json_schema", "schema": {"multipleOf": float("inf")}}, "finite"),
    ({"type": "grammar", "grammar": 'start: %json {"multiple\\u004ff": 99991, "multipleOf": 3}'}, "multipleOf"),
    ({"type": "grammar", "grammar": 'start: %json {"multipleOf": 1' + "0" * 400 + "}"}, "refused"),
    ({"type": "grammar", "grammar": "start: %json {"}, "not followed by JSON"),
    ("json", "use one of"),
]


@pytest.mark.parametrize(("response_format", "words"), REFUSED)
def test_refusals_are_one_sentence(response_format, words):
    with pytest.raises(GrammarError, match=words) as caught:
        compile_grammar(response_format)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and caught.value.param == "response_format"


def test_divisors_that_cost_little_are_taken():
    for divisor in (0.01, 1e-7, 2**20, 9973, 12.34):
        assert compile_grammar({"type": "json_schema", "schema": {"type": "number", "multipleOf": divisor}})
    assert compile_grammar({"type": "grammar", "grammar": 'start: %json {"type": "integer", "multipleOf": 7}'})


def test_depth_limit():
    deep: dict = {"type": "integer"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    assert compile_grammar({"type": "json_schema", "schema": deep})
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    with pytest.raises(GrammarError, match="deeper than 64"):
        compile_grammar({"type": "json_schema", "schema": deep})


def test_text_needs_no_grammar():
    assert compile_grammar(None) is None and compile_grammar({"type": "text"}) is None


def test_spaces_are_bounded(masks):
    grammar = compile_grammar({"type": "json_object"})
    assert accepts(masks.matcher(grammar), list(b'{"a":' + b" " * 64 + b"1}"))
    assert not accepts(masks.matcher(grammar), list(b'{"a":' + b" " * 65 + b"1}"))
