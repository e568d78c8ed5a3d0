"""Checkpoints become canonical weights: every family, every number of ranks, every kind of damage."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError, ConfigError, ModelError
from pagoda.layers.parallel import Group
from pagoda.models.checkpoint import SafetensorsFolder
from pagoda.models.find import resolve_model, text_folder
from pagoda.models.loader import load_model, resolve_spec
from pagoda.models.local_weights import LocalMatrix, LocalWeights, open_weights
from pagoda.models.safetensors_file import SafetensorsFile, SafetensorsWriter
from pagoda.models.sharding import ZERO
from pagoda.models.spec import read_spec, spec_from_config

CPU = torch.device("cpu")
CONFIG = EngineConfig()
OTHERS = ["internlm", "internlm2", "baichuan", "baichuan2", "qwen1"]


def save(folder: Path, family: str):
    """A checkpoint of `family` in `folder` and the transformers model that computes the same."""
    if family in OTHERS:
        return getattr(tiny_models, family)(folder)
    model = tiny_models.random_model(tiny_models.FAMILIES[family]())
    model.save_pretrained(folder)
    return model


def canonical(folder: Path, config: EngineConfig = CONFIG, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    """Every canonical tensor of one rank, matrices dense."""
    out = {}
    for item in open_weights(folder, read_spec(folder, config), config, rank, size, CPU):
        if isinstance(item, LocalMatrix):
            out[f"{item.name}.weight"] = item.tensors["weight"]
            if item.bias is not None:
                out[f"{item.name}.bias"] = item.bias
        else:
            out[item.name] = item.tensor
    return out


def expected(model, family: str) -> dict[str, torch.Tensor]:
    """The same from transformers' module objects."""
    plus = 1.0 if family == "gemma2" else 0.0
    body, out = model.model, {}
    out["embed.weight"], out["norm.weight"] = body.embed_tokens.weight, body.norm.weight + plus
    if not model.config.tie_word_embeddings:
        out["head.weight"] = model.lm_head.weight
    for i, layer in enumerate(body.layers):
        attn, mlp, to = layer.self_attn, layer.mlp, f"layers.{i}."
        fused = hasattr(attn, "qkv_proj")
        groups = {
            "attention.w_qkv": [attn.qkv_proj] if fused else [attn.q_proj, attn.k_proj, attn.v_proj],
            "attention.wo": [attn.o_proj],
            "ffn.w_gate_up": [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj],
            "ffn.w_down": [mlp.down_proj],
        }
        for name, linears in groups.items():
            out[f"{to}{name}.weight"] = torch.cat([m.weight for m in linears])
            if linears[0].bias is not None:
                out[f"{to}{name}.bias"] = torch.cat([m.bias for m in linears])
        gains = {"attention_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
        if family == "gemma2":
            gains |= {
                "attention_post_norm": layer.post_attention_layernorm,
                "ffn_norm": layer.pre_feedforward_layernorm,
            }
            gains["ffn_post_norm"] = layer.post_feedforward_layernorm
        if hasattr(attn, "q_norm"):
            gains |= {"attention.q_norm": attn.q_norm, "attention.k_norm": attn.k_norm}
        out |= {f"{to}{name}.weight": gain.weight + plus for name, gain in gains.items()}
    return {k: v.detach() for k, v in out.items()}


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *OTHERS])
def test_every_family_gives_the_tensors_of_transformers(family, tmp_path):
    model = save(tmp_path, family)
    ours, theirs = canonical(tmp_path), expected(model, family)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6 if name == "head.weight" else 0)


def decoded(weights: dict[str, torch.Tensor], spec, size: int, i: int) -> dict[str, torch.Tensor]:
    """One rank's matrices cut up again into heads and ffn features."""
    shape, D = spec.shard(0, size), spec.head_dim
    qkv = weights[f"layers.{i}.attention.w_qkv.weight"]
    q, k, v = qkv.split([shape.num_heads * D, shape.num_kv_heads * D, shape.num_kv_heads * D])
    gate, up = weights[f"layers.{i}.ffn.w_gate_up.weight"].chunk(2)
    heads = {"q": q.view(-1, D, q.shape[1]), "k": k.view(-1, D, q.shape[1]), "v": v.view(-1, D, q.shape[1])}
    wo = weights[f"layers.{i}.attention.wo.weight"]
    return heads | {
        "o": wo.view(wo.shape[0], -1, D),
        "gate": gate,
        "up": up,
        "down": weights[f"layers.{i}.ffn.w_down.weight"],
    }


@pytest.mark.parametrize("family", ["llama", "internlm2", "phi3", "llama_biases", "llama_tied"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_together_compute_what_one_computes(family, size, tmp_path):
    save(tmp_path, family)
    spec = read_spec(tmp_path, CONFIG)
    whole, parts = canonical(tmp_path), [canonical(tmp_path, rank=r, size=size) for r in range(size)]
    x = torch.randn(5, spec.hidden_size)
    full = decoded(whole, spec, 1, 1)
    ffn = (x @ full["gate"].T).tanh() * (x @ full["up"].T) @ full["down"].T
    heads = torch.einsum("tc,hdc->thd", x, full["q"]).sigmoid() + torch.einsum(
        "tc,kdc->tkd", x, full["k"] * full["v"]
    ).repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)
    attention = torch.einsum("thd,chd->tc", heads - 0.5, full["o"])
    ffn_sum, attention_sum, bias = 0.0, 0.0, 0.0
    for rank, weights in enumerate(parts):
        shape, w = spec.shard(rank, size), decoded(weights, spec, size, 1)
        ffn_sum = ffn_sum + (x @ w["gate"].T).tanh() * (x @ w["up"].T) @ w["down"].T
        h = torch.einsum("tc,hdc->thd", x, w["q"]).sigmoid() + torch.einsum(
            "tc,kdc->tkd", x, w["k"] * w["v"]
        ).repeat_interleave(shape.num_heads // shape.num_kv_heads, 1)
        attention_sum = attention_sum + torch.einsum("thd,chd->tc", h - 0.5, w["o"])
        bias = bias + weights.get("layers.1.attention.wo.bias", 0.0)
        assert all((w["q"][i] == 0).all() for i, head in enumerate(shape.q_heads) if head == ZERO)
    torch.testing.assert_close(ffn_sum, ffn, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attention_sum, attention, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.as_tensor(bias), torch.as_tensor(whole.get("layers.1.attention.wo.bias", 0.0)))
    for name in ("embed.weight", "head.weight"):
        if name in whole:
            rows = torch.cat([w[name] for w in parts])
            assert torch.equal(rows[: spec.vocab_size], whole[name]) and not rows[spec.vocab_size :].any()


def test_packed_weights_on_a_device(tmp_path):
    model = save(tmp_path, "llama_tied")
    spec, _ = resolve_spec(tmp_path, CONFIG)
    told: list[float] = []
    weights = load_model(tmp_path, spec, CONFIG, CPU, torch.bfloat16, Group.single(), told.append)
    assert told == sorted(told) and told[-1] == 1.0
    assert weights.embed.dtype == torch.bfloat16 and weights.norm.dtype == torch.float32
    assert weights.head.tensors["weight"].data_ptr() == weights.embed.data_ptr()
    down = model.model.layers[2].mlp.down_proj.weight.detach().bfloat16().float()
    assert torch.equal(weights.layers[2].w_down.dequantize(), down)


def test_sharded_files_and_bin_equal_the_single_file(tmp_path):
    model = save(tmp_path / "one", "llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    shutil.copytree(tmp_path / "one", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    one = canonical(tmp_path / "one")
    for other in (canonical(tmp_path / "many"), canonical(tmp_path / "bin", EngineConfig(load_format="bin"))):
        assert all(torch.equal(one[k], other[k]) for k in one | other)
    with pytest.raises(CheckpointError, match="--load-format bin"):
        canonical(tmp_path / "bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        canonical(tmp_path / "one", EngineConfig(load_format="bin"))


class Payload:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_bin_runs_no_code(tmp_path, capsys):
    save(tmp_path, "llama")
    torch.save({"model.norm.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="plain tensors"):
        canonical(tmp_path, EngineConfig(load_format="bin"))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "internlm2"])
def test_dummy_weights_need_only_the_config_and_agree_over_ranks(family, tmp_path):
    save(tmp_path / "full", family)
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "full" / "config.json", tmp_path / "bare")
    config = EngineConfig(load_format="dummy")
    dummy, real = canonical(tmp_path / "bare", config), canonical(tmp_path / "full")
    assert {k: v.shape for k, v in dummy.items()} == {k: v.shape for k, v in real.items()}
    assert all(v.isfinite().all() for v in dummy.values())
    matrix = dummy["layers.0.ffn.w_gate_up.weight"].float()
    assert 0.8 < matrix.std() * matrix.shape[1] ** 0.5 < 1.2
    assert torch.equal(dummy["embed.weight"], canonical(tmp_path / "bare", config)["embed.weight"])
    part = canonical(tmp_path / "bare", config, 1, 2)["layers.0.ffn.w_down.weight"]
    whole = dummy["layers.0.ffn.w_down.weight"]
    assert torch.equal(part[:, : whole.shape[1] - part.shape[1]], whole[:, part.shape[1] :])


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_leftover_and_misshapen_tensors_are_named(tmp_path):
    save(tmp_path, "llama")
    good = (tmp_path / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    cases = [
        (lambda t: t.pop(name), name),
        (lambda t: t.update({"model.layers.1.mlp.router.weight": torch.ones(2)}), "router"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}), "q_proj.bias"),
        (lambda t: t.update({name: torch.ones(3, 4)}), name),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(80, 64)}), "layers.3"),
    ]
    for change, word in cases:
        (tmp_path / "model.safetensors").write_bytes(good)
        edit(tmp_path, change)
        with pytest.raises(CheckpointError, match=word) as e:
            canonical(tmp_path)
        assert "\n" not in str(e.value)
    (tmp_path / "model.safetensors").write_bytes(good)
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    canonical(tmp_path)


def test_a_tied_head_may_be_stored_too(tmp_path):
    save(tmp_path, "llama_tied")
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in canonical(tmp_path)


@pytest.mark.parametrize("cut", [0, 5, 8, 100, 3000, -1])
def test_truncated_files_are_refused(cut, tmp_path):
    save(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as e:
        canonical(tmp_path)
    assert "\n" not in str(e.value)


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


BAD_HEADERS = [
    (b"{}", b"", 2**60), (b"{}", b"", 2**63 + 5), (b"[1]", b"", None), (b"nonsense", b"", None),
    (b"[" * 5000, b"", None),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), None),
    ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4), None),
    ({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4), None),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), None),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9), None),
    ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), None), ({"a": 3}, b"", None),
    ({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}, bytes(6), None),
    ({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, bytes(4), None),
    ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4), None),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data", "length"), BAD_HEADERS, ids=str)
def test_bad_headers_are_refused_in_one_sentence(header, data, length, tmp_path):
    with pytest.raises(CheckpointError, match="is damaged") as e:
        SafetensorsFile(header_file(tmp_path / "x.safetensors", header, data, length))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_random_bytes_never_crash_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("junk") / "x.safetensors"
    path.write_bytes(data)
    names: frozenset[str] = frozenset()
    with contextlib.suppress(CheckpointError):  # any other kind of error fails
        names = SafetensorsFile(path).names
    assert not names  # a header of `{}` alone would be a good file without tensors


def test_reader_and_writer_agree_with_the_library(tmp_path):
    tensors = {
        "odd": torch.randn(3, 5, dtype=torch.float64)[:, :3].contiguous().half(), "one": torch.tensor(2.5),
        "bytes": torch.arange(7, dtype=torch.uint8), "empty": torch.empty(0, 4), "brain": torch.randn(4, 4).bfloat16(),
        "eight": torch.randn(8).to(torch.float8_e4m3fn), "long": torch.arange(3),
    }  # fmt: skip
    writer = SafetensorsWriter(tmp_path / "ours.safetensors", len(tensors))
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    theirs = load_file(tmp_path / "ours.safetensors")
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours = SafetensorsFile(tmp_path / "theirs.safetensors")
    assert ours.names == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        for read in (theirs[name], ours.get(name), SafetensorsFile(tmp_path / "ours.safetensors").get(name)):
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert np.array_equal(read.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_paths_stay_inside_the_folder(tmp_path):
    save(tmp_path / "model", "llama")
    outside = tmp_path / "outside.safetensors"
    shutil.move(tmp_path / "model" / "model.safetensors", outside)
    (tmp_path / "model" / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        SafetensorsFolder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    index = tmp_path / "model" / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(outside), "..", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match=r"outside of itself|lacks the weight file"):
            SafetensorsFolder(tmp_path / "model")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        SafetensorsFolder(tmp_path / "model")
    index.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        SafetensorsFolder(tmp_path / "model")


def test_the_hub_caches_links_are_followed(tmp_path):
    repo = tmp_path / "models--a--b"
    save(repo / "snapshots" / "rev", "llama")
    (repo / "blobs").mkdir()
    file = repo / "snapshots" / "rev" / "model.safetensors"
    shutil.move(file, repo / "blobs" / "hash")
    file.symlink_to("../../blobs/hash")
    assert SafetensorsFolder(repo / "snapshots" / "rev").names


def test_resolve_model(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path and text_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("x")
    for name in (str(tmp_path / "file"), str(tmp_path / "gone"), "./nothing", "nothing", "no-such-owner/no-such-model"):
        with pytest.raises(CheckpointError) as e:
            resolve_model(name)
        assert "\n" not in str(e.value)


def test_sixteen_bit_weights_are_not_taken_for_quantized_ones(tmp_path):
    quant = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    save(tmp_path, "llama")
    values = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ConfigError, match="int4 already"):
        spec_from_config(values | {"quantization_config": quant}, EngineConfig(weight_format="fp8"))
    online = spec_from_config(values, EngineConfig(weight_format="int4")).quant
    assert online.method == "online" and online.scheme == "int4" and online.covers("model.layers.0.mlp.up_proj")
    with pytest.raises(ModelError):
        spec_from_config(values | {"quantization_config": quant | {"bits": 2}})


def test_len_counts_the_items(tmp_path):
    for family in ("qwen3", "gemma2", "llama"):
        save(tmp_path / family, family)
        spec = read_spec(tmp_path / family, CONFIG)
        weights = LocalWeights(spec, SafetensorsFolder(tmp_path / family), 0, 1, CPU)
        assert len(list(weights)) == len(weights)
