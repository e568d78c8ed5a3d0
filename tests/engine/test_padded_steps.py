"""Steps padded as CUDA graphs need them, run without a graph on a CPU: the same tokens as transformers finds.

Natively, as graphs, the same is tested in tests/gpu/test_host_path_native.py.
"""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from pagoda.config import EngineConfig
from pagoda.engine import runner
from pagoda.engine.client import start_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.models.executors.eager import EagerExecutor


class DirectCache:
    """`GraphCache` without graphs: the body runs on the static input; the blank input first, as a capture would."""

    def __init__(self, body, blank, size, patience=0):
        self.body, self.blank, self.input_N, self.patience = body, blank, torch.zeros(size, dtype=torch.int64), patience
        self.keys: Counter = Counter()

    def takes(self, key) -> bool:
        self.keys[key] += 1
        return self.keys[key] > self.patience

    def run(self, key, values_N):
        blank_N = self.blank(key)
        self.body(torch.from_numpy(blank_N), key)
        if values_N is not None:
            assert len(values_N) == len(blank_N)
            self.input_N[: len(values_N)] = torch.from_numpy(values_N)
        return self.body(self.input_N[: len(blank_N)].clone(), key)

    def clear(self) -> None:
        self.keys.clear()


@pytest.fixture
def padded(monkeypatch):
    """Engines whose runners pad; the caches that they made."""
    made = []

    def start(self):
        original(self)
        slots = self.config.max_batch_size
        self._graphs = (
            DirectCache(self._decode, lambda key: self._pad_slots([], key), slots),
            DirectCache(self._mixed, self._blank_mixed, 10**4, patience=1),
        )
        made.append(self._graphs)

    original = runner.Runner.start
    monkeypatch.setattr(runner.Runner, "start", start)
    monkeypatch.setattr(runner, "make_executor", EagerExecutor)
    return made


def generate(engine, prompts, params, name):
    tickets = [engine.submit(EngineRequest(f"{name}{i}", p, params)) for i, p in enumerate(prompts)]
    return [[t for o in ticket for t in o.token_ids] for ticket in tickets]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_steps_change_nothing(tiny_llama: Path, padded: list, monkeypatch, temperature: float) -> None:
    rng = random.Random(4)
    prompts = [[rng.randrange(3, 300) for _ in range(n)] for n in (1, 5, 33, 70, 2, 120)]
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=20, logprobs=2 if temperature else None)
    knobs = {
        "device": "cpu",
        "session_len": 256,
        "max_batch_size": 5,
        "cache_block_seq_len": 16,
        "enable_prefix_caching": False,
    }
    with start_engine(tiny_llama, EngineConfig(**knobs, max_prefill_token_num=24)) as engine:
        got = [generate(engine, prompts, params, f"run{i}-") for i in range(3)]
        stats = engine.stats()
        replayed = [key for key, count in padded[0][1].keys.items() if count > 1]
        assert any(key.shape.rows > 2 for key in replayed) and len(replayed) > 2
    monkeypatch.undo()
    with start_engine(tiny_llama, EngineConfig(**knobs)) as engine:
        expected = generate(engine, prompts, params, "plain")
    assert got == [expected] * 3
    assert (stats.num_running, stats.blocks_used) == (0, 0)
