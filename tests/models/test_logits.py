"""Logits of every family and rope against transformers, float32: whole prompts, chunks, single tokens, mixed steps."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, LONGROPE, ROPES, baichuan, baichuan2, internlm, internlm2, qwen1, random_model

from pagoda.config import EngineConfig
from pagoda.layers.parallel import Group
from pagoda.models.decoder import build_program
from pagoda.models.executors.eager import EagerExecutor
from pagoda.models.loader import load_model
from pagoda.models.spec import read_spec
from stepping import Stepper

BLOCK_LEN = 8


def our_executor(folder: Path, **config) -> EagerExecutor:
    engine = EngineConfig(dtype="float32", device="cpu", cache_block_seq_len=BLOCK_LEN, **config)
    spec, group, cpu = read_spec(folder, engine), Group.single(), torch.device("cpu")
    weights = load_model(folder, spec, engine, cpu, torch.float32, group)
    return EagerExecutor(build_program(spec, weights, group), engine, cpu, torch.float32, group)


def reference(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def prompt(length: int, seed: int = 1, vocab: int = 131) -> list[int]:
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(ours: list[torch.Tensor], theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0.5, "logits near zero would hide any mistake"
    torch.testing.assert_close(torch.cat(ours), theirs, atol=1e-4, rtol=1e-4)


def check_alone(executor, model, length: int = 45, cuts: tuple[int, ...] = (), singles: int = 5, vocab=131) -> None:
    """One sequence: chunks that end at `cuts`, then the last `singles` tokens one by one."""
    tokens = prompt(length, vocab=vocab)
    stepper = Stepper(executor, BLOCK_LEN, 1, length)
    ends = [*cuts, *range(length - singles, length + 1)]
    got = [stepper.step([(0, tokens[a:b])], {0: length})[0] for a, b in zip([0, *ends], ends, strict=False)]
    close(got, reference(model, tokens))


def check_batch(executor, model, lens=(40, 3, 21)) -> None:
    """Three sequences that prefill, chunk and decode in the same steps."""
    texts = [prompt(n, seed=n) for n in lens]
    stepper = Stepper(executor, BLOCK_LEN, len(lens), max(lens))
    got: list[list[torch.Tensor]] = [[] for _ in lens]
    takes = [(13, 0, 5), (1, 1, 8), (9, 1, 1), (1, 1, 1), (1, 0, 1)]
    while any(stepper.len[r] < n for r, n in enumerate(lens)):
        take = takes.pop(0) if takes else (max(lens),) * len(lens)
        chunks = [(r, texts[r][stepper.len[r] : stepper.len[r] + take[r]]) for r in range(len(lens))]
        chunks = [(r, tokens) for r, tokens in chunks if tokens]
        for (r, _), logits in zip(chunks, stepper.step(chunks, dict(enumerate(lens))), strict=True):
            got[r].append(logits)
    for r, tokens in enumerate(texts):
        close(got[r], reference(model, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    model = random_model(FAMILIES[family]())
    model.save_pretrained(tmp_path)
    executor = our_executor(tmp_path)
    check_alone(executor, model)
    check_alone(executor, model, cuts=(7, 8, 29))
    check_batch(executor, model)


@pytest.mark.parametrize("make", [internlm, internlm2, baichuan, qwen1])
def test_family_that_transformers_lacks(make, tmp_path):
    model = make(tmp_path / "model")
    executor = our_executor(tmp_path / "model")
    check_alone(executor, model, cuts=(7, 8, 29))
    check_batch(executor, model)


def test_baichuan2_head_rows_have_length_one(tmp_path):
    model = baichuan2(tmp_path)
    check_alone(our_executor(tmp_path), model, length=9, vocab=125696)


@pytest.mark.parametrize("length", [50, 150])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_within_and_beyond_the_original_length(rope, length, tmp_path):
    model = random_model(ROPES[rope]())
    model.save_pretrained(tmp_path)
    check_alone(our_executor(tmp_path, session_len=160), model, length=length, cuts=(33,))


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 65, 190])
@pytest.mark.parametrize("rope", ["linear", "dynamic", "llama3", "yarn", "longrope"])
@pytest.mark.parametrize("family", ["llama_biases", "mistral_window", "qwen2_window", "qwen3", "gemma2", "internlm3"])
def test_every_rope_in_every_family(family, rope, length, tmp_path):
    config = FAMILIES[family]()
    config.max_position_embeddings = 64 if rope == "dynamic" else 256
    parameters = dict(ROPES[rope]().rope_parameters)
    pairs = getattr(config, "head_dim", 16) // 2
    for name in ("short_factor", "long_factor"):
        if name in parameters:
            parameters[name] = [parameters[name][0] + 0.3 * i for i in range(pairs)]
    config.rope_parameters = parameters
    model = random_model(config)
    model.save_pretrained(tmp_path)
    executor = our_executor(tmp_path, session_len=200)
    check_alone(executor, model, length=length, cuts=(1, 2, 33, 34))
    check_batch(executor, model, lens=(length, 63, 66))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_variant_is_that_of_the_prompt_at_admission(rope, tmp_path):
    """A short prompt keeps its rotation while it grows past the original length: equal to a model without the long one.
    A long prompt beside it in the batch has its own."""
    model = random_model(ROPES[rope]())
    model.save_pretrained(tmp_path)
    config = ROPES[rope]()
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config.rope_parameters = plain if rope == "dynamic" else {**LONGROPE, "long_factor": LONGROPE["short_factor"]}
    short_model = random_model(config)
    stepper = Stepper(our_executor(tmp_path, session_len=160), BLOCK_LEN, 2, 120)
    grown, long = prompt(90, seed=2), prompt(120, seed=3)
    rope_len = {0: 30, 1: 120}
    first = stepper.step([(0, grown[:30]), (1, long[:70])], rope_len)
    second = stepper.step([(0, grown[30:]), (1, long[70:])], rope_len)
    close([first[0], second[0]], reference(short_model, grown))
    close([first[1], second[1]], reference(model, long))


def test_logn_attention_scales_queries_beyond_the_trained_length(tmp_path):
    """The scale commutes with the rotation: the oracle multiplies the outputs of its query projections."""
    model = qwen1(tmp_path / "model", use_logn_attn=True, seq_length=32)

    def scale(module, args, output):
        count = torch.arange(1, output.shape[1] + 1, dtype=torch.float64)
        return output * (count.log() / math.log(32)).clamp(min=1.0)[:, None].float()

    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(scale)
    check_alone(our_executor(tmp_path / "model"), model, length=90, cuts=(40,))


@pytest.mark.parametrize("name", ["babyllama361-llama", "stories260k-llama", "zhpoem750k-llama"])
def test_greedy_ids_of_trained_checkpoints(name, shared_data):
    folder = shared_data / "models" / name
    executor = our_executor(folder)
    never = json.loads((folder / "generation_config.json").read_text()).get("suppress_tokens", [])
    cases = json.loads((shared_data / "models" / "expected" / f"{name}.json").read_text())["prompts"]
    stepper = Stepper(executor, BLOCK_LEN, len(cases), 160)
    chosen: list[list[int]] = [[] for _ in cases]
    chunks = [(row, case["prompt_ids"]) for row, case in enumerate(cases)]
    for _ in range(64):
        last = torch.stack([logits[-1] for logits in stepper.step(chunks)])
        last[:, never] = -math.inf
        tokens = last.argmax(-1).tolist()
        chunks = [(row, [token]) for row, token in enumerate(tokens)]
        for row, token in enumerate(tokens):
            chosen[row].append(token)
    for row, case in enumerate(cases):
        assert chosen[row] == case["ids_64_ignore_eos"]
