"""The C++ step on checkpoints of every family and rope, against transformers in float32."""

import pytest
import torch
from tiny_models import FAMILIES, ROPES, baichuan, internlm, internlm2, qwen1, random_model

from pagoda.config import EngineConfig
from pagoda.layers.parallel import Group
from pagoda.models.decoder import build_program
from pagoda.models.executors import make_executor
from pagoda.models.executors.cpu import CpuExecutor
from pagoda.models.loader import load_model
from pagoda.models.spec import read_spec
from stepping import Stepper

BLOCK_LEN = 16


def cpu_executor(folder):
    config = EngineConfig(
        dtype="float32", device="cpu", cache_block_seq_len=BLOCK_LEN, num_threads=2, session_len=160
    )  # fmt: skip
    spec, group, cpu = read_spec(folder, config), Group.single(), torch.device("cpu")
    weights = load_model(folder, spec, config, cpu, torch.float32, group)
    made = make_executor(build_program(spec, weights, group), config, cpu, torch.float32, group)
    assert isinstance(made, CpuExecutor)
    return made


def check(executor, model, lens):
    """Sequences that prefill in chunks, then decode, side by side: the logits of every token."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lens]
    stepper = Stepper(executor, BLOCK_LEN, len(lens), max(lens))
    got: list[list[torch.Tensor]] = [[] for _ in lens]
    for turn in range(max(lens)):
        sizes = [(n - 4 + r) // 2 + 1 if turn < 2 else 1 for r, n in enumerate(lens)]
        chunks = [(r, text[stepper.len[r] : stepper.len[r] + sizes[r]]) for r, text in enumerate(texts)]
        chunks = [(r, tokens) for r, tokens in chunks if tokens]
        if not chunks:
            break
        for (r, _), logits in zip(chunks, stepper.step(chunks, dict(enumerate(lens))), strict=True):
            got[r].append(logits)
    for r, text in enumerate(texts):
        with torch.no_grad():
            wanted = model(torch.tensor([text]), use_cache=False).logits[0].float()
        assert wanted.abs().max() > 0.5
        torch.testing.assert_close(torch.cat(got[r]), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    model = random_model(FAMILIES[family]())
    model.save_pretrained(tmp_path)
    check(cpu_executor(tmp_path), model, lens=(45, 3, 21))


@pytest.mark.parametrize("make", [internlm, internlm2, baichuan, qwen1])
def test_family_that_transformers_lacks(make, tmp_path):
    model = make(tmp_path / "model")
    check(cpu_executor(tmp_path / "model"), model, lens=(45, 3, 21))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_within_and_beyond_the_original_length(rope, tmp_path):
    model = random_model(ROPES[rope]())
    model.save_pretrained(tmp_path)
    executor = cpu_executor(tmp_path)
    for length in (50, 150):
        check(executor, model, lens=(length,))
