"""What reaches the device of a generation config."""

from pagoda.config import GenerationConfig
from pagoda.engine.params import sampling_params
from pagoda.engine.wire import EngineInfo

INFO = EngineInfo(
    "m", "llama", session_len=64, max_batch_size=1, block_len=16, num_blocks=9, vocab_size=10, eos_ids=[2, 10]
)


def test_only_ids_that_have_logits_reach_the_device():
    gen = GenerationConfig(bad_words=["a", "b"], stop_token_ids=[9], min_new_tokens=3)
    words = {"a": [4, 11], "b": [4, 5]}
    params = sampling_params(gen, {"suppress_tokens": [12, 6]}, INFO, 8, words.__getitem__, stop_ids=(3, 99))
    assert params.bad_words == ((4, 5), (6,))
    assert params.stop_ids == (2, 3, 9)


def test_counts_are_cut_to_what_is_possible():
    gen = GenerationConfig(min_new_tokens=2**63, max_new_tokens=2**70, top_k=10**30, temperature=1.0)
    params = sampling_params(gen, {}, INFO, 8, lambda _: [])
    assert (params.min_tokens, params.max_tokens, params.top_k) == (56, 56, 10)
