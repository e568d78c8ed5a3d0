"""The ranks that run the engine's steps. Each runs the same `Runner` on the same `Schedule`."""

from typing import Protocol

import numpy as np

from pagoda.engine.kv_cache import MemoryPlan
from pagoda.engine.schedule import Schedule, StepResult


class Workers(Protocol):
    """What the engine's loop needs of its ranks. Steps are collected in the order in which they were launched;
    `run_ahead` says how many may be launched before the oldest is collected. Any failure ends all ranks. A `Runner` is
    one by itself, in the engine's own thread."""

    plan: MemoryPlan
    run_ahead: int

    def launch(self, schedule: Schedule, mask_LW: np.ndarray | None = None) -> None: ...

    def collect(self) -> StepResult: ...

    def describe(self) -> list[str]: ...

    def close(self) -> None: ...
