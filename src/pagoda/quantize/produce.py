"""Quantize a checkpoint: layer by layer through the calibration text, out comes a checkpoint folder."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.engine.runner import pick_device
from pagoda.errors import UsageError
from pagoda.models.checkpoint import RandomTensors, SafetensorsFolder, TensorSource
from pagoda.models.find import resolve_model
from pagoda.models.local_weights import LocalWeights, expected_shapes
from pagoda.models.spec import ModelSpec, read_spec
from pagoda.models.workspace import is_workspace
from pagoda.quantize.calibration_text import BUILT_IN, calibration_ids
from pagoda.quantize.export import Draft
from pagoda.quantize.recipe import Recipe, quantize_layer
from pagoda.quantize.statistics import LayerStats
from pagoda.quantize.walk import Streams, Walk, read_layer

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Calibration:
    """Which text, how much of it, and where it is computed."""

    source: str = BUILT_IN
    samples: int = 128
    length: int = 512
    device: str = "auto"


@dataclass(frozen=True)
class Produced:
    """What came of it. `errors`: by layer, the squared error of each matrix's output as a share of the
    original model's."""

    folder: Path
    errors: list[dict[str, float]]
    num_sequences: int
    length: int
    seconds: float


class Source:
    """A dense checkpoint, ready to be walked through. `load_format` dummy: random weights of the config's shapes."""

    def __init__(
        self, model: str, calibration: Calibration, load_format: str = "safetensors", ids: Tensor | None = None
    ):
        self.folder = resolve_model(model)
        if is_workspace(self.folder):
            raise UsageError(f"{model} is a workspace: give the original 16-bit checkpoint.")
        self.spec: ModelSpec = read_spec(self.folder, EngineConfig())
        if self.spec.quant is not None:
            raise UsageError(f"{model} is quantized already ({self.spec.quant.method}): give the 16-bit checkpoint.")
        self.device = pick_device(EngineConfig(device=calibration.device))
        stored = getattr(torch, self.spec.dtype)
        self.dtype = stored if self.device.type == "cuda" else torch.float32
        if load_format == "dummy":
            self.tensors: TensorSource = RandomTensors(expected_shapes(self.spec), stored, self.device)
        else:
            self.tensors = SafetensorsFolder(self.folder)
        self.weights = LocalWeights(self.spec, self.tensors, 0, 1, self.device)
        self._given, self._calibration = ids, calibration

    def ids(self) -> Tensor:
        """int64 [S, L]."""
        if self._given is not None:
            return self._given
        c = self._calibration
        return calibration_ids(self.folder, c.source, c.samples, min(c.length, self.spec.max_position))

    def start(self) -> tuple[Walk, Tensor]:
        """The walk, and the residual stream before the first layer, on the host."""
        ids_SL = self.ids()
        walk = Walk(self.spec, ids_SL.shape[1], self.device, self.dtype)
        embed = self.tensors.get(f"{self.spec.row.names.embed}.weight")
        return walk, walk.embed(embed, ids_SL)


def quantize_model(
    source: Source, work_dir: Path, recipe: Recipe, settings: dict | None = None, progress: Progress | None = None
) -> Produced:
    """Write the quantized checkpoint to `work_dir`; a run that was interrupted goes on where it stopped. `settings`
    identify the run (which text, how much)."""
    started, spec = time.monotonic(), source.spec
    recipe.check(spec)
    draft = Draft(source.folder, work_dir, spec, recipe, settings or {})
    with torch.inference_mode():
        walk, h_SLC = source.start()
        if not recipe.calibrated:
            h_SLC = h_SLC[: walk.rows]  # enough to tell the errors
        written = draft.written(source.tensors, source.device)
        streams = Streams(h_SLC, h_SLC.clone())
        for index in range(draft.num_done):
            walk.advance(read_layer(source.weights, index), streams.original)
            walk.advance(read_layer(written, index), streams.ours)
        for index in range(draft.num_done, spec.num_layers):
            layer = read_layer(source.weights, index)
            quantized, errors = quantize_layer(recipe, walk, layer, streams)
            walk.advance(layer, streams.original)
            walk.advance(quantized, streams.ours)
            draft.write_layer(quantized, errors)
            if progress is not None:
                progress((index + 1) / spec.num_layers)
        draft.finish(source.tensors)
    return Produced(work_dir, draft.errors, *h_SLC.shape[:2], time.monotonic() - started)


def calibrate(source: Source, progress: Progress | None = None) -> dict[str, dict[str, Tensor]]:
    """Statistics as users know them, by file: `inputs_stats` and `outputs_stats` of every matrix's channels (min, max,
    mean, absmax, absmean), `key_stats` and `value_stats` by kv head and channel, as the cache holds them."""
    files: dict[str, dict[str, Tensor]] = {n: {} for n in ("inputs_stats", "outputs_stats", "key_stats", "value_stats")}
    with torch.inference_mode():
        walk, h_SLC = source.start()
        for index in range(source.spec.num_layers):
            layer, stats = read_layer(source.weights, index), LayerStats(outputs=True)
            walk.advance(layer, h_SLC, stats.watch)
            for name, seen in stats.by_name.items():
                file = {"k": "key_stats", "v": "value_stats"}.get(name)
                file = file or ("outputs_stats" if name.endswith(".out") else "inputs_stats")
                where = f"layers.{index}" + ("" if name in ("k", "v") else f".{name.removesuffix('.out')}")
                files[file].update({f"{where}.{key}": t.float().cpu() for key, t in seen.values().items()})
            walk.advance(layer, h_SLC)
            if progress is not None:
                progress((index + 1) / source.spec.num_layers)
    return files
