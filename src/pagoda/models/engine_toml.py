"""`engine.toml`: the engine's settings of a workspace, for a person to edit, under the names that users know."""

import dataclasses
from pathlib import Path
from typing import Any

from pagoda.config import EngineConfig, parse_quant_policy
from pagoda.errors import ConfigError, WorkspaceError
from pagoda.log import get_logger
from pagoda.toml_data import tomllib

log = get_logger(__name__)

VERSION = 2
SETTINGS = ("session_len", "max_batch_size", "cache_max_entry_count", "cache_block_seq_len", "quant_policy",
            "rope_scaling_factor", "use_logn_attn")  # fmt: skip
"""Fields of EngineConfig; `tensor_para_size` stands beside them and is not to be edited."""

OLD_POLICY = {0: "none", 4: "int8"}  # what numbers meant in version 1


def write_engine_toml(path: Path, config: EngineConfig, tp: int) -> None:
    """All settings with their help as comments; those left to the model are commented out."""
    fields = {f.name: f for f in dataclasses.fields(EngineConfig)}
    lines = [
        "# Settings of the engine for this workspace. Flags on the command line win over them.",
        f"version = {VERSION}",
        "",
        "# devices the weights are cut for; to change it convert again",
        f"tensor_para_size = {tp}",
    ]
    for name in SETTINGS:
        value = getattr(config, name)
        lines += ["", f"# {fields[name].metadata['help']}"]
        lines.append(f"# {name} =" if value is None else f"{name} = {_literal(value)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def read_engine_toml(path: Path) -> dict[str, Any]:
    """Settings by EngineConfig's names, checked, `tp` among them. Raises WorkspaceError for a damaged file, an unknown
    name, a value out of range or a newer version."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkspaceError(f"{path} does not exist: convert the checkpoint again.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise WorkspaceError(f"{path} cannot be read ({e}): mend that line, or convert the checkpoint again.") from None
    version = values.pop("version", None)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise WorkspaceError(
            f"{path} is of version {version!r}, this Pagoda reads up to {VERSION}: update Pagoda, or convert again."
        )
    policy = values.get("quant_policy")
    if isinstance(policy, int) and not isinstance(policy, bool):
        name = OLD_POLICY.get(policy) if version == 1 else None
        values["quant_policy"] = name = name or _policy_name(path, policy)
        log.warning("%s: quant_policy %s of version %s means %s; write the name.", path, policy, version, name)
    tp = values.pop("tensor_para_size", None)
    unknown = sorted(set(values) - set(SETTINGS))
    if unknown:
        raise WorkspaceError(f"{path} has unknown settings {', '.join(unknown)}: it knows {', '.join(SETTINGS)}.")
    settings = values | {"tp": tp}
    try:
        checked = EngineConfig.from_mapping(settings)
    except ConfigError as e:
        raise WorkspaceError(f"{path}: {e}") from None
    return {name: getattr(checked, name) for name in settings}


def _policy_name(path: Path, number: int) -> str:
    try:
        return parse_quant_policy(number)
    except ConfigError as e:
        raise WorkspaceError(f"{path}: {e}") from None
