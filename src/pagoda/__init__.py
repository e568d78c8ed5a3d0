"""Pagoda compresses, deploys and serves large language models.

Everything public is reachable from here and loaded on first use, so that `import pagoda` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagoda.config import EngineConfig, GenerationConfig, ServeConfig
    from pagoda.errors import PagodaError
    from pagoda.offline import Pipeline, Reply, Session, pipeline

    TurbomindEngineConfig = EngineConfig

__version__ = "0.1.0"

_HOMES = {
    "EngineConfig": "pagoda.config",
    "TurbomindEngineConfig": "pagoda.config",
    "GenerationConfig": "pagoda.config",
    "ServeConfig": "pagoda.config",
    "PagodaError": "pagoda.errors",
    "Pipeline": "pagoda.offline",
    "Reply": "pagoda.offline",
    "Session": "pagoda.offline",
    "pipeline": "pagoda.offline",
}

__all__ = [
    "EngineConfig",
    "GenerationConfig",
    "PagodaError",
    "Pipeline",
    "Reply",
    "ServeConfig",
    "Session",
    "TurbomindEngineConfig",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagoda' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
