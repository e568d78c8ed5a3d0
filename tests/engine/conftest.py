"""A tiny random Llama, saved by transformers, and engines around it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pagoda.config import EngineConfig
from pagoda.engine.client import EngineClient, start_engine

VOCAB = 300


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, two layers, GQA; weights wide enough that greedy choices are far from ties."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def engines(tiny_llama: Path) -> Iterator[Callable[..., EngineClient]]:
    """Start inline engines of the tiny model; all are closed at the end."""
    started: list[EngineClient] = []

    def start(inline: bool = True, **knobs: object) -> EngineClient:
        config = EngineConfig(
            **{"device": "cpu", "session_len": 256, "max_batch_size": 8, "cache_block_seq_len": 16, **knobs}
        )
        started.append(start_engine(tiny_llama, config, inline))
        return started[-1]

    yield start
    for engine in started:
        engine.close()
