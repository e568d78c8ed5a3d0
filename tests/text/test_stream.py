"""Streams of text against the whole decode, cut everywhere."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.text.stream import StopMatcher, TextStream

FOLDERS = ["llama-2-7b-chat", "llama-3.2-3b-instruct/original", "internlm2-chat"]


def cut(items, cuts):
    """`items` in chunks whose lengths come from `cuts`; the rest at once."""
    start = 0
    for n in cuts:
        yield items[start : start + n]
        start += n
    yield items[start:]


def streamed(stream: TextStream, ids, cuts) -> str:
    return "".join([*(stream.push(chunk) for chunk in cut(ids, cuts)), stream.flush()])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("skip", [True, False])
def test_joined_stream_is_the_decode(tokenizer_at, folder, skip, data):
    tokenizer = tokenizer_at(folder)
    text = st.text(max_size=12).map(lambda t: tokenizer.encode(t))
    byte_like = st.lists(st.integers(0, 300), max_size=8)  # byte tokens, half characters, special tokens
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=8)
    ids = [i for part in data.draw(st.lists(st.one_of(text, byte_like, any_ids), max_size=4)) for i in part]
    cuts = data.draw(st.lists(st.integers(0, 3), max_size=len(ids)))
    stream = TextStream(tokenizer, skip_special=skip)
    assert streamed(stream, ids, cuts) == tokenizer.decode(ids, skip_special=skip)
    assert stream.num_tokens == len(ids)


@given(data=st.lists(st.sampled_from([0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x99, 0x82, 0x41, 0x80, 0xC3]), max_size=12))
def test_no_half_characters(byte_tokenizer, data):
    """U+FFFD appears in a piece only where the whole text has it at that place."""
    stream = TextStream(byte_tokenizer)
    whole, out = bytes(data).decode("utf-8", "replace"), ""
    for token in data:
        out += stream.push([token])
        assert whole.startswith(out)
    assert out + stream.flush() == whole


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Brute force: grow the text by characters until it ends with a stop; the longest such stop counts."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text("ab<|e", max_size=24),
    stops=st.lists(st.text("ab<|e", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 4), max_size=12),
)
@settings(max_examples=300)
def test_stops_are_found_across_cuts(byte_tokenizer, text, stops, cuts):
    stream = TextStream(byte_tokenizer, stop_words=stops)
    assert (streamed(stream, list(text.encode()), cuts), stream.stopped_by) == first_stop(text, stops)


def test_only_a_beginning_of_a_stop_is_held_back():
    matcher = StopMatcher(["###END"])
    assert matcher.push("abc##") == "abc"
    assert matcher.push("x#") == "##x"
    assert matcher.flush() == "#"


def test_stop_in_the_middle_of_a_token(byte_tokenizer):
    stream = TextStream(byte_tokenizer, stop_words=["STOP"])
    assert stream.push(b"go STOP now") == "go "
    assert stream.stopped_by == "STOP" and stream.push(b"more") == "" and stream.flush() == ""
    assert stream.num_tokens == 3


def test_num_tokens_counts_what_was_given_out(byte_tokenizer):
    stream = TextStream(byte_tokenizer, stop_words=["##"])
    you = "你".encode()
    assert stream.push([0x41, you[0], you[1]]) == "A" and stream.num_tokens == 1
    assert stream.push([you[2], 257]) == "你" and stream.num_tokens == 5
    assert stream.push([0x23]) == "" and stream.num_tokens == 5
    assert stream.push([0x42]) == "#B" and stream.num_tokens == 7


def test_first_space(tokenizer_at):
    tokenizer = tokenizer_at("llama-2-7b-chat")
    ids = tokenizer.encode("there was")
    assert streamed(TextStream(tokenizer), ids, [1, 1]) == "there was"
    assert streamed(TextStream(tokenizer, continues=True), ids, [1, 1]) == " there was"
