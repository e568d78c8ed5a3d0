"""The Python face where a call is larger than the queue, a turn fails or the engine has forgotten."""

from collections.abc import Iterator

import pytest

from pagoda import EngineConfig, GenerationConfig, Pipeline, pipeline
from pagoda.errors import RequestError

SHORT = GenerationConfig(do_sample=False, max_new_tokens=3)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with pipeline("mini", EngineConfig(max_batch_size=1, max_queued_requests=2, session_len=256)) as made:
        yield made


def test_a_list_longer_than_the_queue_is_answered(pipe: Pipeline) -> None:
    sums = [f"{n}+1" for n in range(7)]
    assert [r.text for r in pipe(sums, SHORT)] == [pipe(s, SHORT).text for s in sums]
    assert pipe([], SHORT) == []


def test_a_refused_prompt_ends_the_others_of_its_list(pipe: Pipeline) -> None:
    long = SHORT.replace(max_new_tokens=200, ignore_eos=True)
    with pytest.raises(RequestError):
        pipe(["tell me a story", "word " * 1000], long)
    assert pipe("12+35", SHORT).text  # waits for what still runs
    assert pipe.engine.stats().counters.finished["abort"] == 1


def test_numbers_beyond_all_measure_do_not_end_the_engine(pipe: Pipeline) -> None:
    plain = pipe("hello", SHORT).token_ids
    for extra in ({"min_new_tokens": 2**63}, {"min_new_tokens": 10**30}):
        assert len(pipe("hello", SHORT.replace(**extra)).token_ids) == 3
    for top_k in (2**40, 10**30):
        assert len(pipe("hello", SHORT.replace(do_sample=True, top_k=top_k)).token_ids) == 3
    assert pipe("hello", SHORT).token_ids == plain


@pytest.mark.parametrize("ids", [[-1], [5, 10**6], [2**70]])
def test_ids_that_the_model_does_not_have_are_refused(pipe: Pipeline, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="token id outside"):
        pipe.prepare(ids)


def test_a_forgotten_session_goes_on_with_all_that_was_said(pipe: Pipeline) -> None:
    answers = []
    for forget in (False, True):
        with pipe.session() as chat:
            chat("my name is Ada", SHORT.replace(max_new_tokens=60))
            if forget:
                pipe.engine.call("delete_session", session_id=chat.id)
            answers.append(chat("what is my name?", SHORT.replace(max_new_tokens=60)).text)
    assert "Ada" in answers[0] and answers[0] == answers[1]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_turn_that_failed_leaves_no_trace(pipe: Pipeline, streamed: bool) -> None:
    with pipe.session() as chat:
        chat("my name is Ada", SHORT.replace(max_new_tokens=60))
        before = list(chat.history)
        nameless = SHORT.replace(bad_words=["x" * 300])  # longer than the engine holds: refused when it arrives there
        with pytest.raises(RequestError, match="bad_words"):
            list(chat.stream("12+35", nameless)) if streamed else chat("12+35", nameless)
        assert chat.history == before
        assert "Ada" in chat("what is my name?", SHORT.replace(max_new_tokens=60)).text
