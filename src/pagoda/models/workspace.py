"""A workspace: a model converted once, cut and fused for its ranks, so that starting is one mapped read per rank.

    workspace/model.json                      spec, version, template name
              engine.toml                     settings for a person to edit
              tokenizer/                      the checkpoint's text files
              weights/rank-R-of-N.safetensors canonical tensors, or those that the C++ step of CPUs reads
              weights/kv-ranges.safetensors   ranges of an int8 cache, where calibrated

Here its papers are read, without torch; `convert` writes it and `workspace_weights` reads its tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError, WorkspaceError
from pagoda.models.engine_toml import VERSION, read_engine_toml
from pagoda.models.spec import ModelSpec, read_json, spec_from_json

MARK = "pagoda_workspace"  # key of model.json that holds the version


@dataclass(frozen=True)
class Workspace:
    """An open workspace. `settings`: EngineConfig fields from engine.toml, `tp` among them. `packed`: the number format
    (torch's name) for which its weights are packed for CPUs; None where they are canonical."""

    spec: ModelSpec
    settings: dict[str, Any]
    template: str | None
    packed: str | None = None


def rank_file(folder: Path, rank: int, size: int) -> Path:
    """Where one rank's tensors lie."""
    return folder / "weights" / f"rank-{rank}-of-{size}.safetensors"


def kv_ranges_file(folder: Path) -> Path:
    """Where `kv_qparams` leaves the ranges of an int8 cache."""
    return folder / "weights" / "kv-ranges.safetensors"


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
    spec = spec_from_json(model.get("spec") or {})
    return Workspace(spec, settings, model.get("template"), model.get("packed"))


def remembered_template(folder: Path) -> str | None:
    """The chat template's name that was given to `convert`; None for checkpoints and where none was given."""
    return open_workspace(folder).template if is_workspace(folder) else None
