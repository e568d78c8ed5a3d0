"""The ranks that run the engine's steps. Each runs the same `Runner` on the same `Schedule`."""

from typing import Protocol

import numpy as np

from pagoda.engine.kv_cache import MemoryPlan
from pagoda.engine.runner import Runner
from pagoda.engine.schedule import Schedule, StepResult


class Workers(Protocol):
    """What the engine's loop needs of its ranks. Steps are collected in the order in which they were launched;
    `run_ahead` says how many may be launched before the oldest is collected. Any failure ends all ranks."""

    plan: MemoryPlan
    run_ahead: int

    def launch(self, schedule: Schedule, mask_LW: np.ndarray | None = None) -> None: ...

    def collect(self) -> StepResult: ...

    def describe(self) -> list[str]: ...

    def close(self) -> None: ...


class OwnWorker:
    """One rank, in the engine's own thread."""

    def __init__(self, runner: Runner):
        self._runner = runner
        runner.start()
        self.plan = runner.plan
        # A CPU computes a step while it is launched: to run ahead would only waste rows.
        self.run_ahead = 1 if runner.device.type == "cuda" else 0

    def launch(self, schedule: Schedule, mask_LW: np.ndarray | None = None) -> None:
        self._runner.launch(schedule, mask_LW)

    def collect(self) -> StepResult:
        return self._runner.collect()

    def describe(self) -> list[str]:
        return [self._runner.executor.describe(), *self.plan.lines()]

    def close(self) -> None:
        self._runner.close()
