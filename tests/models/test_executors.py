"""The GPU executor's rewrites, checked on the CPU against the list as it is written; dtypes and sizes of the eager one.

The fused matrix kernel is stood in for by its reference, so that every rule may fire.
"""

import pytest
import torch

from pagoda.config import EngineConfig
from pagoda.kernels.small_linear import small_linear_reference
from pagoda.layers.parallel import Group
from pagoda.layers.schemes.dense import Dense
from pagoda.models.decoder import Add, Attend, Norm, PostNorm, Project, RopeWrite, TakeRows, build_program
from pagoda.models.executors import make_executor
from pagoda.models.executors.eager import EagerExecutor
from pagoda.models.executors.gpu import AddNorm, FusedAttend, FusedProject, GpuExecutor, NormHead
from random_weights import SHAPES, random_weights, small_spec
from stepping import Stepper

BLOCK_LEN = 16
CPU = torch.device("cpu")
FEW = [3, 17, 40]


def executor(kind, shape: str, dtype=torch.float32, rounded_to=torch.float32, **config):
    spec, engine = small_spec(shape), EngineConfig(cache_block_seq_len=BLOCK_LEN, device="cpu", **config)
    weights = random_weights(spec, "cpu", dtype, rounded_to)
    return kind(build_program(spec, weights, Group.single()), engine, CPU, dtype, Group.single())


def prefill_then_decode(run, lens: list[int], vocab: int = 1000) -> list[torch.Tensor]:
    """Logits of prompts of those lengths in one step, then of two tokens of every row."""
    generator = torch.Generator().manual_seed(5)
    stepper = Stepper(run, BLOCK_LEN, len(lens), max(lens) + 2)
    text = lambda n: torch.randint(0, vocab, (n,), generator=generator).tolist()  # noqa: E731
    out = stepper.step([(row, text(n)) for row, n in enumerate(lens)])
    for _ in range(2):
        out += stepper.step([(row, text(1)) for row in range(len(lens))])
    return out


@pytest.fixture
def every_rule_fires(monkeypatch):
    """Dense matrices fuse any extras, by the kernel's reference."""

    def fused(self, x, linear, extras, out):
        out.copy_(small_linear_reference(x, linear.tensors["weight"], extras))

    monkeypatch.setattr(Dense, "fuses", lambda self, rows, *extras: rows <= 16)
    monkeypatch.setattr(Dense, "fused", fused)


@pytest.mark.parametrize("shape", SHAPES)
def test_rewritten_steps_give_the_logits_of_the_plain_list(shape, every_rule_fires):
    ours = prefill_then_decode(executor(GpuExecutor, shape), FEW)
    plain = prefill_then_decode(executor(EagerExecutor, shape), FEW)
    torch.testing.assert_close(torch.cat(ours), torch.cat(plain), atol=1e-4, rtol=1e-4)


def test_a_llama_layer_of_few_rows_is_five_kernels(every_rule_fires):
    plan = executor(GpuExecutor, "llama").plan(4, decode=True)
    layer = [FusedProject, FusedAttend, FusedProject, FusedProject, FusedProject]
    assert [type(op) for op in plan[1:6]] == layer
    assert type(plan[-1]) is NormHead and len(plan) == 1 + 2 * 5 + 2


def test_norms_after_a_block_keep_the_sum_apart(every_rule_fires):
    kinds = [type(op) for op in executor(GpuExecutor, "gemma2").plan(4, decode=True)[1:9]]
    assert kinds == [FusedProject, FusedAttend, Project, PostNorm, Add, FusedProject, Project, PostNorm]


def test_a_sum_goes_into_the_next_norm_where_that_is_a_kernel_of_its_own(monkeypatch):
    """As with 33 to 64 rows: extras pay, the bare product and the norm before it do not."""
    monkeypatch.setattr(
        Dense, "fuses", lambda self, rows, linear, norm, act, residual: not norm and bool(act or residual)
    )
    kinds = [type(op) for op in executor(GpuExecutor, "llama").plan(48, decode=True)]
    assert kinds[1:9] == [Norm, Project, RopeWrite, Attend, Project, AddNorm, FusedProject, Project]
    assert kinds[-3:] == [FusedProject, TakeRows, NormHead]  # no norm follows the last layer's sum at once


def test_large_steps_fuse_only_the_sum_with_the_next_norm():
    plan = executor(GpuExecutor, "llama").plan(100, decode=False)
    kinds = [type(op) for op in plan]
    assert kinds[1:5] == [Norm, Project, RopeWrite, Attend]
    assert kinds.count(AddNorm) == 3 and FusedProject not in kinds


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_16_bit_stays_near_float32(shape, dtype, most):
    exact = torch.cat(prefill_then_decode(executor(EagerExecutor, shape, rounded_to=dtype), FEW))
    rounded = torch.cat(prefill_then_decode(executor(EagerExecutor, shape, dtype, dtype), FEW))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("policy", ["none", "int8", "int4", "fp8"])
def test_bytes_per_block_are_those_of_the_tensors(policy):
    run = executor(EagerExecutor, "llama", torch.float16, torch.float16, quant_policy=policy)
    run.allocate_cache(7)
    held = 0
    for cache in run.caches:
        parts = (cache.k, cache.v, cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero)
        held += sum(t.numel() * t.element_size() for t in parts if t is not None)
    assert held == 7 * run.bytes_per_block()
    run.free_cache()
    assert not run.caches


def test_rows_without_wanted_logits_are_left_out():
    run = executor(make_executor, "llama")
    stepper = Stepper(run, BLOCK_LEN, 1, 30)
    step = stepper.step_input([(0, list(range(10)))], {})
    every = run.forward(step)
    step.logit_row_L = torch.tensor([9, 4])
    torch.testing.assert_close(run.forward(step), every[[9, 4]], atol=1e-5, rtol=1e-5)
    step.logit_row_L = torch.tensor([], dtype=torch.int64)
    assert run.forward(step).shape == (0, 1000)
    assert "float32" in run.describe()


def test_the_head_fuses_by_the_rows_that_are_wanted(every_rule_fires):
    """Also for none of them, in steps large and small."""
    run, plain = (executor(kind, "qwen3") for kind in (GpuExecutor, EagerExecutor))
    for tokens, wanted in ((30, [29, 3]), (30, list(range(20))), (12, []), (30, [])):
        logits = []
        for one in (run, plain):
            step = Stepper(one, BLOCK_LEN, 1, 30).step_input([(0, list(range(tokens)))], {})
            step.logit_row_L = torch.tensor(wanted, dtype=torch.int64)
            logits.append(one.forward(step))
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
