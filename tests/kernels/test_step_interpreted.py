"""The GPU executor and its own kernels as one step in Triton's interpreter: what a machine without a GPU can check.

Natively the same is tested in tests/gpu/test_executor_native.py.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from mended import mend_interpreter

from pagoda.config import EngineConfig
from pagoda.kernels import decode_attention, decode_attention_fused, prefill_attention, rope_cache
from pagoda.kernels.all_reduce import OneShot
from pagoda.kernels.small_linear import small_linear_launch, supports
from pagoda.kernels.triton_env import HAS_TRITON, INTERPRETED
from pagoda.layers.parallel import Group
from pagoda.layers.schemes.dense import Dense
from pagoda.models.decoder import build_program
from pagoda.models.executors.eager import EagerExecutor
from pagoda.models.executors.gpu import FusedAttend, FusedProject, GpuExecutor, SumProject
from pagoda.models.loader import load_model
from pagoda.models.spec import read_spec
from random_weights import random_weights, small_spec
from stepping import Stepper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton's interpreter"),
]
TINY = {"vocab_size": 72, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    open_doors(monkeypatch)


def open_doors(monkeypatch):
    """The doors think that the CPU's tensors are the GPU's."""
    counters: dict[int, torch.Tensor] = {}

    def fuses(self, rows, linear, norm, act, residual):
        weight = linear.tensors["weight"]
        return supports(rows, *weight.shape, weight.dtype, norm, act or "", residual)

    def fused(self, x, linear, extras, out):
        count = counters.setdefault(id(linear), torch.zeros(4096, dtype=torch.int32))
        small_linear_launch(x, linear.tensors["weight"], extras, out, count)
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


SPLIT = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}  # fmt: skip
SUM_BYTES = 1 << 13  # larger sums go the other way


def split_logits(kind, folder, group: Group, dtype: torch.dtype) -> tuple[EagerExecutor, torch.Tensor]:
    config, cpu = EngineConfig(cache_block_seq_len=16, device="cpu", tp=group.size), torch.device("cpu")
    spec = read_spec(folder, config)
    weights = load_model(folder, spec, config, cpu, dtype, group)
    run = kind(build_program(spec, weights, group), config, cpu, dtype, group)
    stepper = Stepper(run, 16, 3, 90)
    out = stepper.step([(0, list(range(5, 75)))])
    for rows in ([0], [0, 1, 2]):
        out += stepper.step([(row, [9 + row]) for row in rows])
    return run, torch.cat(out)


def split_rank(rank: int, size: int, folder, buffers: list[torch.Tensor]) -> None:
    torch.set_num_threads(1)
    place = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": size}
    dist.init_process_group("gloo", **place)
    sums = OneShot(rank, torch.tensor([b.data_ptr() for b in buffers]), SUM_BYTES)
    group = Group(rank, size, dist.group.WORLD, torch.device("cpu"), sums)
    mend_interpreter()
    with pytest.MonkeyPatch.context() as patch:
        open_doors(patch)
        run, ours = split_logits(GpuExecutor, folder, group, torch.float16)
    plans = [{type(op): op for op in run.plan(rows, True)} for rows in (1, 3, 70)]
    assert all(SumProject in plan for plan in plans[:2]) and SumProject not in plans[2]
    torch.save(ours, f"{folder}/logits-{rank}.pt")
    group.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_whose_sums_take_the_norm_on_the_way_are_near_one_in_float32(size, tmp_path):
    """Steps of one row and of three, and a prompt that is too long for the one-shot sum."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SPLIT)).save_pretrained(tmp_path)
    _, exact = split_logits(EagerExecutor, tmp_path, Group.single(), torch.float32)
    words = OneShot.buffer_words(size, SUM_BYTES)
    buffers = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(size)]
    mp.spawn(split_rank, (size, tmp_path, buffers), nprocs=size)
    found = [torch.load(f"{tmp_path}/logits-{rank}.pt", weights_only=True) for rank in range(size)]
    assert all(torch.equal(ours, found[0]) for ours in found)
    assert (found[0] - exact).norm() / exact.norm() < 4e-3
