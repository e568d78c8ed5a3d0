"""4-bit checkpoints through the loader: the packed matrices multiply the numbers that the checkpoint's layout means."""

import json
import re
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError
from pagoda.layers.linear import Linear
from pagoda.layers.parallel import Group
from pagoda.models.convert import write_workspace
from pagoda.models.loader import load_model, resolve_spec
from pagoda.models.local_weights import LocalMatrix, open_weights
from pagoda.models.spec import read_spec

CPU = torch.device("cpu")
CONFIG = EngineConfig()
GROUP = 32
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def words(columns: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """int32 of eight 4-bit values each along the last dimension: bits 4i.. hold value order[i]."""
    groups = columns.reshape(*columns.shape[:-1], -1, 8).long()
    total = sum(groups[..., value] << (4 * place) for place, value in enumerate(order))
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def awq_matrix(q_NK, zero_NG, scale_NG) -> dict[str, torch.Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(q_NK.T, order), "qzeros": words(zero_NG.T, order), "scales": scale_NG.T.contiguous()}


def gptq_matrix(q_NK, zero_NG, scale_NG) -> dict[str, torch.Tensor]:
    order = tuple(range(8))
    return {
        "qweight": words(q_NK, order).T.contiguous(), "qzeros": words(((zero_NG - 1) % 16).T, order),
        "scales": scale_NG.T.contiguous(), "g_idx": (torch.arange(q_NK.shape[1]) // GROUP).to(torch.int32),
        "bias": torch.zeros(q_NK.shape[0]),
    }  # fmt: skip


def checkpoint(folder: Path, quant: dict, write) -> dict[str, torch.Tensor]:
    """A tiny Llama of random 4-bit matrices, and what they mean: module -> float32 [N, K]."""
    model = tiny_models.random_model(tiny_models.llama(intermediate_size=96))
    model.save_pretrained(folder)
    tensors, meaning = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.split(".")[-2] in PROJECTIONS]:
        n, k = tensors.pop(name).shape
        q, zero = torch.randint(0, 16, (n, k)), torch.randint(1, 16, (n, k // GROUP))
        scale = (torch.rand(n, k // GROUP) / 100 + 0.01).half()
        module = name.removesuffix(".weight")
        per_input = [t.float().repeat_interleave(GROUP, 1) for t in (zero, scale)]
        meaning[module] = (q - per_input[0]) * per_input[1]
        tensors |= {f"{module}.{key}": t for key, t in write(q, zero, scale).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quant}))
    return meaning


@pytest.mark.parametrize(("quant", "write"), [(AWQ, awq_matrix), (GPTQ, gptq_matrix)], ids=["awq", "gptq"])
def test_four_bit_checkpoints_mean_what_their_layout_says(quant, write, tmp_path):
    meaning = checkpoint(tmp_path / "model", quant, write)
    dst = write_workspace(tmp_path / "model", tmp_path / "workspace", CONFIG)
    for folder in (tmp_path / "model", dst):
        spec, config = resolve_spec(folder, CONFIG)
        weights = load_model(folder, spec, config, CPU, torch.float32, Group.single())
        for i, layer in enumerate(weights.layers):
            parts = [meaning[f"model.layers.{i}.self_attn.{p}_proj"] for p in "qkv"]
            torch.testing.assert_close(layer.w_qkv.dequantize(), torch.cat(parts))
            torch.testing.assert_close(layer.w_down.dequantize(), meaning[f"model.layers.{i}.mlp.down_proj"])
        assert weights.head.scheme.name == "dense"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_of_a_four_bit_model_add_up(size, tmp_path):
    meaning = checkpoint(tmp_path, AWQ, awq_matrix)
    spec = read_spec(tmp_path, CONFIG)
    down, gate = torch.zeros(64, 0), torch.zeros(0, 64)
    wo = torch.zeros(64, 0)
    for rank in range(size):
        items = {i.name: i for i in open_weights(tmp_path, spec, CONFIG, rank, size, CPU) if isinstance(i, LocalMatrix)}
        packed = {
            n: Linear.pack(m.role, m.scheme, m.tensors, m.bias, m.in_features, CPU, torch.float32).dequantize()
            for n, m in items.items()
        }
        down = torch.cat([down, packed["layers.0.ffn.w_down"]], 1)
        gate = torch.cat([gate, packed["layers.0.ffn.w_gate_up"].chunk(2)[0]])
        wo = torch.cat([wo, packed["layers.0.attention.wo"]], 1)
    torch.testing.assert_close(down[:, :96], meaning["model.layers.0.mlp.down_proj"])
    torch.testing.assert_close(gate[:96], meaning["model.layers.0.mlp.gate_proj"])
    torch.testing.assert_close(wo[:, :64], meaning["model.layers.0.self_attn.o_proj"])
    assert not down[:, 96:].any() and not gate[96:].any() and not wo[:, 64:].any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rounding_while_loading_stays_near_the_original(size, tmp_path):
    model = tiny_models.random_model(tiny_models.llama())
    model.save_pretrained(tmp_path)
    config = EngineConfig(weight_format="int4")
    spec = read_spec(tmp_path, config)
    whole = model.model.layers[1].mlp.down_proj.weight.detach()
    parts = []
    for rank in range(size):
        items = {i.name: i for i in open_weights(tmp_path, spec, config, rank, size, CPU)}
        m = items["layers.1.ffn.w_down"]
        parts.append(Linear.pack(m.role, m.scheme, m.tensors, m.bias, m.in_features, CPU, torch.float32).dequantize())
        assert m.scheme == "int4" and items["head"].scheme == "dense"
    ours = torch.cat(parts, 1)[:, : whole.shape[1]]
    step = (whole.max() - whole.min()) / 15
    assert (ours - whole).abs().max() < 0.75 * step and not torch.equal(ours, whole)


def test_quantized_tensors_that_do_not_fit_are_named(tmp_path):
    checkpoint(tmp_path, AWQ, awq_matrix)
    good = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    other = "model.layers.1.self_attn.k_proj"
    cases = [
        ({k: v for k, v in good.items() if not k.startswith(name)}, name),
        ({k: v for k, v in good.items() if k != f"{name}.qzeros"}, "qzeros"),
        ({**good, f"{name}.bias": torch.ones(96)}, f"{name}.bias"),
        (good | {f"{name}.{s}": good[f"{other}.{s}"].clone() for s in ("qweight", "qzeros", "scales")}, name),
    ]  # fmt: skip
    for tensors, word in cases:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=re.escape(word)):
            list(open_weights(tmp_path, read_spec(tmp_path, CONFIG), CONFIG, 0, 1, CPU))


def test_modules_left_dense_cannot_be_fused_with_quantized_ones(tmp_path):
    checkpoint(tmp_path, AWQ | {"modules_to_not_convert": ["q_proj"]}, awq_matrix)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn.q_proj."
        tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)} | {
            prefix + "weight": torch.ones(64, 64)
        }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not quantized alike"):
        list(open_weights(tmp_path, read_spec(tmp_path, CONFIG), CONFIG, 0, 1, CPU))
