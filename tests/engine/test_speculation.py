"""Guessed tokens change nothing but the number of steps: every request gets what it gets without guesses."""

import itertools
import random
from collections.abc import Callable

import pytest
from fake_device import request
from test_scheduler import Engine, alone

from pagoda.engine.client import EngineClient
from pagoda.engine.request import EngineRequest, Output, SamplingParams

Start = Callable[..., EngineClient]
_ids = itertools.count()


def ask(engine: EngineClient, prompts: list[list[int]], params: list[SamplingParams], **how: str) -> list[list[Output]]:
    tickets = [engine.submit(EngineRequest(f"s{next(_ids)}", p, q, **how)) for p, q in zip(prompts, params)]
    return [list(ticket) for ticket in tickets]


def tokens(news: list[list[Output]]) -> list[list[int]]:
    return [[t for o in outputs for t in o.token_ids] for outputs in news]


def ends(news: list[list[Output]]) -> list[tuple[str | None, int | None]]:
    return [(outputs[-1].finish_reason, outputs[-1].stop_id) for outputs in news]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Texts that repeat themselves, and some that do not."""
    rng = random.Random(3)
    phrase = [rng.randrange(3, 300) for _ in range(9)]
    found = [phrase * 4, (phrase + phrase[::-1]) * 2, phrase[:3] * 12, phrase * 2 + [7], [5], phrase]
    return [*found, [rng.randrange(3, 300) for _ in range(50)]]


@pytest.fixture(scope="module")
def params() -> list[SamplingParams]:
    """Greedy, sampled, sharp, and with everything that guesses must respect, one each in turn."""
    return [
        SamplingParams(temperature=0.0, max_tokens=60, logprobs=2),
        SamplingParams(temperature=1.0, seed=5, max_tokens=60),
        SamplingParams(temperature=0.05, seed=6, max_tokens=60, logprobs=0),
        SamplingParams(
            temperature=0.3, top_k=5, top_p=0.9, min_p=0.01, seed=7, max_tokens=40, logit_bias={9: 9.0, 8: 9.0}
        ),
        SamplingParams(temperature=0.0, max_tokens=50, logit_bias={9: 9.0, 11: -90.0}, bad_words=((12,), (13,))),
        SamplingParams(temperature=0.0, max_tokens=60, repetition_penalty=1.3, bad_words=((3, 4),)),
        SamplingParams(temperature=0.0, max_tokens=60, min_tokens=9, stop_ids=tuple(range(60, 124))),
    ]


KNOBS = [
    {},
    {"enable_prefix_caching": False},
    {"max_prefill_token_num": 16, "cache_block_seq_len": 8},
    {"max_batch_size": 2},
    {"cache_max_entry_count": 15, "session_len": 200},  # blocks run out: requests are preempted
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda k: ",".join(k) or "plain")
def test_guesses_change_nothing(
    engines: Start, prompts: list[list[int]], params: list[SamplingParams], knobs: dict[str, object]
) -> None:
    plain, guessing = engines(**knobs), engines(**knobs, speculative_ngram=4)
    for shift in range(len(params)):
        mixed = params[shift:] + params[:shift]
        want, got = ask(plain, prompts, mixed), ask(guessing, prompts, mixed)
        assert tokens(got) == tokens(want) and ends(got) == ends(want)
        for one, other in zip(want, got):
            flat = [[entry for o in outputs for entry in o.logprobs or ()] for outputs in (one, other)]
            assert [e.token for e in flat[0]] == [e.token for e in flat[1]]
            assert [e.logprob for e in flat[0]] == pytest.approx([e.logprob for e in flat[1]], abs=1e-3)
            assert [len(e.top) for e in flat[0]] == [len(e.top) for e in flat[1]]
    counters = guessing.stats().counters
    assert 100 < counters.accepted_tokens < counters.guessed_tokens
    assert counters.generated_tokens == plain.stats().counters.generated_tokens or "session_len" in knobs
    assert plain.stats().counters.guessed_tokens == 0 == guessing.stats().blocks_used
    if "session_len" in knobs:
        assert counters.preemptions > 0


def test_sessions_and_the_prefix_cache_hold_only_what_was_accepted(engines: Start, prompts: list[list[int]]) -> None:
    plain, guessing = engines(), engines(speculative_ngram=6)
    greedy = SamplingParams(temperature=0.0, max_tokens=25)
    for prompt in prompts[:4]:
        want = tokens(ask(plain, [prompt], [greedy], session_id="s"))
        assert tokens(ask(guessing, [prompt], [greedy], session_id="s")) == want
        assert guessing.call("session_tokens", session_id="s") == plain.call("session_tokens", session_id="s")
    history = plain.call("session_tokens", session_id="s")
    [outputs] = ask(guessing, [history + [3]], [greedy])
    assert max(o.num_cached_tokens for o in outputs) >= len(history) - 2 * 16
    assert tokens([outputs]) == tokens(ask(plain, [history + [3]], [greedy]))


def test_the_end_of_a_session_is_reached_exactly(engines: Start) -> None:
    loop = [7, 8, 9] * 20
    long = SamplingParams(temperature=0.0, max_tokens=400, logit_bias={7: 100.0})
    want, got = (ask(engines(session_len=100, **k), [loop], [long]) for k in ({}, {"speculative_ngram": 7}))
    assert tokens(got) == tokens(want) and ends(got) == ends(want) == [("length", None)]
    assert len(tokens(got)[0]) == 40


def test_a_loop_takes_few_steps() -> None:
    engine = Engine(num_guesses=3)
    req = request("a", [1, 2, 3, 4] * 3, max_tokens=40)
    pattern = [1, 2, 3, 4] * 20
    engine.device.choose = lambda last, count, params: pattern[count]
    assert engine.run(req) == [pattern[:40]]
    assert (
        engine.scheduler.counters.steps == 1 + 10
    )  # the prompt with the first token, then the other 39, four at a time


def test_guesses_leave_room_for_everybody() -> None:
    """A step's budget gives every running request its token before anyone's guesses."""
    engine = Engine(num_guesses=4, max_step_tokens=6, num_blocks=60)
    requests = [request(f"r{i}", [1, 2, 0, 1, 2, 0, 1, 2][: 4 + i], max_tokens=12, seed=i) for i in range(4)]
    assert engine.run(*requests) == [alone(r) for r in requests]
    assert engine.scheduler.counters.guessed_tokens > 0


def test_nobody_is_preempted_for_a_guess() -> None:
    engine = Engine(num_guesses=8, num_blocks=1 + 6, session_len=24)
    requests = [request(f"r{i}", [1, 2, 0] * 2, max_tokens=6, seed=i) for i in range(2)]
    assert engine.run(*requests) == [alone(r, 24) for r in requests]
    assert engine.scheduler.counters.preemptions == 0 and engine.scheduler.counters.guessed_tokens > 0
