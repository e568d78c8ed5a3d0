"""The GPU executor with its real kernels: against the eager one in float32, and as CUDA graphs against itself."""

import pytest
import torch

from pagoda.config import EngineConfig
from pagoda.layers.parallel import Group
from pagoda.models.decoder import StepInput, build_program
from pagoda.models.executors import make_executor
from pagoda.models.executors.eager import EagerExecutor
from random_weights import SHAPES, random_weights, small_spec
from stepping import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BLOCK_LEN = 64
ROWS = [1, 2, 8, 16, 33, 64, 200]
DTYPES = [torch.bfloat16, torch.float16]


def executor(kind, shape: str, dtype: torch.dtype, rounded_to: torch.dtype, **config):
    spec, device = small_spec(shape), torch.device("cuda", 0)
    engine = EngineConfig(cache_block_seq_len=BLOCK_LEN, device="cuda", **config)
    weights = random_weights(spec, "cuda", dtype, rounded_to)
    return kind(build_program(spec, weights, Group.single()), engine, device, dtype, Group.single())


def steps(run, lens: list[int], num_decode: int) -> list[torch.Tensor]:
    """Logits [rows, V] of the prompts' last tokens and of `num_decode` tokens after them."""
    generator = torch.Generator().manual_seed(3)
    stepper = Stepper(run, BLOCK_LEN, len(lens), max(lens) + num_decode, "cuda")

    def text(n: int) -> list[int]:
        return torch.randint(0, 1000, (n,), generator=generator).tolist()

    out = [torch.stack([chunk[-1] for chunk in stepper.step([(row, text(n)) for row, n in enumerate(lens)])])]
    for _ in range(num_decode):
        out.append(torch.cat(stepper.step([(row, text(1)) for row in range(len(lens))])))
    return out


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_steps_are_as_near_to_float32_as_plain_ones(shape, rows, dtype):
    lens = [1 + (37 * row) % 190 for row in range(rows)]
    ours = steps(executor(make_executor, shape, dtype, dtype), lens, 2)
    plain = steps(executor(EagerExecutor, shape, dtype, dtype), lens, 2)
    exact = steps(executor(EagerExecutor, shape, torch.float32, dtype), lens, 2)
    for our, other, true in zip(ours, plain, exact, strict=True):
        assert torch.isfinite(our).all()
        assert error(our, true) < 1.5 * error(other, true) + 1e-3


@pytest.mark.parametrize("policy", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_quantized_caches_agree_with_the_eager_executor(rows, policy):
    lens = [5 + (53 * row) % 150 for row in range(rows)]
    ours = steps(executor(make_executor, "qwen3", torch.bfloat16, torch.bfloat16, quant_policy=policy), lens, 2)
    plain = steps(executor(EagerExecutor, "qwen3", torch.bfloat16, torch.bfloat16, quant_policy=policy), lens, 2)
    exact = steps(executor(EagerExecutor, "qwen3", torch.float32, torch.bfloat16, quant_policy=policy), lens, 2)
    for our, other, true in zip(ours, plain, exact, strict=True):
        assert error(our, true) < 1.5 * error(other, true) + 1e-3


def copied(step: StepInput) -> StepInput:
    """The same step in tensors of its own."""
    fields = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in vars(step).items()}
    return StepInput(**fields)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_replayed_graph_gives_the_direct_run(shape, rows, dtype):
    run = executor(make_executor, shape, dtype, dtype)
    assert run.graph_safe
    stepper = Stepper(run, BLOCK_LEN, rows, 300, "cuda")
    stepper.step([(row, list(range(1, 90 + row))) for row in range(rows)])
    first = stepper.step_input([(row, [7 + row]) for row in range(rows)], {})
    second = stepper.step_input([(row, [50 + row]) for row in range(rows)], {})
    direct = [run.forward(step).clone() for step in (first, second)]
    static = copied(first)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        run.forward(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        logits = run.forward(static)
    for step, expected in zip((first, second, first), (*direct, direct[0]), strict=True):
        for name, value in vars(step).items():
            if isinstance(value, torch.Tensor):
                getattr(static, name).copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(logits, expected, atol=0, rtol=0)


def test_describe_counts_the_kernels_of_a_layer():
    assert "5 a layer" in executor(make_executor, "llama", torch.bfloat16, torch.bfloat16).describe()
