"""TOML, which Python reads by itself from 3.11 on; and the tables that Pagoda keeps in it beside its code."""

from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

__all__ = ["read_table", "tomllib"]


def read_table(room: str, name: str) -> dict[str, Any]:
    """What `name`.toml in the package's folder `room` holds."""
    return tomllib.loads(Path(__file__).with_name(room).joinpath(f"{name}.toml").read_text(encoding="utf-8"))
