"""The C++ executor against the eager one, which is held to transformers by its own tests."""

import dataclasses

import pytest
import torch
from tiny_programs import BLOCK_LEN, make_step, tiny_program, tiny_spec

from pagoda.config import EngineConfig
from pagoda.kernels.cpu.build import usable_variants
from pagoda.kernels.cpu.pack import W8
from pagoda.layers.kv_schemes import StaticRanges
from pagoda.layers.linear import Linear
from pagoda.layers.parallel import Group
from pagoda.models.executors import make_executor
from pagoda.models.executors.cpu import CannotRun, CpuExecutor, make_cpu_executor
from pagoda.models.executors.eager import EagerExecutor
from pagoda.models.quant_config import QuantSpec
from pagoda.models.rope_spec import RopeSpec

CPU = torch.device("cpu")
# prompts, a decode step, a mix of both, one sequence alone, a prompt in two chunks, a context over several splits
STEPS = [
    [(0, 37), (0, 1), (0, 16)], [(37, 1), (1, 1), (16, 1)], [(38, 21), (2, 1), (17, 3)], [(59, 1)],
    [(60, 90), (3, 1), (20, 1)], [(150, 1), (4, 30), (21, 1)],
]  # fmt: skip
LONG_STEPS = [[(0, 530), (0, 3)], [(530, 1), (3, 1)], [(531, 5), (4, 2)], [(536, 90)], [(626, 1), (6, 1)]]

SPECS = {
    "llama": {},
    "odd_sizes": {
        "hidden_size": 40, "head_dim": 6, "num_heads": 3, "num_kv_heads": 1, "ffn_size": 52, "attn_scale": 0.4,
    },
    "biases_qk_norm": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True},
    "gemma2": {
        "post_norms": True, "act": "gelu_tanh", "embed_scale": 8.0, "attn_softcap": 5.0, "final_softcap": 4.0,
        "windows": (20, 0), "head_dim": 32,
    },
    "partial_rotary": {"rope": RopeSpec("default", 1e4, 8), "num_heads": 6, "num_kv_heads": 2},
    "wide_heads": {"head_dim": 128, "num_heads": 2, "num_kv_heads": 1, "attn_scale": 0.088},
    "many_groups": {"num_heads": 11, "num_kv_heads": 1, "head_dim": 8, "attn_scale": 0.35},
    "no_groups": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 64, "attn_scale": 0.125, "windows": (0, 50)},
    "logn_dynamic": {"logn_len": 24, "rope": RopeSpec("dynamic", 1e4, 16, factor=2.0, original_max_position=32)},
}  # fmt: skip


def config(**changes):
    return EngineConfig(**{"cache_block_seq_len": BLOCK_LEN, "session_len": 640, "num_threads": 2, **changes})


def executor(program, settings=None, dtype=torch.float32, kind=CpuExecutor, **more):
    made = kind(program, settings or config(), CPU, dtype, Group.single(), **more)
    made.allocate_cache(130)
    return made


def logits(runner, spec, steps=STEPS):
    return [runner.forward(make_step(rows, spec.vocab_size)) for rows in steps]


def layers_bytes(made):
    """What the layers' matrices and gains hold, from the table of the C++ step."""
    matrices = [getattr(layer, name) for layer in made.layers for name in ("qkv", "o", "gate_up", "down")]
    return sum(m.rows * m.cols * made.dtype.itemsize for m in matrices) + len(made.layers) * 2 * 40 * 4


def assert_close(got, wanted, tolerance):
    """Relative error in norm, per step: rounding noise, whatever the scale of the logits."""
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm(), f"step {step}: {((a - b).norm() / b.norm()).item():.2e}"


@pytest.mark.parametrize("name", SPECS)
def test_float32_equals_eager(name):
    spec = tiny_spec(**SPECS[name])
    program = tiny_program(spec)
    wanted = logits(executor(program, kind=EagerExecutor), spec)
    assert_close(logits(executor(program), spec), wanted, 3e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "no_groups", "odd_sizes"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_16_bit_weights_against_the_same_numbers_in_float32(name, dtype, tolerance):
    spec = tiny_spec(**SPECS[name])
    narrow = tiny_program(spec, dtype)
    wanted = logits(executor(in_float32(narrow), kind=EagerExecutor), spec)
    assert_close(logits(executor(narrow, dtype=dtype), spec), wanted, tolerance)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("name", ["llama", "biases_qk_norm", "gemma2"])
def test_int4_against_the_dequantized_model(name, group_size):
    """Weights are the same numbers; activations are rounded to int8 in groups (and the head here to int8 as well)."""
    quant = QuantSpec("online", "int4", 4, group_size, True)
    spec = tiny_spec(**SPECS[name], hidden_size=256, ffn_size=384, quant=quant)
    program = tiny_program(spec, scheme="int4", group_size=group_size)
    wanted = logits(executor(in_float32(program), kind=EagerExecutor), spec)
    assert_close(logits(executor(program), spec), wanted, 0.03)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_int8_against_the_dequantized_model(name):
    spec = tiny_spec(**SPECS[name], hidden_size=256, ffn_size=384, quant=QuantSpec("online", "int8", 8, 0, False))
    program = tiny_program(spec, scheme="int8")
    wanted = logits(executor(in_float32(program), kind=EagerExecutor), spec)
    assert_close(logits(executor(program), spec), wanted, 0.03)


def in_float32(program):
    """The same program with every tensor widened."""

    def widen(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.float()
        if hasattr(value, "tensors"):
            weight = {"weight": value.dequantize()}
            return Linear.pack(value.role, "dense", weight, value.bias, value.in_features, CPU, torch.float32)
        return value

    def widen_op(op):
        return dataclasses.replace(op, **{f.name: widen(getattr(op, f.name)) for f in dataclasses.fields(op)})

    return dataclasses.replace(program, ops=tuple(widen_op(op) for op in program.ops))


@pytest.mark.parametrize("variant", usable_variants()[1:])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.02)])
def test_every_variant_of_the_source(variant, dtype, tolerance):
    spec = tiny_spec(qkv_bias=True, windows=(0, 30))
    program = tiny_program(spec, dtype)
    wanted = logits(executor(in_float32(program), kind=EagerExecutor), spec)
    assert_close(logits(executor(program, dtype=dtype, variant=variant), spec), wanted, tolerance)


CACHES = ["none", "int8", "calibrated"]


def calibrated(program):
    """The program with ranges of its own keys and values. Head 0's are far off centre, the last head's too small for a
    few of its numbers, and none end at a number's very value, which would lie on the border of two codes."""
    plain = executor(in_float32(program), kind=EagerExecutor)
    logits(plain, program.spec)

    def ranges(cache):
        found = []
        for x in (cache.k, cache.v):
            low, high = (1.01 * f(x.transpose(0, 1).flatten(1), 1) for f in (torch.amin, torch.amax))
            low[0] -= (high - low)[0] / 2
            low[-1] *= 0.7
            found += [(high - low) / 255, (high + low) / 2]
        return StaticRanges(*found)

    return dataclasses.replace(program, kv_ranges=tuple(ranges(cache) for cache in plain.caches))


def with_cache(program, cache):
    """(program, engine settings) of a row of CACHES."""
    if cache == "calibrated":
        return calibrated(program), {"quant_policy": "int8"}
    return program, {"quant_policy": cache}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype, cache):
    spec = tiny_spec(num_heads=6, num_kv_heads=3, windows=(0, 200))
    program, policy = with_cache(tiny_program(spec, dtype), cache)
    one = logits(executor(program, config(num_threads=1, **policy), dtype), spec, LONG_STEPS)
    for threads in (2, 3, 4):
        several = logits(executor(program, config(num_threads=threads, **policy), dtype), spec, LONG_STEPS)
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True)), threads


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_and_chunks_change_nothing(dtype, cache):
    """A sequence's logits are the same bits alone, in a batch, token by token and in chunks of any size."""
    spec = tiny_spec(windows=(0, 100))
    program, policy = with_cache(tiny_program(spec, dtype), cache)
    settings = config(**policy)
    whole = executor(program, settings, dtype).forward(make_step([(0, 560), (0, 9)], spec.vocab_size))[:560]
    batched = executor(program, settings, dtype)
    pieces, done = [], 0
    for size in (1, 1, 1, 200, 17, 8, 300, 1, 3, 1, 27):
        step = make_step([(done, size), (0, 9)] if size % 2 else [(done, size), (0, 40)], spec.vocab_size)
        pieces.append(batched.forward(step)[:size])
        done += size
    assert done == 560
    assert torch.equal(torch.cat(pieces), whole)


def test_rows_that_want_logits_are_selected():
    spec = tiny_spec()
    program = tiny_program(spec)
    step = make_step([(0, 9), (0, 4)], spec.vocab_size)
    every = executor(program).forward(step)
    assert torch.equal(
        executor(program).forward(dataclasses.replace(step, logit_row_L=torch.tensor([12, 8]))), every[[12, 8]]
    )
    none = executor(program).forward(dataclasses.replace(step, logit_row_L=torch.tensor([], dtype=torch.int64)))
    assert none.shape == (0, spec.vocab_size)


def test_unwritten_tokens_and_empty_rows_are_harmless():
    """Padding rows (no keys, slot below 0) compute something finite and leave the others alone."""
    spec = tiny_spec()
    program = tiny_program(spec)
    step = make_step([(0, 5), (0, 1)], spec.vocab_size)
    alone = executor(program).forward(make_step([(0, 5), (0, 1)], spec.vocab_size))[:5]
    step.slot_T[5] = -1
    step.kv_len_R[1] = 0
    out = executor(program).forward(step)
    assert torch.equal(out[:5], alone)
    assert out.isfinite().all()


@pytest.mark.parametrize("variant", usable_variants())
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_block_held_before_has_no_effect(variant, cache, dtype):
    """Even if it is no number."""
    spec = tiny_spec(windows=(0, 30))
    program, policy = with_cache(tiny_program(spec, dtype), cache)
    new, used = (executor(program, config(**policy), dtype, variant=variant) for _ in range(2))
    for part in used.cache:
        part.fill_(torch.nan) if part.is_floating_point() else part.random_(-127, 128)
    for rows in [[(0, 37), (0, 1)], [(37, 1), (1, 1)], [(38, 21), (2, 1)], [(59, 90), (3, 1)], [(149, 1), (4, 30)]]:
        step = make_step(rows, spec.vocab_size)
        wanted = new.forward(step)
        assert wanted.isfinite().all() and torch.equal(used.forward(step), wanted)


def test_int8_cache_is_close_to_a_float_one():
    spec = tiny_spec(num_heads=8, num_kv_heads=2, head_dim=64, attn_scale=0.125)
    program = tiny_program(spec)
    wanted = logits(executor(program), spec)
    assert_close(logits(executor(program, config(quant_policy="int8")), spec), wanted, 0.02)
    assert executor(program, config(quant_policy="int8")).bytes_per_block() < executor(program).bytes_per_block() / 3


@pytest.mark.parametrize("variant", usable_variants())
@pytest.mark.parametrize("name", ["llama", "biases_qk_norm", "gemma2", "many_groups", "no_groups"])
def test_calibrated_ranges_of_an_int8_cache_equal_eager(name, variant):
    """But for a code that rounding noise turns into its neighbour. Where bf16 is multiplied, queries and the softmax's
    weights are rounded to it."""
    spec = tiny_spec(**SPECS[name])
    program, fixed = calibrated(tiny_program(spec)), config(quant_policy="int8")
    wanted = logits(executor(program, fixed, kind=EagerExecutor), spec)
    made = executor(program, fixed, variant=variant)
    assert_close(logits(made, spec), wanted, 0.01 if "bf16" in variant else 1e-3)
    assert made.bytes_per_block() == 2 * BLOCK_LEN * spec.num_kv_heads * made.width * spec.num_layers


def test_a_dense_head_beside_quantized_layers_is_held_in_8_bit():
    spec = tiny_spec(quant=QuantSpec("online", "int8", 8, 0, False))
    program = tiny_program(spec)
    made = executor(program)
    assert made.model.head.kind == W8
    assert_close(logits(made, spec), logits(executor(program, kind=EagerExecutor), spec), 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tied_head_is_held_once(dtype):
    spec = tiny_spec(tied_embeddings=True, hidden_size=40)
    program = tiny_program(spec, dtype)
    made = executor(program, dtype=dtype)
    assert made.model.embed == made.model.head.q
    rows, columns = -(-131 // 16) * 16, 48  # padded to whole blocks of the kernels
    assert made.weight_bytes - layers_bytes(made) == rows * columns * dtype.itemsize + 40 * 4
    wanted = logits(executor(in_float32(program), kind=EagerExecutor), spec)
    assert_close(logits(made, spec), wanted, {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 0.02}[dtype])


def test_the_engine_s_executor_takes_the_weights():
    spec = tiny_spec()
    wanted = logits(executor(tiny_program(spec)), spec)
    program = tiny_program(spec)
    made = make_executor(program, config(), CPU, torch.float32, Group.single())
    assert not any(op.linear.tensors for op in program.ops if hasattr(op, "linear"))
    made.allocate_cache(130)
    assert all(torch.equal(a, b) for a, b in zip(logits(made, spec), wanted, strict=True))


def test_two_engines_share_nothing():
    spec = tiny_spec()
    first, second = executor(tiny_program(spec)), executor(tiny_program(spec, seed=1))
    wanted = logits(executor(tiny_program(spec)), spec)
    mixed = []
    for rows in STEPS:
        mixed.append(first.forward(make_step(rows, spec.vocab_size)))
        second.forward(make_step(rows, spec.vocab_size))
    assert all(torch.equal(a, b) for a, b in zip(mixed, wanted, strict=True))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("token_T", 131, "vocabulary"), ("slot_T", 1 << 40, "slot"), ("block_table_RB", 4000, "block table")],
)
def test_a_step_that_would_leave_its_memory_is_caught(field, value, rule):
    spec = tiny_spec()
    step = make_step([(0, 5)], spec.vocab_size)
    getattr(step, field).view(-1)[0] = value
    with pytest.raises(AssertionError, match=rule):
        executor(tiny_program(spec)).forward(step)


def test_what_the_table_cannot_express_is_named():
    program = tiny_program(tiny_spec())
    with pytest.raises(CannotRun, match="int4 cache"):
        executor(program, config(quant_policy="int4"))
    with pytest.raises(CannotRun, match="blocks of 16"):
        executor(program, config(cache_block_seq_len=8))
    swapped = dataclasses.replace(program, ops=program.ops[:1] + program.ops[2:])
    assert "no place for Project" in make_cpu_executor(swapped, config(), CPU, torch.float32, Group.single())


def test_the_report_says_what_runs_and_why():
    program = tiny_program(tiny_spec())
    fast = executor(program).describe()
    assert usable_variants()[0] in fast and "2 threads" in fast
    slow = make_executor(program, config(quant_policy="int4"), CPU, torch.float32, Group.single())
    assert isinstance(slow, EagerExecutor)
    assert "no int4 cache" in slow.describe()
