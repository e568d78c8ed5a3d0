"""A converted workspace holds what the checkpoint holds, is whole or absent, and never costs a user's files."""

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError, ModelError, WorkspaceError
from pagoda.layers.parallel import Group
from pagoda.models import convert
from pagoda.models.convert import write_workspace
from pagoda.models.find import resolve_model, text_folder
from pagoda.models.loader import load_model, resolve_spec
from pagoda.models.local_weights import LocalMatrix, open_weights
from pagoda.models.safetensors_file import SafetensorsWriter
from pagoda.models.workspace import is_workspace, open_workspace, remembered_template
from pagoda.models.workspace_weights import LocalWorkspace

CPU = torch.device("cpu")
CONFIG = EngineConfig()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama with the files of a tokenizer beside it."""
    folder = tmp_path / "model"
    tiny_models.random_model(tiny_models.llama()).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hi")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def flat(items) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for item in items:
        if isinstance(item, LocalMatrix):
            out |= {f"{item.name}.{k}": t for k, t in item.tensors.items()}
            out |= {} if item.bias is None else {f"{item.name}.bias": item.bias}
            out[f"{item.name}.about"] = torch.tensor([len(item.role), len(item.scheme), item.in_features])
        else:
            out[item.name] = item.tensor
    return out


@pytest.mark.parametrize("family", ["llama_biases", "gemma2", "qwen3", "phi3", "llama_tied"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_workspace_gives_the_tensors_of_its_checkpoint(family, size, tmp_path):
    model, dst = tmp_path / "model", tmp_path / "workspace"
    tiny_models.random_model(tiny_models.FAMILIES[family]()).save_pretrained(model)
    config = EngineConfig(tp=size)
    told: list[float] = []
    assert write_workspace(model, dst, config, progress=told.append) == dst
    assert told == sorted(told) and told[-1] == 1.0
    spec, _ = resolve_spec(model, config)
    assert resolve_spec(dst, CONFIG)[0] == spec and resolve_spec(dst, CONFIG)[1].tp == size
    for rank in range(size):
        ours = flat(LocalWorkspace(dst, spec, rank, size))
        theirs = flat(open_weights(model, spec, config, rank, size, CPU))
        assert set(ours) == set(theirs)
        assert all(ours[k].dtype == t.dtype and torch.equal(ours[k], t) for k, t in theirs.items())
    assert sorted(p.name for p in dst.iterdir()) == ["engine.toml", "model.json", "tokenizer", "weights"]
    assert len(load_file(dst / "weights" / f"rank-0-of-{size}.safetensors")) > 10


def test_loading_from_both_is_the_same(checkpoint, tmp_path):
    dst = write_workspace(checkpoint, tmp_path / "workspace", CONFIG, template="internlm-chat-7b")
    assert remembered_template(dst) == "internlm-chat-7b" and remembered_template(checkpoint) is None
    spec, config = resolve_spec(dst, CONFIG)
    one, two = (load_model(f, spec, config, CPU, torch.float32, Group.single()) for f in (checkpoint, dst))
    assert torch.equal(one.embed, two.embed) and torch.equal(one.norm, two.norm)
    for a, b in zip(one.layers, two.layers, strict=True):
        assert torch.equal(a.w_qkv.dequantize(), b.w_qkv.dequantize())
        assert torch.equal(a.w_down.dequantize(), b.w_down.dequantize())
        assert torch.equal(a.ffn_norm, b.ffn_norm)
    assert torch.equal(one.head.dequantize(), two.head.dequantize())
    names = {p.name for p in text_folder(dst).iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert text_folder(checkpoint) == checkpoint and is_workspace(dst) and not is_workspace(checkpoint)


def test_a_dummy_workspace_needs_only_the_config(checkpoint, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    dst = write_workspace(bare, tmp_path / "workspace", EngineConfig(load_format="dummy"))
    spec, config = resolve_spec(dst, CONFIG)
    weights = load_model(dst, spec, config, CPU, torch.float32, Group.single())
    assert weights.layers[0].w_qkv.dequantize().std() > 0.05


def test_engine_toml_is_for_a_person_to_edit(checkpoint, tmp_path, caplog):
    dst = write_workspace(checkpoint, tmp_path / "workspace", EngineConfig(max_batch_size=7, rope_scaling_factor=2.0))
    toml = dst / "engine.toml"
    text = toml.read_text()
    assert "max_batch_size = 7" in text and 'quant_policy = "none"' in text and "tensor_para_size = 1" in text
    spec, config = resolve_spec(dst, CONFIG)
    assert config.max_batch_size == 7 and spec.rope.kind == "dynamic" and spec.rope.factor == 2.0
    assert resolve_spec(dst, EngineConfig(max_batch_size=9))[1].max_batch_size == 9
    toml.write_text(text.replace("# session_len =", "session_len = 99").replace('"none"', "8"))
    assert resolve_spec(dst, CONFIG)[1].session_len == 99 and resolve_spec(dst, CONFIG)[1].quant_policy == "int8"
    toml.write_text(text.replace("version = 2", "version = 1").replace('"none"', "4"))
    assert resolve_spec(dst, CONFIG)[1].quant_policy == "int8" and "quant_policy 4" in caplog.text
    toml.write_text(text.replace('"none"', "4"))
    assert resolve_spec(dst, CONFIG)[1].quant_policy == "int4" and "means int4" in caplog.text
    toml.write_text(text.replace("# use_logn_attn =", "use_logn_attn = true"))
    assert resolve_spec(dst, CONFIG)[0].logn_len == 256


BAD_TOML = [
    ("version = 2", "version = 3", "version 3"),
    ("version = 2", "", "version None"),
    ("max_batch_size = 64", "max_batch_size = 0", "max_batch_size"),
    ("max_batch_size = 64", "max_bach_size = 64", "max_bach_size"),
    ("max_batch_size = 64", "max_batch_size = ", "cannot be read"),
    ('quant_policy = "none"', 'quant_policy = "int3"', "quant_policy"),
    ('quant_policy = "none"', "quant_policy = 3", "quant_policy 3"),
    ("tensor_para_size = 1", "tensor_para_size = 2", "--tp 2"),
    ("tensor_para_size = 1", 'tensor_para_size = "x"', "tp"),
]


@pytest.mark.parametrize(("old", "new", "word"), BAD_TOML)
def test_bad_settings_are_named(old, new, word, checkpoint, tmp_path):
    dst = write_workspace(checkpoint, tmp_path / "workspace", CONFIG)
    text = (dst / "engine.toml").read_text()
    assert old in text
    (dst / "engine.toml").write_text(text.replace(old, new))
    with pytest.raises(WorkspaceError, match=word) as e:
        resolve_spec(dst, CONFIG)
    assert "engine.toml" in str(e.value)


def test_damaged_or_newer_workspaces_are_refused(checkpoint, tmp_path):
    dst = write_workspace(checkpoint, tmp_path / "workspace", CONFIG)
    spec, _ = resolve_spec(dst, CONFIG)
    model = json.loads((dst / "model.json").read_text())
    (dst / "model.json").write_text(json.dumps(model | {"pagoda_workspace": 99}))
    with pytest.raises(WorkspaceError, match="version 99"):
        resolve_spec(dst, CONFIG)
    (dst / "model.json").write_text(json.dumps(model))
    with pytest.raises(WorkspaceError, match="--tp 1, or convert again with --tp 2"):
        LocalWorkspace(dst, spec, 0, 2)
    with pytest.raises(WorkspaceError, match="--weight-format int8"):
        resolve_spec(dst, EngineConfig(weight_format="int8"))
    file = dst / "weights" / "rank-0-of-1.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="rank-0-of-1"):
        LocalWorkspace(dst, spec, 0, 1)
    writer = SafetensorsWriter(file, 1)
    writer.add("embed.weight", torch.ones(2, 2))
    writer.close()
    with pytest.raises(WorkspaceError, match="differ in"):
        LocalWorkspace(dst, spec, 0, 1)
    file.unlink()
    with pytest.raises(WorkspaceError, match="does not exist"):
        LocalWorkspace(dst, spec, 0, 1)


def test_a_failed_conversion_leaves_everything_as_it_was(checkpoint, tmp_path, monkeypatch):
    dst = write_workspace(checkpoint, tmp_path / "workspace", CONFIG, template="first")
    before = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
    weights = checkpoint / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1000])
    with pytest.raises(CheckpointError):
        write_workspace(checkpoint, dst, CONFIG)
    weights.write_bytes(good)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "add", full_disk)
    with pytest.raises(WorkspaceError, match="No space left"):
        write_workspace(checkpoint, dst, CONFIG)
    with pytest.raises(WorkspaceError, match="No space left"):
        write_workspace(checkpoint, tmp_path / "other", CONFIG)
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == before
    assert open_workspace(dst).template == "first"


def test_only_our_own_workspaces_are_replaced(checkpoint, tmp_path):
    dst = tmp_path / "target"
    dst.mkdir()
    write_workspace(checkpoint, dst, CONFIG)  # an empty folder is free
    write_workspace(checkpoint, dst, CONFIG, template="again")
    assert open_workspace(dst).template == "again"
    (dst / "thesis.txt").write_text("precious")
    with pytest.raises(WorkspaceError, match=r"thesis\.txt"):
        write_workspace(checkpoint, dst, CONFIG)
    (dst / "thesis.txt").rename(tmp_path / "thesis.txt")
    for taken in (checkpoint, tmp_path):
        with pytest.raises(WorkspaceError, match="not a Pagoda workspace"):
            write_workspace(checkpoint, taken, CONFIG)
    with pytest.raises(WorkspaceError, match="not a folder"):
        write_workspace(checkpoint, tmp_path / "thesis.txt", CONFIG)
    (tmp_path / "link").symlink_to(dst)
    with pytest.raises(WorkspaceError, match="not a folder"):
        write_workspace(checkpoint, tmp_path / "link", CONFIG)
    assert (tmp_path / "thesis.txt").read_text() == "precious" and (checkpoint / "config.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_old_workspaces_are_refused_with_the_command(tmp_path):
    (tmp_path / "triton_models" / "weights").mkdir(parents=True)
    with pytest.raises(WorkspaceError, match="pagoda convert CHECKPOINT"):
        resolve_model(str(tmp_path))


def test_a_workspace_cannot_be_converted_again(checkpoint, tmp_path):
    dst = write_workspace(checkpoint, tmp_path / "workspace", CONFIG)
    with pytest.raises(WorkspaceError, match="original checkpoint"):
        write_workspace(dst, tmp_path / "other", CONFIG)


def test_a_format_that_is_not_the_checkpoints_is_refused(checkpoint, tmp_path):
    for given, word in (
        ({"model_format": "awq"}, "is hf, not awq"),
        ({"model_format": "llama"}, "unknown"),
        ({"group_size": 64}, "no groups"),
    ):
        with pytest.raises(ModelError, match=word):
            write_workspace(checkpoint, tmp_path / "workspace", CONFIG, **given)
    config = checkpoint / "config.json"
    quant = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quant}))
    for named in ({"model_format": "awq"}, {}):
        with pytest.raises(ModelError, match="128 inputs, not 64"):
            write_workspace(checkpoint, tmp_path / "workspace", CONFIG, **named, group_size=64)
    assert not (tmp_path / "workspace").exists()


def test_convert_streams(checkpoint, tmp_path, monkeypatch):
    """While one matrix is written, no other of the model's is held by the writer."""
    alive: list[int] = []
    watched: list[weakref.ref] = []
    add = SafetensorsWriter.add

    def counting(self, name, tensor):
        watched.append(weakref.ref(tensor))
        alive.append(sum(r() is not None for r in watched))
        add(self, name, tensor)

    monkeypatch.setattr(convert.SafetensorsWriter, "add", counting)
    write_workspace(checkpoint, tmp_path / "workspace", CONFIG)
    assert len(alive) > 10 and max(alive) <= 3


def test_finding_a_model_needs_no_torch():
    code = "import sys, pagoda.models.find, pagoda.models.workspace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
