"""Output held to a grammar: a request's `response_format` becomes a grammar text, and that a bitmask per token.

llguidance does the work: no backtracking, bounded by fuel on hostile input.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from pagoda.errors import GrammarError
from pagoda.text.tokenizer import Tokenizer

MAX_BYTES = 64 << 10
MAX_DEPTH = 64
MAX_DIVISOR = 10_000
JSON_RULES: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}", "lenient": False, "coerce_one_of": False}
"""Space between JSON tokens is bounded, so that a model cannot idle in it; unknown keywords are refused."""
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29"
_DAY = f"^((000[1-9]|00[1-9].|0[1-9]..|[1-9]...)-(0[13-9]|1|02-([01]|2[0-8]))|{_LEAP})"
_CLOCK = "[^:]*:[^:]*:[0-5]"
EXACT_FORMATS = {"date": _DAY, "time": f"^{_CLOCK}", "date-time": _DAY + _CLOCK}
"""What a text of a format must also match, for llguidance lets through the year 0, the 29th of any February and the
second 60, and calendars refuse them (RFC 3339, 5.7: the second 60 only where a leap second was)."""
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
SCHEMA_VALUES = ("const", "enum", "default", "examples")
KINDS = ("text", "json_object", "json_schema", "regex", "choice", "grammar")


def _check_size(value: Any) -> None:
    """`GrammarError` when a schema or grammar is larger or deeper than the limits."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise GrammarError(f"The response format is nested deeper than {MAX_DEPTH} levels.", "response_format")
        inner = (v.values() if isinstance(v, Mapping) else v if isinstance(v, (list, tuple)) else () for v in level)
        level = [item for items in inner for item in items]
    try:
        size = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError):
        raise GrammarError("The response format is not plain JSON.", "response_format") from None
    if size > MAX_BYTES:
        raise GrammarError(f"The response format is longer than {MAX_BYTES} bytes.", "response_format")


def check_divisors(fields: Iterable[tuple[str, Any]]) -> None:
    """`GrammarError` when the `multipleOf` among these fields would make an automaton of more than `MAX_DIVISOR`
    states: as many as the least common multiple of them all, without its factors 2 and 5, which cost nothing. The
    library has no limit of its own, and would compute for minutes."""
    states = 1
    for name, value in fields:
        if name != "multipleOf" or isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise GrammarError("A multipleOf of the schema is no finite number.", "response_format")
        odd = abs(Fraction(repr(value)).numerator)
        for factor in (2, 5):
            while odd % factor == 0:
                odd //= factor
        states = math.lcm(states, odd)
        if states > MAX_DIVISOR:
            raise GrammarError(
                f"The multipleOf of the schema have a common multiple over {MAX_DIVISOR}: use fewer or smaller ones.",
                "response_format",
            )


def fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of all objects in plain JSON."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)


def _check_schemas_inside(lark: str) -> None:
    """`check_divisors` for the schemas that a client's grammar holds."""
    fields: list[tuple[str, Any]] = []
    reader = json.JSONDecoder(object_pairs_hook=fields.extend)  # sees names that are given twice
    for found in re.finditer(r"%json\s*", lark):
        try:
            reader.raw_decode(lark, found.end())
        except ValueError:
            raise GrammarError("A %json of the grammar is not followed by JSON.", "response_format") from None
    check_divisors(fields)


def _field(response_format: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if response_format.get(name) is not None:
            return response_format[name]
    raise GrammarError(
        f"The response format {response_format['type']!r} needs the field {names[0]!r}.", "response_format"
    )


def _exact(schema: Any) -> Any:
    """The schema with the patterns of `EXACT_FORMATS` beside its formats."""
    if isinstance(schema, (list, tuple)):
        return [_exact(inner) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {key: _exact_under(key, value) for key, value in schema.items()}
    pattern, more = EXACT_FORMATS.get(str(made.get("format"))), made.get("allOf", [])
    return {**made, "allOf": [*more, {"pattern": pattern}]} if pattern and isinstance(more, list) else made


def _exact_under(key: str, value: Any) -> Any:
    if key in SCHEMA_VALUES:
        return value
    if key in SCHEMA_MAPS and isinstance(value, Mapping):
        return {name: _exact(inner) for name, inner in value.items()}
    return _exact(value)


def _json_grammar(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, (Mapping, bool)):
        raise GrammarError("A JSON schema must be an object, true or false.", "response_format")
    check_divisors(fields_of(schema))
    try:
        # Through text: a schema that is `true` or `false` is allowed, and nothing but plain JSON passes.
        text = json.dumps(_exact(schema))
        grammar = json.loads(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_RULES))
    except ValueError as error:
        raise GrammarError(f"The JSON schema was refused: {_sentence(error)}", "response_format") from None
    return grammar["grammars"][0]


def _body(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """One llguidance grammar object for any kind but `text`."""
    kind = response_format["type"]
    if kind == "json_object":
        return _json_grammar({"type": "object"})
    if kind == "json_schema":
        given = _field(response_format, "json_schema", "schema")
        return _json_grammar(given["schema"] if isinstance(given, Mapping) and "schema" in given else given)
    if kind == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(_text(_field(response_format, "regex", "regex_schema")))
        return json.loads(grammar)["grammars"][0]
    if kind == "choice":
        choices = _field(response_format, "choices", "choice")
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
            raise GrammarError("The response format 'choice' needs a list of one or more texts.", "response_format")
        return {"lark_grammar": "start: " + " | ".join(literal(_text(c)) for c in choices)}
    text = _text(_field(response_format, "grammar"))
    try:
        lark = any_to_lark(text)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(error) from None
    _check_schemas_inside(lark)
    return {"lark_grammar": lark}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise GrammarError("The response format holds a value that must be a text.", "response_format")
    return value


def literal(text: str) -> str:
    """`text` as a string of the Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _sentence(error: object) -> str:
    """The library's message on one line, at most 300 characters."""
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else line[:297] + "..."


def compile_grammar(response_format: Mapping[str, Any] | None, after: str | None = None) -> str | None:
    """The serialized grammar of an OpenAI-style `response_format` (`json_object`, `json_schema`, `regex`, `choice`,
    `grammar` in Lark or GBNF), or None for plain text. With `after` (`</think>`) the grammar holds for what follows the
    first occurrence of that text. Takes up to a second on large schemas: call it off the event loop. Raises
    `GrammarError` in one sentence."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    kind = {"regex_schema": "regex", "json": "json_schema", "ebnf": "grammar", "lark": "grammar"}.get(str(kind), kind)
    if kind not in KINDS:
        raise GrammarError(f"The response format's type is {kind!r}: use one of {', '.join(KINDS)}.", "response_format")
    if kind == "text":
        return None
    _check_size(dict(response_format))
    try:
        body = _body({**response_format, "type": kind})
    except (ValueError, RecursionError, GbnfToLarkError) as error:
        raise GrammarError(f"The response format was refused: {_sentence(error)}", "response_format") from None
    return seal([body], after)


def seal(grammars: list[dict[str, Any]], after: str | None = None) -> str:
    """Serialize grammar objects (the first is where it starts), after free text up to `after`; `GrammarError` when
    llguidance refuses them."""
    if after is not None:
        first = {**grammars[0], "name": "body"}
        head = f"start: before @body\nbefore[suffix={literal(after)}]: /(?s:.*)/"
        grammars = [{"lark_grammar": head}, first, *grammars[1:]]
    grammar = json.dumps({"grammars": grammars})
    refused, notes = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    if refused:
        raise GrammarError(f"The response format was refused: {_sentence(notes[0])}", "response_format")
    return grammar


class _Vocabulary:
    """What llguidance reads of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else tokenizer.vocab_size - 1
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode_continuation(text, parse_special=False)


class GrammarMatcher:
    """Where one reply stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: frozenset[int]):
        self._matcher, self._ends = matcher, ends
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            what = self._matcher.get_error().partition("<state>")[0]
            raise GrammarError(f"The grammar failed: {_sentence(what)}", "response_format")

    def copy(self) -> "GrammarMatcher":
        """Another that stands where this one does."""
        return GrammarMatcher(self._matcher.deep_copy(), self._ends)

    def fill_mask(self, row: np.ndarray) -> None:
        """Write the packed mask of allowed next tokens into `row`: int32, contiguous, 32 tokens a word, lowest bit
        first; a row wider than the vocabulary forbids the rest. `GrammarError` when the grammar became too complex."""
        assert row.dtype == np.int32 and row.ndim == 1 and row.flags["C_CONTIGUOUS"]
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        self._check()
        width = min(len(row), len(mask))  # the library rounds the vocabulary up
        row[:width], row[width:] = mask[:width], 0

    def accept(self, token: int) -> bool:
        """Go on by one token; False (and no change of state) when the grammar does not allow it here. The end of
        sequence changes nothing."""
        if token in self._ends:
            return self.is_accepting
        if self._matcher.validate_tokens([token]) != 1:
            return False
        return self._matcher.consume_token(token)

    @property
    def is_accepting(self) -> bool:
        """The reply may end here."""
        return self._matcher.is_accepting()


class GrammarMasks:
    """Makes matchers for one tokenizer and the model's `vocab_size` (at least the tokenizer's; ids beyond the tokenizer
    are never allowed). Building it reads the whole vocabulary (up to a second)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None):
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        num_tokens = max(tokenizer.vocab_size, vocab_size or 0)
        self.num_words = (num_tokens + 31) // 32
        self._ends = frozenset(i for i in tokenizer.eos_ids if i < num_tokens)
        self._library = llguidance.LLTokenizer(wrapper, n_vocab=num_tokens, eos_token=sorted(self._ends) or None)

    def matcher(self, grammar: str) -> GrammarMatcher:
        """A fresh matcher of what `compile_grammar` returned; `GrammarError` when it cannot be built."""
        made = llguidance.LLMatcher(self._library, grammar, log_level=0)
        matcher = GrammarMatcher(made, self._ends)
        made.compute_bitmask()
        if made.is_error() and "NoExtension" in made.get_error():
            raise GrammarError("The response format allows no text: no token can begin it.", "response_format")
        return matcher
