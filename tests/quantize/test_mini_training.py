"""The training code of Pagoda mini: decoder and export equal transformers' Llama, the optimizer does what it says."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
CONFIG = json.loads((ROOT / "src/pagoda/mini/config.json").read_text())
SMALL = CONFIG | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}


@pytest.fixture(scope="module")
def code():
    folder = str(ROOT / "examples/train_mini")
    sys.path.insert(0, folder)
    try:
        yield SimpleNamespace(**{n: importlib.import_module(n) for n in ("model", "optimizer", "evaluate", "train")})
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def pair(code, tmp_path_factory):
    """Our model with exported (bf16) values, and transformers' reading of the same folder in float32."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mini")
    torch.manual_seed(0)
    model = code.model.Model(SMALL)
    with torch.no_grad():
        model.attention_norm.mul_(torch.rand_like(model.attention_norm) + 0.5)
        model.embed_VC.mul_(10)
    save_file(code.model.export(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SMALL))
    code.evaluate.load_weights(model, folder)
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_logits_equal_transformers(pair):
    model, reference = pair
    token = torch.randint(3, SMALL["vocab_size"], (3, 50))
    ours = model.hidden(token) @ model.embed_VC.T
    torch.testing.assert_close(ours, reference(token).logits, atol=2e-4, rtol=2e-4)


def test_batched_cached_generation_equals_transformers_alone(code, pair):
    model, reference = pair
    prompts = [torch.randint(3, SMALL["vocab_size"], (n,)).tolist() for n in (4, 19, 11)]
    for ids, reply in zip(prompts, code.evaluate.generate(model, prompts, max_new=12)):
        whole = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=[2, 0])[0]
        expected = whole[len(ids) :].tolist()
        assert reply == (expected[: expected.index(2)] if 2 in expected else expected)


def test_weight_file_fits_and_every_linear_divides_by_128(code):
    model = code.model.Model(CONFIG)
    assert sum(t.numel() * 2 for t in code.model.export(model).values()) < 16 * 2**20 - 20_000
    for stack in (model.w_qkv, model.w_o, model.w_gate_up, model.w_down):
        assert stack.size(1) % 128 == 0 and stack.size(2) % 128 == 0


def test_orthogonalised_updates_have_singular_values_near_one(code):
    torch.manual_seed(2)
    for shape in ((2, 96, 32), (2, 32, 96)):
        values = torch.linalg.svdvals(code.optimizer.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_rate_rises_holds_and_falls_to_zero(code):
    assert code.train.rate(0) == 0 and code.train.rate(1) == 0 and code.train.rate(0.2) == 1
    assert code.train.rate(0.65) == pytest.approx(0.5)


def test_training_step_lowers_the_loss(code):
    torch.manual_seed(1)
    model = code.model.Model(SMALL)
    optimizer = code.optimizer.Optimizer(model, 0.02, 0.003)
    token = torch.randint(3, SMALL["vocab_size"], (4, 33))
    batch = (token[:, :-1], token[:, 1:], torch.ones(4, 32))
    losses = []
    for _ in range(12):
        loss, _ = model.loss(*batch)
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
