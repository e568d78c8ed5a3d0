"""The equality laws: however a request is run, its tokens are those of transformers' greedy search."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pagoda.engine.client import EngineClient
from pagoda.engine.request import EngineRequest, Output, SamplingParams

Start = Callable[..., EngineClient]
_ids = itertools.count()

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def run(
    engine: EngineClient, prompts: list[list[int]], params: SamplingParams = GREEDY, **request: str
) -> list[list[int]]:
    """Send all prompts at once; the generated ids of each."""
    tickets = [engine.submit(EngineRequest(f"r{next(_ids)}", p, params, **request)) for p in prompts]
    return [[t for o in ticket for t in o.token_ids] for ticket in tickets]


def outputs(engine: EngineClient, prompt: list[int], params: SamplingParams, **request: str) -> list[Output]:
    return list(engine.submit(EngineRequest(f"r{next(_ids)}", prompt, params, **request)))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(3, 300) for _ in range(40)]
    own = [[rng.randrange(3, 300) for _ in range(n)] for n in (1, 5, 16, 33, 70)]
    return own + [shared + tail for tail in own[:3]]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy continuation of each prompt, alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_prefill_token_num": 16},
        {"max_prefill_token_num": 23, "cache_block_seq_len": 8},
        {"max_batch_size": 2},
        {"cache_max_entry_count": 17, "session_len": 200},  # blocks run out: requests are preempted
    ],
    ids=lambda k: ",".join(k) or "plain",
)
def test_batched_is_alone_is_transformers(
    engines: Start, prompts: list[list[int]], expected: list[list[int]], knobs: dict[str, object]
) -> None:
    engine = engines(**knobs)
    assert run(engine, prompts) == expected
    assert run(engine, prompts) == expected, "a second time, from the prefix cache"
    assert [run(engine, [p])[0] for p in prompts] == expected, "one after the other"
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    if "cache_max_entry_count" in knobs:
        assert stats.counters.preemptions > 0


def test_an_engine_process_answers_alike(engines: Start, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert run(engines(inline=False), prompts) == expected


def test_a_session_continues_as_if_all_had_been_one_prompt(
    engines: Start, prompts: list[list[int]], tmp_path: Path
) -> None:
    engine = engines()
    first = run(engine, [prompts[3]], session_id="s")[0]
    second = run(engine, [prompts[1]], session_id="s")[0]
    whole = prompts[3] + first + prompts[1]
    assert second == run(engine, [whole])[0]
    engine.call("save_sessions", path=str(tmp_path / "sessions"))
    third = run(engine, [prompts[2]], session_id="s")[0]
    other = engines()
    other.call("restore_sessions", path=str(tmp_path / "sessions"))
    assert run(other, [prompts[2]], session_id="s")[0] == third
    assert third == run(other, [whole + second + prompts[2]])[0]


def test_seeds_decide_samples_not_company(engines: Start, prompts: list[list[int]]) -> None:
    engine = engines()
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=11, max_tokens=24, repetition_penalty=1.2)
    alone = [run(engine, [p], params)[0] for p in prompts]
    assert run(engine, prompts, params) == alone
    assert run(engines(cache_max_entry_count=17, session_len=200), prompts, params) == alone, "after preemption"
    other = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=12, max_tokens=24, repetition_penalty=1.2)
    assert run(engine, prompts, other) != alone


def test_stops_and_limits(engines: Start, prompts: list[list[int]], expected: list[list[int]]) -> None:
    engine = engines()
    ids = expected[4]
    stop = ids[9]
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_ids=(stop,))
    last = outputs(engine, prompts[4], params)[-1]
    assert (last.finish_reason, last.stop_id) == ("stop", stop)
    assert run(engine, [prompts[4]], params)[0] == ids[: ids.index(stop)]
    late = SamplingParams(temperature=0.0, max_tokens=24, min_tokens=24, stop_ids=(stop,))
    assert stop not in run(engine, [prompts[4]], late)[0]
    short = SamplingParams(temperature=0.0, max_tokens=3)
    assert outputs(engine, prompts[4], short)[-1].finish_reason == "length"
    assert run(engine, [prompts[4]], short)[0] == ids[:3]


def test_a_prompt_too_long_is_refused_with_both_lengths(engines: Start) -> None:
    refused = outputs(engines(), [3] * 300, GREEDY)[-1]
    assert refused.finish_reason == "error" and refused.error_kind == "PromptTooLongError"
    assert "300" in str(refused.error) and "256" in str(refused.error)


def test_an_abort_ends_a_request_once_and_frees_its_blocks(engines: Start, prompts: list[list[int]]) -> None:
    engine = engines()
    long = SamplingParams(temperature=0.0, max_tokens=150)
    ticket = engine.submit(EngineRequest("gone", prompts[4], long))
    ends = []
    for output in ticket:
        ticket.abort()
        ticket.abort()
        ends += [output.finish_reason] if output.finish_reason else []
    assert ends == ["abort"]
    engine.abort("gone")
    engine.abort("never was")
    stats = engine.stats()
    assert (stats.num_running, stats.blocks_used) == (0, 0)


def test_log_probabilities_are_those_of_transformers(
    engines: Start, tiny_llama: Path, prompts: list[list[int]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    engine = engines(max_prefill_token_num=16)
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2)
    news = outputs(engine, prompts[3], params)
    tokens = [t for o in news for t in o.token_ids]
    got = [p for o in news for p in o.logprobs or []]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor([prompts[3] + tokens])).logits[0].log_softmax(-1)
    first = len(prompts[3]) - 1
    for i, (token, entry) in enumerate(zip(tokens, got, strict=True)):
        assert entry.token == token
        assert entry.logprob == pytest.approx(want[first + i, token].item(), abs=1e-4)
        top = want[first + i].topk(3)
        assert [t for t, _ in entry.top] == top.indices.tolist()
        assert [v for _, v in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    prompt = next(o.prompt_logprobs for o in news if o.prompt_logprobs is not None)
    assert prompt[0] is None and len(prompt) == len(prompts[3])
    for i, entry in enumerate(prompt[1:]):
        assert entry.token == prompts[3][i + 1]
        assert entry.logprob == pytest.approx(want[i, entry.token].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == want[i].topk(2).indices.tolist()
