"""Tensor parallel over Ray: every rank is an actor of one placement group, on one machine or several.

The engine's own process holds no weights: it sends each step to all ranks and reads rank 0's tokens. What travels are
bytes of our own messages; a rank that is gone or silent ends them all, as with local processes.
"""

import contextlib
import json
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pagoda.config import EngineConfig
from pagoda.engine import rank_link as say
from pagoda.engine.kv_cache import MemoryPlan
from pagoda.engine.ranks import divided
from pagoda.engine.schedule import Schedule, StepResult
from pagoda.errors import DeviceError, EngineDeadError, MissingExtraError, PagodaError, named_error
from pagoda.log import get_logger
from pagoda.models.spec import ModelSpec

PLACE_SECONDS = 120.0
PING_SECONDS = 1.0

log = get_logger(__name__)


def connect_ray() -> Any:
    """The module `ray`, connected to the cluster that RAY_ADDRESS or this machine knows, else to one of its own."""
    try:
        import ray
    except ImportError:
        raise MissingExtraError("Ray is not installed: run `pip install 'pagoda-llm[ray]'`.") from None
    if not ray.is_initialized():
        quiet = {"log_to_driver": True, "logging_level": "WARNING", "configure_logging": False}
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
        except ConnectionError:
            ray.init(include_dashboard=False, **quiet)
    return ray


class RankActor:
    """One rank as an actor. Its methods take and give plain data."""

    def __init__(self, rank: int, model: str, config: dict[str, Any]):
        self._rank, self._folder, self._config = rank, Path(model), EngineConfig.from_mapping(config)
        self._flights: deque[Schedule] = deque()

    def ping(self) -> None:
        """Answered by a thread of its own."""

    def address(self) -> tuple[str, int]:
        """This machine's address in the cluster, and a port that is free there now."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def load(self, meeting: str) -> bytes:
        """Join the others and load this rank's part; the plan and what runs, or the error, as JSON."""
        import torch

        from pagoda.engine.runner import Runner
        from pagoda.layers.parallel import Group
        from pagoda.models.loader import resolve_spec

        try:
            spec, config = resolve_spec(self._folder, self._config)
            device = torch.device("cuda", 0) if config.device == "cuda" else torch.device("cpu")
            group = Group.join(self._rank, config.tp, meeting, device)
            self._runner = Runner(self._folder, spec, config, group, device=device)
            self._runner.start()
        except PagodaError as error:
            return json.dumps({"error": (type(error).__name__, str(error))}).encode()
        runs = [self._runner.executor.describe(), group.describe()]
        return json.dumps({"plan": vars(self._runner.plan), "runs": runs}).encode()

    def launch(self, step: bytes) -> None:
        """Start a step. Ranks other than 0 drop their tokens, which are the same."""
        message = msgspec.msgpack.decode(step, type=say.Step)
        self._runner.launch(message.schedule, message.mask_LW())
        if self._rank:
            self._flights.append(message.schedule)
            if len(self._flights) > self._runner.run_ahead:
                self._flights.popleft()
                self._runner.collect()

    def collect(self) -> bytes:
        """The tokens of the oldest step that was launched."""
        return msgspec.msgpack.encode(self._runner.collect())


class RayRanks:
    """All ranks as actors, behind the face of `Workers`."""

    def __init__(
        self, folder: Path, spec: ModelSpec, config: EngineConfig, progress: Callable[[float], None] | None = None
    ):
        self._ray = connect_ray()
        on_gpu = self._on_gpu(config)
        config = divided(spec, config).replace(device="cuda" if on_gpu else "cpu")
        self.run_ahead = 1 if on_gpu else 0
        self._fate: EngineDeadError | None = None
        self._fate_known, self._closing = threading.Event(), threading.Event()
        self._flights: deque[Any] = deque()
        self._actors: list[Any] = []
        self._group = self._place(config, on_gpu)
        try:
            self._actors = [self._start(rank, folder, config, on_gpu) for rank in range(config.tp)]
            self._watch = threading.Thread(target=self._watch_ranks, name="pagoda-ray", daemon=True)
            host, port = self._get(self._actors[0].address.remote(), PLACE_SECONDS)
            self._watch.start()
            loads = [actor.load.remote(f"tcp://{host}:{port}") for actor in self._actors]
            loaded = [json.loads(self._get(load)) for load in loads]
            for fact in loaded:
                if "error" in fact:
                    raise named_error(*fact["error"])
        except BaseException:
            self.close()
            raise
        self.plan = MemoryPlan(**{**loaded[0]["plan"], "notes": tuple(loaded[0]["plan"]["notes"])})
        self._runs = loaded[0]["runs"]
        if progress is not None:
            progress(1.0)

    def launch(self, schedule: Schedule, mask_LW: np.ndarray | None = None) -> None:
        data = msgspec.msgpack.encode(say.Step.of(schedule, mask_LW))
        for actor in self._actors:
            actor.launch.remote(data)
        self._flights.append(self._actors[0].collect.remote())

    def collect(self) -> StepResult:
        return msgspec.msgpack.decode(self._get(self._flights.popleft()), type=StepResult)

    def describe(self) -> list[str]:
        runs, sums = self._runs
        return [f"{len(self._actors)} ranks on Ray: {runs}", sums, *self.plan.lines()]

    def close(self) -> None:
        """End all ranks and give their places back. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._kill()
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._ray.util.remove_placement_group(self._group)

    def _on_gpu(self, config: EngineConfig) -> bool:
        count = int(self._ray.cluster_resources().get("GPU", 0))
        if config.device.startswith("cuda") and count < config.tp:
            raise DeviceError(f"tp {config.tp} needs {config.tp} GPUs, this Ray cluster has {count}: lower --tp.")
        return config.device != "cpu" and count >= config.tp

    def _place(self, config: EngineConfig, on_gpu: bool) -> Any:
        """Places for all ranks, near each other where possible; waits for them."""
        bundle = {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": 1.0}
        group = self._ray.util.placement_group([bundle] * config.tp, strategy="PACK")
        try:
            self._ray.get(group.ready(), timeout=PLACE_SECONDS)
        except self._ray.exceptions.GetTimeoutError:
            self._ray.util.remove_placement_group(group)
            free = self._ray.available_resources()
            free = f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free"
            raise DeviceError(
                f"Ray found no place for {config.tp} ranks within {PLACE_SECONDS:.0f} s ({free}): "
                "add machines or lower --tp."
            ) from None
        return group

    def _start(self, rank: int, folder: Path, config: EngineConfig, on_gpu: bool) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options = {
            "num_cpus": 1, "num_gpus": 1 if on_gpu else 0, "concurrency_groups": {"life": 1}, "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
        }  # fmt: skip
        actor = self._ray.remote(**options)(RankActor)
        return actor.remote(rank, str(folder), dict(vars(config)))

    def _get(self, ref: Any, timeout: float | None = None) -> Any:
        """The value of a task; `EngineDeadError` when its rank is lost or fails, or the watch has found one that is."""
        errors, waited = self._ray.exceptions, 0.0
        while True:
            try:
                return self._ray.get(ref, timeout=PING_SECONDS)
            except errors.GetTimeoutError:
                waited += PING_SECONDS
                if self._fate is None and (timeout is None or waited < timeout):
                    continue
                raise self._fate or EngineDeadError(f"A rank did not answer within {waited:.0f} s.") from None
            except errors.RayError as error:
                self._fate_known.wait(2 * PING_SECONDS)  # the watch knows which rank, and this may be an echo only
                reason = str(error).strip().split("\n")[-1][:200]
                raise self._fate or EngineDeadError(f"A rank on Ray failed ({reason}): all ranks end.") from None

    def _watch_ranks(self) -> None:
        patience = say.PATIENCE_STARTING
        while not self._closing.wait(PING_SECONDS):
            patience = say.PATIENCE_RUNNING if self._flights else patience
            for rank, actor in enumerate(self._actors):
                why = ""
                try:
                    ping = actor.ping.options(concurrency_group="life").remote()
                    self._ray.get(ping, timeout=patience)
                except self._ray.exceptions.GetTimeoutError:
                    why = f"gave no sign of life for {patience:.0f} s"
                except self._ray.exceptions.RayError as error:
                    why = f"ended unexpectedly ({type(error).__name__})"
                if why and not self._closing.is_set():
                    self._fate = EngineDeadError(f"Rank {rank} of {len(self._actors)} {why}: all ranks end with it.")
                    self._fate_known.set()
                    log.error(str(self._fate))
                    return self._kill()

    def _kill(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # it is gone already
                self._ray.kill(actor)
