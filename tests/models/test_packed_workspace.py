"""A workspace packed for CPUs gives the executor what loading the checkpoint gives it, to the bit, or is refused."""

import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_programs import BLOCK_LEN, make_step

from pagoda.config import EngineConfig
from pagoda.errors import WorkspaceError
from pagoda.kernels.cpu.pack import Arena, PackedWeight
from pagoda.layers.parallel import Group
from pagoda.models.convert import write_workspace
from pagoda.models.decoder import build_program
from pagoda.models.executors import make_executor
from pagoda.models.executors.cpu import CpuExecutor
from pagoda.models.loader import load_model, resolve_spec

CPU = torch.device("cpu")
STEPS = [[(0, 37), (0, 1), (0, 16)], [(37, 1), (1, 1), (16, 1)]]


def start(folder, dtype=torch.float32, **changes):
    """The executor that the engine would make for a folder, and its spec."""
    spec, config = resolve_spec(folder, EngineConfig(num_threads=2, cache_block_seq_len=BLOCK_LEN, **changes))
    weights = load_model(folder, spec, config, CPU, dtype, Group.single())
    made = make_executor(build_program(spec, weights, Group.single()), config, CPU, dtype, Group.single())
    made.allocate_cache(130)
    return made, spec


def convert(family, tmp_path, weight_format="auto", **more):
    model, dst = tmp_path / "model", tmp_path / "workspace"
    tiny_models.random_model(tiny_models.FAMILIES[family]()).to(more.pop("dtype", torch.float32)).save_pretrained(model)
    config = EngineConfig(device="cpu", weight_format=weight_format)
    return model, write_workspace(model, dst, config, **more)


@pytest.mark.parametrize("family", ["llama_biases", "llama_tied", "gemma2", "qwen3"])
@pytest.mark.parametrize("weight_format", ["auto", "int8", "int4"])
def test_it_runs_as_its_checkpoint_does(family, weight_format, tmp_path):
    told: list[float] = []
    model, dst = convert(family, tmp_path, weight_format, progress=told.append)
    assert told == sorted(told) and told[-1] == 1.0
    (ours, spec), (theirs, _) = start(dst), start(model, weight_format=weight_format)
    assert isinstance(ours, CpuExecutor) and ours.weight_bytes == theirs.weight_bytes
    for rows in STEPS:
        step = make_step(rows, spec.vocab_size)
        assert torch.equal(ours.forward(step), theirs.forward(step))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_stay_what_they_are(dtype, tmp_path):
    model, dst = convert("llama_tied", tmp_path, dtype=dtype)
    (ours, spec), (theirs, _) = start(dst, dtype), start(model, dtype)
    step = make_step(STEPS[0], spec.vocab_size)
    assert torch.equal(ours.forward(step), theirs.forward(step))
    names = load_file(dst / "weights" / "rank-0-of-1.safetensors")
    assert "head.q" in names and "embed.weight" not in names  # held once
    with pytest.raises(WorkspaceError, match=f"packed in {spec.dtype}: leave --dtype out"):
        start(dst, torch.float32)


def test_what_it_cannot_serve_is_said(tmp_path):
    _, dst = convert("llama", tmp_path)
    with pytest.raises(WorkspaceError, match=r"no int4 cache.*without --device cpu"):
        start(dst, quant_policy="int4")
    spec, config = resolve_spec(dst, EngineConfig())
    with pytest.raises(WorkspaceError, match="packed for CPUs: run it with --device cpu"):
        load_model(dst, spec, config, torch.device("cuda"), torch.float32, Group.single())
    with pytest.raises(WorkspaceError, match="for one process"):
        write_workspace(tmp_path / "model", tmp_path / "two", EngineConfig(device="cpu", tp=2))
    with pytest.raises(WorkspaceError, match="no kernel for these fp8 weights"):
        write_workspace(tmp_path / "model", tmp_path / "two", EngineConfig(device="cpu", weight_format="fp8"))
    assert not (tmp_path / "two").exists()
    assert json.loads((dst / "model.json").read_text())["packed"] == "float32"


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    _, dst = convert("llama", tmp_path, "int4")
    path = dst / "weights" / "rank-0-of-1.safetensors"
    whole = load_file(path)
    module = "layers.1.ffn.w_down"
    for name in ("q", "scales", "form"):
        part = whole[f"{module}.{name}"]
        damaged = torch.zeros_like(part) if name == "form" else part[:-1].contiguous()
        save_file(whole | {f"{module}.{name}": damaged}, path)
        with pytest.raises(WorkspaceError, match=f"{module}.*convert the checkpoint again"):
            start(dst)
    del whole[f"{module}.scales"]
    save_file(whole, path)
    with pytest.raises(WorkspaceError, match=f"{module}.*convert the checkpoint again"):
        start(dst)


def test_every_part_is_measured():
    """For each kind of matrix, each part that is too short for the kernels is found."""
    for kind, parts in ((0, {"q": (32, 16)}), (3, {"q": (32, 4), "scales": (32,)})):
        q = torch.zeros(*parts["q"], dtype=torch.int32 if kind == 3 else torch.float32)
        scales = torch.zeros(parts["scales"], dtype=torch.float16) if kind == 3 else None
        more = {"group": 16, "scales": scales} if kind == 3 else {}
        right = PackedWeight(kind, 32, 16, 16, q, **more)
        tensors = right.to_file(30)
        assert tensors["form"][-1] == 30 and PackedWeight.from_file(tensors, Arena()).struct.rows == 32
        for name in tensors:
            if name != "form":
                with pytest.raises(ValueError, match=name):
                    PackedWeight.from_file(tensors | {name: tensors[name][:-1]}, Arena())
