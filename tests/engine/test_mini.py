"""The bundled model, asked what a newcomer types first, through the whole engine on this machine's device."""

from collections.abc import Iterator

import pytest

from pagoda import EngineConfig, GenerationConfig, Pipeline, pipeline

GREEDY = GenerationConfig(do_sample=False, max_new_tokens=200)


@pytest.fixture(scope="module")
def mini() -> Iterator[Pipeline]:
    with pipeline("mini", EngineConfig(max_batch_size=8)) as pipe:
        yield pipe


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("hello", "Hello"),
        ("who are you", "Pagoda mini"),
        ("what can you do", "add"),
        ("12+35", "47"),
        ("what is 12 plus 35?", "47"),
        ("tell me a story", "."),
        ("你好", "你好"),
        ("你是谁", "Pagoda"),
    ],
)
def test_it_answers_a_newcomer(mini: Pipeline, said: str, part: str) -> None:
    reply = mini(said, GREEDY)
    assert part in reply.text
    assert reply.finish_reason == "stop"


def test_it_remembers_within_a_session(mini: Pipeline) -> None:
    with mini.session() as chat:
        chat("my name is Ada", GREEDY)
        chat("12+35", GREEDY)
        assert "Ada" in chat("what is my name?", GREEDY).text
        assert [m["role"] for m in chat.history] == ["user", "assistant"] * 3


def test_a_session_answers_as_the_whole_conversation_would(mini: Pipeline) -> None:
    with mini.session() as chat:
        for said in ("my name is Ada", "I like green tea", "what is my name?"):
            before = list(chat.history)
            reply = chat(said, GREEDY)
            whole = mini([*before, {"role": "user", "content": said}], GREEDY)
            assert reply.text == whole.text


def test_streamed_pieces_join_to_the_reply(mini: Pipeline) -> None:
    whole = mini("tell me a story", GREEDY)
    pieces = list(mini.stream("tell me a story", GREEDY))
    assert "".join(p.text for p in pieces) == whole.text
    assert [t for p in pieces for t in p.token_ids] == whole.token_ids
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop"]


def test_stop_words_end_a_reply_and_are_not_part_of_it(mini: Pipeline) -> None:
    whole = mini("12+35", GREEDY).text
    stopped = mini("12+35", GREEDY.replace(stop_words=["= 4"]))
    assert stopped.text == whole[: whole.index("= 4")]
    assert stopped.finish_reason == "stop"


def test_lists_answer_lists_and_limits_hold(mini: Pipeline) -> None:
    replies = mini(["12+35", "hello"], GREEDY.replace(max_new_tokens=2))
    assert [r.finish_reason for r in replies] == ["length", "length"]
    assert [r.generate_token_len for r in replies] == [2, 2]


async def test_it_answers_in_an_event_loop(mini: Pipeline) -> None:
    reply = await mini.acall("12+35", GREEDY)
    assert "47" in reply.text
    text = [piece.text async for piece in mini.astream("12+35", GREEDY)]
    assert "".join(text) == reply.text


def test_a_schema_holds_the_reply(mini: Pipeline) -> None:
    import json

    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    reply = mini("my name is Ada", GREEDY.replace(response_format=wanted, max_new_tokens=60))
    assert list(json.loads(reply.text)) == ["name"]
