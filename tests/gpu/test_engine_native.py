"""The whole engine on a GPU with the bundled model: graphs, fast kernels, every cache; and what it gives back."""

import pytest
import torch

from pagoda import EngineConfig, GenerationConfig, pipeline
from pagoda.quantize.mini_tasks import overall, questions, score

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=160)
SAID = ["hello", "12+35", "tell me a story", "你好", "sort: pear, apple, fig", "what is the capital of France?", "1+1"]


BLOCKS = 2000  # of the cache, so that tests may run beside each other on one device


def accuracy(num: int, **knobs: object) -> float:
    """Share of right answers, all asked at once."""
    config = EngineConfig(device="cuda", max_queued_requests=10**6, cache_max_entry_count=BLOCKS, **knobs)
    with pipeline("mini", config) as pipe:
        asked = questions(5, num)
        result = overall(score(asked, [r.text for r in pipe([q.messages for q in asked], GREEDY)]))
    return result.num_right / result.num_asked


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_knows_what_it_knows_on_a_cpu(dtype: str) -> None:
    assert accuracy(510, dtype=dtype) >= 0.98


@pytest.mark.parametrize("policy", ["int8", "fp8", "int4"])
def test_quantized_caches_cost_little(policy: str) -> None:
    assert accuracy(510, quant_policy=policy) >= 0.96


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_quantized_weights_run(weights: str) -> None:
    assert accuracy(510, weight_format=weights) >= (0.9 if weights == "int4" else 0.97)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"cuda_graph": False}, {"max_prefill_token_num": 64}, {"max_batch_size": 2}, {"speculative_ngram": 5}],
)
def test_float32_replies_are_those_of_the_cpu(knobs: dict[str, object]) -> None:
    replies = []
    for device in ("cpu", "cuda"):
        with pipeline(
            "mini", EngineConfig(device=device, dtype="float32", cache_max_entry_count=BLOCKS, **knobs)
        ) as pipe:
            alone = [pipe(said, GREEDY).token_ids for said in SAID]
            assert [r.token_ids for r in pipe(SAID, GREEDY)] == alone, "batched = alone"
            with pipe.session() as chat:
                replies.append(
                    [alone, [chat(said, GREEDY).token_ids for said in ("my name is Ada", "what is my name?")]]
                )
    assert replies[0] == replies[1]


def test_all_memory_comes_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pipeline("mini", EngineConfig(device="cuda", cache_max_entry_count=BLOCKS)) as pipe:
        pipe(SAID, GREEDY)
        assert torch.cuda.memory_reserved() > before + (1 << 28)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < 1 << 26
    assert torch.cuda.memory_reserved() < before + (1 << 26)
