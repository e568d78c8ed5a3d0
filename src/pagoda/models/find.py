"""Where a model lies: its folder by name, and the folder of its text files. Imports no torch."""

import re
from pathlib import Path

import pagoda
from pagoda.errors import CheckpointError
from pagoda.models.workspace import is_workspace, refuse_old_workspace

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]


def resolve_model(name: str) -> Path:
    """The folder of a model: a checkpoint, a workspace, the bundled model `mini`, else a hub id (downloaded, or found
    in the hub's cache). Raises CheckpointError, or WorkspaceError for a workspace of the old system."""
    path = Path(pagoda.__file__).parent / "mini" if name == "mini" else Path(name).expanduser()
    if path.is_dir():
        refuse_old_workspace(path)
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds config.json and the weights.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"{name} does not exist: give a checkpoint folder, a workspace, a hub id (OWNER/NAME) or mini."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as e:  # the hub's client raises its own, the HTTP library's and the operating system's errors
        reason = str(e).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{name} is neither a folder here nor a model that the hub gave ({type(e).__name__}: {reason}): check the "
            "name and the network, or download it first."
        ) from None


def text_folder(folder: Path) -> Path:
    """Where the tokenizer and the template of a model lie."""
    return folder / "tokenizer" if is_workspace(folder) else folder
