"""A workspace: a model converted once, cut and fused for its ranks, so that starting is one mapped read per rank.

    workspace/model.json                      spec, version, template name
              engine.toml                     settings for a person to edit
              tokenizer/                      the checkpoint's text files
              weights/rank-R-of-N.safetensors canonical tensors

Written to a folder beside the target and renamed at the end: a workspace is whole or not there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError, WorkspaceError
from pagoda.models.engine_toml import VERSION, read_engine_toml, write_engine_toml
from pagoda.models.local_weights import LocalMatrix, LocalTensor, LocalWeights, open_weights
from pagoda.models.safetensors_file import SafetensorsFile, SafetensorsWriter
from pagoda.models.spec import ModelSpec, read_json, read_spec, spec_from_json

MARK = "pagoda_workspace"  # key of model.json that holds the version
OWN_ENTRIES = ("model.json", "engine.toml", "tokenizer", "weights")
TEXT_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")
ROLES = {
    "attention.w_qkv": "qkv",
    "attention.wo": "o",
    "ffn.w_gate_up": "gate_up",
    "ffn.w_down": "down",
    "head": "head",
}


@dataclass(frozen=True)
class Workspace:
    """An open workspace. `settings`: EngineConfig fields from engine.toml, `tp` among them."""

    folder: Path
    spec: ModelSpec
    settings: dict[str, Any]
    template: str | None

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def rank_file(self, rank: int) -> Path:
        return rank_file(self.folder, rank, self.settings["tp"])


def rank_file(folder: Path, rank: int, size: int) -> Path:
    """Where one rank's tensors lie."""
    return folder / "weights" / f"rank-{rank}-of-{size}.safetensors"


def is_workspace(folder: Path) -> bool:
    """Whether a folder is a workspace of ours (of any version)."""
    path = folder / "model.json"
    try:
        return path.is_file() and MARK in read_json(path)
    except CheckpointError:
        return False


def refuse_old_workspace(folder: Path) -> None:
    """WorkspaceError for a workspace of the old system, with the command that converts the original checkpoint."""
    if (folder / "triton_models").is_dir():
        raise WorkspaceError(
            f"{folder} is a workspace of the old system (triton_models/), which Pagoda does not read: convert the "
            f"original checkpoint with `pagoda convert CHECKPOINT --dst-path {folder}-new`."
        )


def open_workspace(folder: Path) -> Workspace:
    """Read model.json and engine.toml. Raises WorkspaceError for a newer version, missing files or bad values."""
    model = read_json(folder / "model.json")
    version = model.get(MARK)
    if not isinstance(version, int) or version > VERSION:
        raise WorkspaceError(
            f"{folder} is of version {version!r}, this Pagoda reads up to {VERSION}: update Pagoda, or convert again."
        )
    settings = read_engine_toml(folder / "engine.toml")
    if settings["tp"] != model.get("tp"):
        raise WorkspaceError(
            f"{folder}/engine.toml says tensor_para_size = {settings['tp']}, but the weights are cut for "
            f"{model.get('tp')}: write that number, or convert again with --tp {settings['tp']}."
        )
    return Workspace(folder, spec_from_json(model.get("spec") or {}), settings, model.get("template"))


class LocalWorkspace:
    """Iterating gives every LocalMatrix and LocalTensor of one rank's file, as they were written. Strict: names that
    are missing or left over raise WorkspaceError."""

    def __init__(self, folder: Path, spec: ModelSpec, rank: int, size: int):
        tp = open_workspace(folder).settings["tp"]
        if tp != size:
            raise WorkspaceError(
                f"{folder} is cut for tp {tp}: run it with --tp {tp}, or convert again with --tp {size}."
            )
        self.spec, self.shape = spec, spec.shard(rank, size)
        self.path = rank_file(folder, rank, size)
        if not self.path.is_file():
            raise WorkspaceError(f"{self.path} does not exist: convert the checkpoint again.")
        self._file = SafetensorsFile(self.path)
        self._parts: dict[str, dict[str, Tensor]] = {}
        for name in sorted(self._file.names):
            module, _, suffix = name.rpartition(".")
            self._parts.setdefault(module, {})[suffix] = self._file.get(name)
        wanted = set(_module_names(spec))
        if wanted != set(self._parts):
            odd = min(wanted ^ set(self._parts))
            raise WorkspaceError(f"{self.path} and model.json differ in {odd}: convert the checkpoint again.")

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[LocalMatrix | LocalTensor]:
        for module, parts in self._parts.items():
            role = ROLES.get(module.split(".", 2)[-1] if module.startswith("layers.") else module)
            if role is None:
                yield LocalTensor(f"{module}.weight", parts["weight"])
                continue
            parts = dict(parts)
            bias = parts.pop("bias", None)
            scheme = "dense" if set(parts) == {"weight"} or self.spec.quant is None else self.spec.quant.scheme
            local_k = {"o": self.shape.num_heads * self.spec.head_dim, "down": self.shape.ffn_size}
            yield LocalMatrix(module, role, scheme, parts, bias, local_k.get(role, self.spec.hidden_size))


def _module_names(spec: ModelSpec) -> Iterator[str]:
    """Canonical modules of a spec."""
    yield from ("embed", "norm", *([] if spec.tied_embeddings else ["head"]))
    kinds = [k for k in ROLES if k != "head"] + ["attention_norm", "ffn_norm"]
    kinds += ["attention.q_norm", "attention.k_norm"] if spec.qk_norm else []
    kinds += ["attention_post_norm", "ffn_post_norm"] if spec.post_norms else []
    for layer in range(spec.num_layers):
        yield from (f"layers.{layer}.{kind}" for kind in kinds)


def write_workspace(
    model: Path,
    dst: Path,
    config: EngineConfig,
    template: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Convert the checkpoint folder `model`, cut for `config.tp` ranks, and return `dst`. `template`: the chat
    template's name to remember. An existing `dst` is replaced only if it is a workspace of our own making; on any error
    nothing is left behind and `dst` is as it was. Overrides of rope and log-n stay settings, they are not baked in."""
    if is_workspace(model):
        raise WorkspaceError(f"{model} is a workspace already: convert the original checkpoint.")
    spec = read_spec(model, config.replace(rope_scaling_factor=0.0, use_logn_attn=None))
    check_target(dst)
    draft = dst.parent / f".{dst.name}.{os.getpid()}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        (draft / "weights").mkdir(parents=True)
        for rank in range(config.tp):
            share = None if progress is None else (lambda p, r=rank: progress((r + p) / config.tp))
            weights = open_weights(model, spec, config, rank, config.tp, torch.device("cpu"))
            _write_rank(rank_file(draft, rank, config.tp), weights, share)
        _copy_text(model, draft / "tokenizer")
        head = {MARK: VERSION, "source": model.resolve().name, "template": template, "tp": config.tp}
        (draft / "model.json").write_text(json.dumps(head | {"spec": spec.to_json()}, indent=1), encoding="utf-8")
        write_engine_toml(draft / "engine.toml", config, config.tp)
        _replace(draft, dst)
    except OSError as e:
        raise WorkspaceError(f"{dst} cannot be written ({e}): free some space or choose another --dst-path.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return dst


def _write_rank(path: Path, items: LocalWeights, progress: Callable[[float], None] | None) -> None:
    """One rank's tensors, in the order in which they stream."""
    writer = SafetensorsWriter(path, max_tensors=5 * len(items))
    try:
        for i, item in enumerate(items):
            if isinstance(item, LocalTensor):
                writer.add(item.name, item.tensor)
            else:
                bias = {} if item.bias is None else {"bias": item.bias}
                for suffix, tensor in (item.tensors | bias).items():
                    writer.add(f"{item.name}.{suffix}", tensor)
            if progress is not None:
                progress((i + 1) / len(items))
    finally:
        writer.close()


def _copy_text(model: Path, folder: Path) -> None:
    """Tokenizer, template, config.json and generation_config.json; no code and no weights' index."""
    folder.mkdir()
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


def remembered_template(folder: Path) -> str | None:
    """The chat template's name that was given to `convert`; None for checkpoints and where none was given."""
    return open_workspace(folder).template if is_workspace(folder) else None
