"""Angles against transformers' own frequencies, within and beyond the original length."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagoda.layers.rope import SPARE_POSITIONS, Rope, logn_scale

DIM, ORIGINAL, SESSION = 16, 64, 300
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SHORT, LONG = [1.0 + 0.01 * i for i in range(DIM // 2)], [2.0 + 0.5 * i for i in range(DIM // 2)]
LONGROPE = {"short_factor": SHORT, "long_factor": LONG, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
CASES = {
    "default": ("default", {}),
    "linear": ("linear", {"factor": 2.5}),
    "dynamic": ("dynamic", {"factor": 2.0}),
    "llama3": ("llama3", LLAMA3),
    "yarn": ("yarn", YARN),
    "yarn_untruncated": ("yarn", {**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2}),
    "yarn_attention_factor": ("yarn", {**YARN, "attention_factor": 0.7}),
    "longrope": ("longrope", LONGROPE),
}


def oracle(kind: str, values: dict, prompt_len: int) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor that transformers uses for a prompt of that length."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **values}
    config = LlamaConfig(
        hidden_size=DIM * 4, num_attention_heads=4, head_dim=DIM, max_position_embeddings=ORIGINAL,
        rope_parameters=parameters,
    )  # fmt: skip
    if kind == "default":
        return 1.0 / 10000.0 ** (torch.arange(0, DIM, 2).float() / DIM), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=prompt_len)


def our_spec(kind: str, values: dict, attention_factor: float) -> SimpleNamespace:
    fields = {
        "kind": kind, "theta": 10000.0, "dim": DIM, "factor": 1.0, "original_max_position": ORIGINAL,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
        "short_factor": (), "long_factor": (), "stepped": False,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **values, "attention_factor": attention_factor})


@pytest.mark.parametrize("prompt_len", [10, ORIGINAL, ORIGINAL + 1, 200])
@pytest.mark.parametrize("name", CASES)
def test_angles_equal_transformers(name, prompt_len):
    kind, values = CASES[name]
    frequency, factor = oracle(kind, values, prompt_len)
    rope = Rope(our_spec(kind, values, factor), SESSION, torch.device("cpu"))
    position = torch.tensor([0, 1, 7, 63, 64, 150, SESSION - 1, SESSION + SPARE_POSITIONS - 1])
    cos, sin = rope.angles(position, torch.full_like(position, prompt_len, dtype=torch.int32))
    angle = position[:, None].float() * frequency
    assert cos.dtype == torch.float32 and cos.shape == (len(position), DIM // 2)
    torch.testing.assert_close(cos, angle.cos() * factor, atol=2e-5, rtol=0)
    torch.testing.assert_close(sin, angle.sin() * factor, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_each_token_takes_the_variant_of_its_own_prompt(name):
    kind, values = CASES[name]
    factor = oracle(kind, values, 10)[1]
    rope = Rope(our_spec(kind, values, factor), SESSION, torch.device("cpu"))
    prompt_lens = [10, 65, 200, 64]
    position = torch.tensor([5, 70, 70, 70])
    cos, _ = rope.angles(position, torch.tensor(prompt_lens, dtype=torch.int32))
    for row, prompt_len in enumerate(prompt_lens):
        angle = position[row].float() * oracle(kind, values, prompt_len)[0]
        torch.testing.assert_close(cos[row], angle.cos() * factor, atol=2e-5, rtol=0)
    short, _ = rope.angles(position)
    torch.testing.assert_close(short[3], cos[3])


@pytest.mark.parametrize(("prompt_len", "alpha"), [(64, 1), (65, 3), (128, 3), (129, 7), (256, 7)])
def test_stepped_growth_follows_powers_of_two(prompt_len, alpha):
    """Qwen 1's rule: alpha = 2 ^ ceil(log2(len / trained) + 1) - 1, base * alpha ^ (dim / (dim - 2))."""
    spec = our_spec("dynamic", {"stepped": True}, 1.0)
    cos, _ = Rope(spec, SESSION, torch.device("cpu")).angles(torch.tensor([50]), torch.tensor([prompt_len]))
    theta = 10000.0 * alpha ** (DIM / (DIM - 2))
    angle = 50.0 / theta ** (torch.arange(0, DIM, 2).double() / DIM)
    torch.testing.assert_close(cos[0], angle.cos().float(), atol=2e-5, rtol=0)


def test_logn_scale_grows_only_beyond_the_trained_length():
    scale = logn_scale(torch.tensor([0, 10, 63, 64, 511]), 64)
    expected = torch.tensor([1.0, 1.0, 1.0, math.log(65, 64), math.log(512, 64)])
    torch.testing.assert_close(scale, expected)
