"""The equality laws through the C++ step, on 1 to 4 threads.

Every number of the step is one sum whose order depends neither on the company of a token nor on who computes it:
threads share out rows of matrices and queries, and the parts of a long softmax (512 keys each) are merged in their
order, by one thread or by several. So the laws hold to the bit within every scheme, 16 bit and quantized ones too, and
the number of threads is one more thing that changes nothing. In float32 the tokens are those of transformers besides.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pagoda.config import EngineConfig
from pagoda.engine.client import EngineClient, Ticket, start_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.models.convert import write_workspace
from pagoda.models.workspace import kv_ranges_file

NEW, TURN = 24, 10  # tokens of a reply; of the first turn where a session makes it in two
FEW = {9: 100.0, 10: 100.0, 11: 100.0}  # bias of every other request: of three tokens alone some guesses come true
SCHEMES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"weight_format": "int8"},
    "int4": {"weight_format": "int4"},
    "int8_cache": {"quant_policy": "int8", "dtype": "bfloat16"},
    "int4_int8_cache": {"weight_format": "int4", "quant_policy": "int8"},
    "calibrated_cache": {"quant_policy": "int8", "dtype": "float32"},
}
_ids = itertools.count()
Start = Callable[..., EngineClient]
OpenEngines = Callable[[Path], Start]
Replies = list[list[tuple[int, float]]]  # tokens and their log-probabilities


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Short and long ones, one of more keys than a part of the softmax has, one that quotes itself, three with the same
    beginning."""
    rng = random.Random(4)
    one, few, some, more, long = ([rng.randrange(3, 131) for _ in range(n)] for n in (1, 6, 17, 40, 590))
    return [one, some[:9] * 4, long, more + few, more + some, more + one]


@pytest.fixture
def open_engines() -> Iterator[OpenEngines]:
    """For a model: a function that starts inline engines of it, closed at the end."""
    with ExitStack() as opened:

        def of(model: Path) -> Start:
            def start(**knobs: Any) -> EngineClient:
                settings = {"device": "cpu", "max_batch_size": 8, "session_len": 640, "cache_block_seq_len": 16}
                engine = opened.enter_context(start_engine(model, EngineConfig(**{**settings, **knobs})))
                runs = engine.info.report[0]
                assert runs.startswith("one C++ call a step") and f" {knobs['num_threads']} threads" in runs
                return engine

            return start

        yield of


def submit_all(
    engine: EngineClient, prompts: list[list[int]], new: int = NEW, sessions: bool = False
) -> Iterator[Ticket]:
    """Greedy requests, sent as they are taken; the odd ones choose among FEW. `sessions`: prompt i is of session i."""
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=new, logprobs=0, logit_bias=FEW if i % 2 else {})
        yield engine.submit(EngineRequest(f"r{next(_ids)}", prompt, params, session_id=f"s{i}" if sessions else None))


def read(tickets: Iterable[Ticket]) -> Replies:
    return [[(p.token, p.logprob) for o in ticket for p in o.logprobs or ()] for ticket in tickets]


def tokens(replies: Replies) -> list[list[int]]:
    return [[token for token, _ in reply] for reply in replies]


def ask(engine: EngineClient, prompts: list[list[int]], **how: Any) -> Replies:
    """The replies to all prompts, sent at once."""
    return read(list(submit_all(engine, prompts, **how)))


def every_way(start: Start, prompts: list[list[int]], folder: Path, **knobs: Any) -> Iterator[tuple[str, Replies]]:
    """(how, the replies) of each way to run the same requests."""
    plain = start(enable_prefix_caching=False, **knobs)
    alone = read(submit_all(plain, prompts))
    yield "alone", alone
    yield "batched", ask(plain, prompts)
    cached = start(**knobs)
    ask(cached, prompts[::-1])
    before = cached.stats().counters.cached_tokens
    yield "from the prefix cache", ask(cached, prompts)
    assert cached.stats().counters.cached_tokens - before > 590
    scarce = start(cache_max_entry_count=43, **knobs)
    yield "after preemption", ask(scarce, prompts)
    assert scarce.stats().counters.preemptions > 0
    for size in (13, 50):
        yield f"in chunks of {size}", ask(start(max_prefill_token_num=size, **knobs), prompts)
    guessing = start(speculative_ngram=5, **knobs)
    yield "with speculation", ask(guessing, prompts)
    assert guessing.stats().counters.accepted_tokens > 10
    first = ask(cached, prompts, new=TURN, sessions=True)
    cached.call("save_sessions", path=str(folder / "sessions"))
    other = start(**knobs)
    other.call("restore_sessions", path=str(folder / "sessions"))
    next_one = [reply[TURN : TURN + 1] for reply in alone]  # comes as the second turn's text
    second = ask(other, tokens(next_one), new=NEW - TURN - 1, sessions=True)
    yield "after session restore", [a + b + c for a, b, c in zip(first, next_one, second)]


def transformers_says(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy continuation of each prompt, alone."""
    import torch

    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    few = {"sequence_bias": {(token,): bias for token, bias in FEW.items()}}
    return [
        model.generate(torch.tensor([p]), **how, **(few if i % 2 else {}))[0, len(p) :].tolist()
        for i, p in enumerate(prompts)
    ]


def model_of(family: str, scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """The model of transformers, and what the engine opens: its folder, or a workspace with ranges of an int8 cache."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "models"))
    import tiny_models

    config = tiny_models.FAMILIES[family]()
    config.max_position_embeddings, config.intermediate_size = 1024, 96
    model = tiny_models.random_model(config)
    model.save_pretrained(folder / "model")
    if scheme != "calibrated_cache":
        return model, folder / "model"
    workspace = write_workspace(folder / "model", folder / "workspace", EngineConfig())
    ones = torch.ones(config.num_key_value_heads)
    ranges = {"k_scale": 0.05 * ones, "k_zero": 0.3 * ones, "v_scale": 0.04 * ones, "v_zero": -0.2 * ones}
    layers = range(config.num_hidden_layers)
    save_file({f"layers.{i}.{n}": t.clone() for i in layers for n, t in ranges.items()}, kv_ranges_file(workspace))
    return model, workspace


def cases() -> Iterator[Any]:
    for family, scheme in itertools.product(("llama", "qwen2_window", "qwen3", "gemma2"), SCHEMES):
        quick = (family, scheme) == ("llama", "float32")
        yield pytest.param(family, scheme, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "scheme"), [*cases()])
def test_every_way_gives_the_same_bits(
    family: str,
    scheme: str,
    prompts: list[list[int]],
    open_engines: OpenEngines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, folder = model_of(family, scheme, tmp_path, monkeypatch)
    first: Replies = []
    for threads in (1, 2, 3, 4):
        ways = every_way(open_engines(folder), prompts, tmp_path, num_threads=threads, **SCHEMES[scheme])
        for how, replies in ways:
            first = first or replies
            assert replies == first, f"{how}, {threads} threads"
    if scheme == "float32":
        assert tokens(first) == transformers_says(model, prompts)


def test_engines_of_one_process_share_nothing(
    prompts: list[list[int]], open_engines: OpenEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three engines of different formats and numbers of threads, all at work at once."""
    start = open_engines(model_of("llama", "float32", tmp_path, monkeypatch)[1])
    engines = [
        start(num_threads=threads, max_prefill_token_num=40 * threads, **SCHEMES[scheme])
        for threads, scheme in ((2, "float32"), (3, "int8_cache"), (1, "int4"))
    ]
    expected = [ask(engine, prompts) for engine in engines]
    assert len({str(replies) for replies in expected}) == 3
    for _ in range(3):
        tickets = [list(submit_all(engine, prompts)) for engine in engines]
        assert [read(given) for given in tickets] == expected
