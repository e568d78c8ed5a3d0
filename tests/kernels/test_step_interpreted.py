"""The GPU executor and its own kernels as one step in Triton's interpreter: what a machine without a GPU can check.

Natively the same is tested in tests/gpu/test_executor_native.py.
"""

import pytest
import torch

from pagoda.config import EngineConfig
from pagoda.kernels import decode_attention, decode_attention_fused, prefill_attention, rope_cache
from pagoda.kernels.small_linear import small_linear_launch, supports
from pagoda.kernels.triton_env import HAS_TRITON, INTERPRETED
from pagoda.layers.parallel import Group
from pagoda.layers.schemes.dense import Dense
from pagoda.models.decoder import build_program
from pagoda.models.executors.eager import EagerExecutor
from pagoda.models.executors.gpu import FusedAttend, FusedProject, GpuExecutor
from random_weights import random_weights, small_spec
from stepping import Stepper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton's interpreter"),
]
TINY = {"vocab_size": 72, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    """The doors think that the CPU's tensors are the GPU's."""
    counters: dict[int, torch.Tensor] = {}

    def fuses(self, rows, linear, norm, act, residual):
        weight = linear.tensors["weight"]
        return supports(rows, *weight.shape, weight.dtype, norm, act or "", residual)

    def fused(self, x, linear, norm, act, residual, out, pdl):
        count = counters.setdefault(id(linear), torch.zeros(4096, dtype=torch.int32))
        small_linear_launch(x, linear.tensors["weight"], linear.extras(norm, act, residual, pdl), out, count)
        assert not count.any()

    for module in (decode_attention, decode_attention_fused, prefill_attention, rope_cache):
        if hasattr(module, "kernel_takes"):
            monkeypatch.setattr(module, "kernel_takes", lambda q, cache: q.dtype == torch.float16)
    monkeypatch.setattr(Dense, "fuses", fuses)
    monkeypatch.setattr(Dense, "fused", fused)


def logits(kind, shape: str, lens: list[int], dtype: torch.dtype) -> tuple[EagerExecutor, torch.Tensor]:
    window = {"sliding_window": 20} if shape == "gemma2" else {}
    spec, cpu = small_spec(shape, **TINY, **window), torch.device("cpu")
    weights = random_weights(spec, "cpu", dtype, torch.float16)
    config = EngineConfig(cache_block_seq_len=16, device="cpu")
    run = kind(build_program(spec, weights, Group.single()), config, cpu, dtype, Group.single())
    stepper = Stepper(run, 16, len(lens), max(lens) + 2)
    out = stepper.step([(row, list(range(n))) for row, n in enumerate(lens)])
    for token in (7, 30):
        out += stepper.step([(row, [token + row]) for row in range(len(lens))])
    return run, torch.cat(out)


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize("lens", [[21], [3, 40, 17]])
@pytest.mark.parametrize("shape", ["llama_biases", "qwen3", "gemma2"])
def test_fused_step_in_float16_is_near_float32(shape, lens):
    run, ours = logits(GpuExecutor, shape, lens, torch.float16)
    _, exact = logits(EagerExecutor, shape, lens, torch.float32)
    assert {FusedProject, FusedAttend} <= {type(op) for op in run.plan(len(lens), decode=True)}
    assert (ours - exact).norm() / exact.norm() < 2e-3
