"""Tensor parallel over processes (gloo, float32): the whole engine gives the tokens that one rank gives."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pagoda import EngineConfig, GenerationConfig, pipeline
from pagoda.engine.client import EngineClient, start_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.models.convert import write_workspace

Start = Callable[..., EngineClient]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, seed=3, max_tokens=20, repetition_penalty=1.2)
SHORT_BLOCK = 8  # too short for the C++ step, so that one rank runs the same operations
_ids = itertools.count()


def run(
    engine: EngineClient, prompts: list[list[int]], params: SamplingParams = GREEDY, **more: str
) -> list[list[int]]:
    tickets = [engine.submit(EngineRequest(f"q{next(_ids)}", p, params, **more)) for p in prompts]
    news = [list(ticket) for ticket in tickets]
    assert [outputs[-1].error for outputs in news] == [None] * len(news)
    return [[t for o in outputs for t in o.token_ids] for outputs in news]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(9)
    own = [[rng.randrange(3, 120) for _ in range(n)] for n in (1, 7, 33, 60)]
    return [*own, own[3] + own[1], own[2] + own[1]]


@pytest.fixture(scope="module")
def greedy(tiny_llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' own continuations."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **how)[0, len(p) :].tolist() for p in prompts]


def test_two_ranks_give_the_tokens_of_one(engines: Start, prompts: list[list[int]], greedy: list[list[int]]) -> None:
    """In one batch, from the prefix cache, chunked, preempted, sampled, in a session, with log-probabilities."""
    alone = engines()
    knobs = {"max_prefill_token_num": 24, "cache_max_entry_count": 17, "session_len": 200}
    both = engines(tp=2, **knobs)
    assert both.info.report[0].startswith("2 ranks: ") and "tensor parallel" in both.info.report[0]
    assert run(both, prompts) == greedy
    assert run(both, prompts) == greedy
    assert both.stats().counters.preemptions > 0
    assert run(both, prompts, SAMPLED) == run(alone, prompts, SAMPLED)
    for turn in prompts[:3]:
        assert run(both, [turn], session_id="s") == run(alone, [turn], session_id="s")
    curious = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1)
    ours, theirs = (list(e.submit(EngineRequest("lp", prompts[1], curious))) for e in (both, alone))
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip([*(a.logprobs or []), *(a.prompt_logprobs or [])],
                        [*(b.logprobs or []), *(b.prompt_logprobs or [])], strict=True):  # fmt: skip
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert x.token == y.token and x.logprob == pytest.approx(y.logprob, abs=1e-4)


@pytest.mark.slow
def test_three_ranks_of_mini_hold_a_grammar() -> None:
    """Sizes that three does not divide; masks reach every rank."""
    wanted = {"type": "regex", "regex": "(yes|no), [a-z]{3,8}!"}
    held = GenerationConfig(do_sample=False, max_new_tokens=24, response_format=wanted)
    free = GenerationConfig(do_sample=False, max_new_tokens=40)
    asked = ["hello", "12+35", "tell me a story"]
    config = EngineConfig(device="cpu", dtype="float32", max_batch_size=4, session_len=256)
    with pipeline("mini", config.replace(tp=3)) as three, pipeline("mini", config) as one:
        for how in (held, free, free.replace(do_sample=True, random_seed=5, top_p=0.9)):
            assert [r.token_ids for r in three(asked, how)] == [r.token_ids for r in one(asked, how)]


def test_a_workspace_of_two_ranks_in_four_bits(tiny_llama: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """Each rank reads its own file; the number of ranks comes from engine.toml."""
    config = EngineConfig(device="cpu", max_batch_size=8, session_len=256, cache_block_seq_len=SHORT_BLOCK)
    four = config.replace(weight_format="int4", device="auto")  # weights packed for CPUs are for one process
    whole = write_workspace(tiny_llama, tmp_path / "one", four)
    halves = write_workspace(tiny_llama, tmp_path / "two", four.replace(tp=2))
    (halves / "weights" / "rank-0-of-1.safetensors").write_bytes(b"nobody reads this")
    with start_engine(whole, config) as one, start_engine(halves, config) as two:
        assert "2 ranks" in two.info.report[0]
        assert run(two, prompts) == run(one, prompts)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("family", ["llama", "llama_biases", "llama_tied", "mistral_window", "qwen2", "qwen2_window",
                                    "qwen3", "phi3", "gemma2", "internlm3", "internlm", "internlm2", "baichuan",
                                    "baichuan2", "qwen1"])  # fmt: skip
def test_every_family(
    family: str, tp: int, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "models"))
    import tiny_models

    if family in tiny_models.FAMILIES:
        tiny_models.random_model(tiny_models.FAMILIES[family]()).save_pretrained(tmp_path)
    else:
        getattr(tiny_models, family)(tmp_path)
    config = EngineConfig(device="cpu", dtype="float32", max_batch_size=8, session_len=200, cache_block_seq_len=8)
    with start_engine(tmp_path, config) as one, start_engine(tmp_path, config.replace(tp=tp)) as several:
        assert run(several, prompts) == run(one, prompts)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("cache", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("weights", ["auto", "int4", "int8", "fp8"])
def test_every_scheme(tiny_llama: Path, prompts: list[list[int]], weights: str, cache: str, tp: int) -> None:
    """Weights in 16 bit activations and caches in codes: the same tokens. Quantized activations: the ranks quantize
    their own inputs, so log-probabilities agree as far as 8 bits go."""
    config = EngineConfig(device="cpu", dtype="float32", max_batch_size=8, session_len=200, cache_block_seq_len=8,
                          weight_format=weights, quant_policy=cache)  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
    with start_engine(tiny_llama, config) as one, start_engine(tiny_llama, config.replace(tp=tp)) as several:
        if weights in ("auto", "int4") and cache == "none":
            assert run(several, prompts) == run(one, prompts)
        for n, prompt in enumerate(prompts):
            values = [next(iter(e.submit(EngineRequest(f"s{n}", prompt, params)))).logprobs for e in (one, several)]
            first, other = (dict(v[0].top) for v in values)
            shared = first.keys() & other.keys()
            assert len(shared) >= 3
            assert all(abs(first[t] - other[t]) < (0.6 if weights in ("int8", "fp8") else 0.2) for t in shared)
