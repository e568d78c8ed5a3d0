"""Writing a workspace: to a folder beside the target that is renamed at the end, so it is whole or not there."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pagoda.config import EngineConfig
from pagoda.errors import ModelError, WorkspaceError
from pagoda.kernels.cpu.pack import Arena, has_kernel, pack_cpu
from pagoda.layers.linear import Linear
from pagoda.layers.schemes import Tensors
from pagoda.models.engine_toml import VERSION, write_engine_toml
from pagoda.models.local_weights import LocalMatrix, LocalTensor, LocalWeights, open_weights
from pagoda.models.safetensors_file import SafetensorsWriter
from pagoda.models.spec import ModelSpec, read_spec
from pagoda.models.workspace import MARK, is_workspace, rank_file

OWN_ENTRIES = ("model.json", "engine.toml", "tokenizer", "weights")
TEXT_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")


def check_format(spec: ModelSpec, model_format: str | None, group_size: int = 0) -> None:
    """ModelError unless the checkpoint is what the user said it is: `hf` (not quantized), `awq` or `gptq`, in groups of
    `group_size` (0: not said)."""
    found, group = (spec.quant.method, spec.quant.group_size) if spec.quant else ("hf", 0)
    if model_format not in (None, "hf", "awq", "gptq"):
        raise ModelError(
            f"Model format {model_format!r} is unknown: it must be hf, awq or gptq (a Hugging Face folder)."
        )
    if model_format is not None and found not in (model_format, "online"):
        raise ModelError(f"The checkpoint's format is {found}, not {model_format}: leave --model-format out.")
    if group_size and group != group_size:
        groups = f"groups are of {group} inputs, not {group_size}" if group else "weights have no groups"
        raise ModelError(f"The checkpoint's {groups}: leave --group-size out.")


def write_workspace(
    model: Path,
    dst: Path,
    config: EngineConfig,
    template: str | None = None,
    progress: Callable[[float], None] | None = None,
    *,
    model_format: str | None = None,
    group_size: int = 0,
) -> Path:
    """Convert the checkpoint folder `model`, cut for `config.tp` ranks, and return `dst`. `template`: the chat
    template's name to remember. An existing `dst` is replaced only if it is a workspace of our own making; on any error
    nothing is left behind and `dst` is as it was. Overrides of rope and log-n stay settings, they are not baked in.
    With `device` cpu the weights are packed for the C++ step of CPUs, in the checkpoint's own number format.
    `model_format`, `group_size`: see `check_format`."""
    if is_workspace(model):
        raise WorkspaceError(f"{model} is a workspace already: convert the original checkpoint.")
    spec = read_spec(model, config.replace(rope_scaling_factor=0.0, use_logn_attn=None))
    check_format(spec, model_format, group_size)
    check_target(dst)
    packed = spec.dtype if config.device == "cpu" else None
    if packed and config.tp > 1:
        raise WorkspaceError("Weights packed for CPUs are for one process: leave --tp or --device out.")
    draft = dst.parent / f".{dst.name}.{os.getpid()}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        (draft / "weights").mkdir(parents=True)
        for rank in range(config.tp):
            share = None if progress is None else (lambda p, r=rank: progress((r + p) / config.tp))
            weights = open_weights(model, spec, config, rank, config.tp, torch.device("cpu"))
            items = _packed(weights) if packed else _canonical(weights)
            _write_rank(rank_file(draft, rank, config.tp), items, len(weights), share)
        copy_text(model, draft / "tokenizer")
        head = {MARK: VERSION, "source": model.resolve().name, "template": template, "tp": config.tp, "packed": packed}
        (draft / "model.json").write_text(json.dumps(head | {"spec": spec.to_json()}, indent=1), encoding="utf-8")
        write_engine_toml(draft / "engine.toml", config, config.tp)
        _replace(draft, dst)
    except OSError as e:
        raise WorkspaceError(f"{dst} cannot be written ({e}): free some space or choose another --dst-path.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return dst


def _canonical(items: LocalWeights) -> Iterator[Tensors]:
    """The tensors of each item, by their names in the file."""
    for item in items:
        if isinstance(item, LocalTensor):
            yield {item.name: item.tensor}
        else:
            bias = {} if item.bias is None else {"bias": item.bias}
            yield {f"{item.name}.{suffix}": tensor for suffix, tensor in (item.tensors | bias).items()}


def _packed(items: LocalWeights) -> Iterator[Tensors]:
    """The same, each matrix as the C++ step of CPUs reads it; a tied head stands for itself, and for the embedding too
    where it is not rounded."""
    spec = items.spec
    dtype = getattr(torch, spec.dtype)
    for item in items:
        if isinstance(item, LocalMatrix):
            yield _pack(item, dtype, spec.quant is not None)
            continue
        tied = item.name == "embed.weight" and spec.tied_embeddings
        head = LocalMatrix("head", "head", "dense", {"weight": item.tensor}, None, spec.hidden_size)
        yield (_pack(head, dtype, spec.quant is not None) if tied else {}) | (
            {item.name: item.tensor} if not tied or spec.quant else {}
        )


def _pack(item: LocalMatrix, dtype: torch.dtype, quantized: bool) -> Tensors:
    linear = Linear.pack(item.role, item.scheme, item.tensors, item.bias, item.in_features, "cpu", dtype)
    if not has_kernel(item.scheme, linear.tensors):
        raise WorkspaceError(f"CPUs have no kernel for these {item.scheme} weights: leave --device out.")
    packed = pack_cpu(item.scheme, linear.tensors, item.role, linear.bias, item.in_features, Arena(), quantized)
    return {f"{item.name}.{name}": tensor for name, tensor in packed.to_file(linear.out_features).items()}


def _write_rank(path: Path, items: Iterator[Tensors], count: int, progress: Callable[[float], None] | None) -> None:
    """One rank's tensors, in the order in which they stream."""
    writer = SafetensorsWriter(path, max_tensors=6 * (count + 1))
    try:
        for i, tensors in enumerate(items):
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            if progress is not None:
                progress((i + 1) / count)
    finally:
        writer.close()


def copy_text(model: Path, folder: Path) -> None:
    """Tokenizer, template, config.json and generation_config.json; no code and no weights' index."""
    folder.mkdir(exist_ok=True)
    for pattern in TEXT_FILES:
        for path in sorted(model.glob(pattern)):
            if path.is_file() and not path.name.endswith(".index.json"):
                target = folder / path.relative_to(model)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def check_target(dst: Path) -> None:
    """WorkspaceError unless `dst` is free, empty, or a workspace of ours that holds nothing else."""
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise WorkspaceError(f"{dst} is not a folder: choose another --dst-path.")
    if not dst.exists() or not any(dst.iterdir()):
        return
    if not is_workspace(dst):
        raise WorkspaceError(
            f"{dst} exists and is not a Pagoda workspace: choose another --dst-path, or remove it yourself."
        )
    strange = sorted(p.name for p in dst.iterdir() if p.name not in OWN_ENTRIES)
    if strange:
        raise WorkspaceError(f"{dst} also holds {strange[0]}, which Pagoda did not write: move it away first.")


def _replace(draft: Path, dst: Path) -> None:
    """Put the finished draft in the target's place; the old one is removed only afterwards."""
    check_target(dst)
    old = draft.with_suffix(".old")
    if dst.exists():
        dst.rename(old)
    draft.rename(dst)
    shutil.rmtree(old, ignore_errors=True)
