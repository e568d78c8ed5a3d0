"""What stands around the layers of a step on a GPU: small kernels with early launch, and whole steps as graphs."""

import itertools
import random

import pytest
import torch

from pagoda.config import EngineConfig
from pagoda.engine.client import EngineClient, start_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.kernels.argmax import argmax
from pagoda.kernels.batch_step import advance_rows, advance_rows_reference, gather_decode, gather_decode_reference
from pagoda.kernels.embed_rows import embed_rows, embed_rows_reference
from pagoda.kernels.triton_env import starts_early

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
_ids = itertools.count()


def captured(body) -> torch.cuda.CUDAGraph:
    """`body` as a graph, warmed up."""
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        body()
    torch.cuda.synchronize()
    return graph


@pytest.mark.parametrize("width", [1, 1000, 128256, 151936, 256000])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 256])
def test_argmax_is_that_of_torch(rows, width):
    counters = torch.zeros(rows, dtype=torch.int32, device="cuda")
    for scale in (1.0, 8.0):  # rounded: many ties
        value_RV = (torch.randn(rows, width, device="cuda") * scale).round()
        want = value_RV.cpu().argmax(-1)
        assert torch.equal(argmax(value_RV, counters).cpu(), want)
    value_RV[0] = float("nan")
    assert 0 <= int(argmax(value_RV, counters)[0]) < width
    assert not counters.any()


def test_early_argmax_waits_for_the_product_before_it_and_lets_the_next_wait():
    """The tail of a decode step: product, choice, advance; two hundred replays on fresh inputs."""
    early, rows, width = starts_early(DEVICE), 8, 50000
    x, w = torch.randn(rows, 256, device="cuda"), torch.randn(width, 256, device="cuda")
    counters = torch.zeros(rows, dtype=torch.int32, device="cuda")
    slot = torch.randperm(rows, device="cuda")
    last, count = (torch.zeros(rows + 1, dtype=torch.int64, device="cuda") for _ in range(2))
    kv_len = torch.zeros(rows + 1, dtype=torch.int32, device="cuda")
    new_len = torch.zeros(rows, dtype=torch.int32, device="cuda")
    result = {}

    def body():
        logits = x @ w.T
        result["logits"] = logits
        advance_rows(slot, new_len, slot, argmax(logits, counters, early), last, kv_len, count, early)

    graph = captured(body)
    count.zero_()
    for step in range(200):
        x.normal_()
        new_len.fill_(step)
        graph.replay()
        if step % 20 == 19:
            assert torch.equal(last[slot], result["logits"].argmax(-1))
            assert count[:rows].tolist() == [step + 1] * rows and kv_len[:rows].tolist() == [step] * rows


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_the_head_of_a_step_equals_its_references(rows):
    """Gather and embedding, each starting before the one ahead has ended."""
    slots, width, early = rows + 3, 40, starts_early(DEVICE)
    last = torch.randint(0, 1000, (slots,), device="cuda")
    lens = torch.randint(0, width * 64, (slots,), device="cuda", dtype=torch.int32)
    rope = torch.randint(0, 99, (slots,), device="cuda", dtype=torch.int32)
    table = torch.randint(0, 5000, (slots, width + 3), device="cuda", dtype=torch.int32)
    slot = torch.randperm(slots - 1, device="cuda")[:rows]
    weight = torch.randn(1000, 4096, device="cuda").bfloat16()
    angle = torch.randn(2, width * 64, 64, device="cuda")
    for scale in (1.0, 5.5):
        got = gather_decode(slot, last, lens, rope, table, 64, width, early)
        started = embed_rows(got.token_R, got.position_R, weight, scale, angle, early)
        want = gather_decode_reference(slot, last, lens, rope, table, 64, width)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        for ours, theirs in zip(
            started, embed_rows_reference(want.token_R, want.position_R, weight, scale, angle), strict=True
        ):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        state = [last, lens, torch.zeros_like(last)]
        ours, theirs = ([t.clone() for t in state] for _ in range(2))
        advance_rows(slot, want.kv_len_R, slot, want.token_R, *ours)
        advance_rows_reference(slot, want.kv_len_R, slot, want.token_R, *theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def engine(**knobs) -> EngineClient:
    config = {
        "device": "cuda",
        "dtype": "float32",
        "max_batch_size": 6,
        "session_len": 512,
        "cache_max_entry_count": 200,
    }
    return start_engine("mini", EngineConfig(**config, **knobs, enable_prefix_caching=False))


def generate(client: EngineClient, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    tickets = [client.submit(EngineRequest(f"r{next(_ids)}", p, params)) for p in prompts]
    return [[t for o in ticket for t in o.token_ids] for ticket in tickets]


PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=150),
    "sampled": SamplingParams(temperature=1.0, seed=5, top_p=0.9, max_tokens=60),
    "all": SamplingParams(temperature=0.7, seed=5, max_tokens=40, repetition_penalty=1.1, logprobs=3, min_tokens=3),
}


@pytest.mark.parametrize("kind", PARAMS)
def test_graphs_of_decode_and_mixed_steps_choose_as_eager_steps(kind):
    """Prompts of many lengths in chunks of 48 tokens beside running rows; every shape comes several times, so the last
    round replays graphs that earlier rounds captured."""
    rng, params = random.Random(2), PARAMS[kind]
    prompts = [[rng.randrange(3, 300) for _ in range(n)] for n in (1, 9, 60, 130, 2, 33, 200, 17, 5, 90)]
    with engine(cuda_graph=False, max_prefill_token_num=48) as plain:
        expected = generate(plain, prompts, params)
    with engine(max_prefill_token_num=48) as graphed:
        assert [generate(graphed, prompts, params) for _ in range(3)] == [expected] * 3
        decode, mixed = graphed._transport._loop._workers._runner._graphs
        assert len(decode._graphs) > 1 and len(mixed._graphs) > 1
        one = [generate(graphed, [p], params)[0] for p in prompts for _ in range(2)]
        assert one[::2] == expected and one[1::2] == expected


def test_a_prompt_of_a_known_shape_is_a_replay():
    prompt = list(range(3, 131))
    with engine() as client:
        runner = client._transport._loop._workers._runner
        params = SamplingParams(temperature=0.0, max_tokens=4)
        seen = []
        for _ in range(4):
            seen.append(generate(client, [prompt], params))
        assert seen == [seen[0]] * 4
        (key,) = runner._graphs[1]._graphs
        assert (key.shape.tokens, key.shape.rows) == (128, 1)
