"""Where weights come from: a checkpoint folder (safetensors, or `.bin` on request), or a seeded random generator.

Every source has the same face: `names` and `get(name)`. Files are opened once and read lazily. Paths never leave the
checkpoint's folder; only the hub cache's own layout (`snapshots/REV/file` -> `blobs/HASH`) may point outside.
"""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pagoda.errors import CheckpointError
from pagoda.models.safetensors_file import SafetensorsFile
from pagoda.models.spec import read_json


class TensorSource(Protocol):
    """Tensors by the checkpoint's own names."""

    names: frozenset[str]

    def get(self, name: str) -> Tensor: ...


class SafetensorsFolder:
    """`model.safetensors`, else the files of `model.safetensors.index.json`, else the only `*.safetensors` there is."""

    def __init__(self, folder: Path):
        files = _weight_files(folder, "model.safetensors")
        if not files:
            loose = sorted(folder.glob("*.safetensors"))
            files = [_inside(folder, loose[0].name)] if len(loose) == 1 else []
        if not files:
            bins = sorted(p.name for p in folder.glob("*.bin"))
            why = (
                f"has only pickled weights ({bins[0]}): pass --load-format bin" if bins else "has no model.safetensors"
            )
            raise CheckpointError(f"{folder} {why}, or give another checkpoint.")
        self._files: dict[str, SafetensorsFile] = {}
        for path in files:
            file = SafetensorsFile(path)
            twice = file.names & self._files.keys()
            if twice:
                raise CheckpointError(f"{path} repeats the tensor {min(twice)} of another file: download it again.")
            self._files.update(dict.fromkeys(file.names, file))
        self.names = frozenset(self._files)

    def get(self, name: str) -> Tensor:
        return self._files[name].get(name)


class BinFolder:
    """`pytorch_model.bin`, or its shards; unpickled with `weights_only=True`, mapped where the file allows it."""

    def __init__(self, folder: Path):
        self._tensors: dict[str, Tensor] = {}
        files = _weight_files(folder, "pytorch_model.bin")
        if not files:
            raise CheckpointError(f"{folder} has no pytorch_model.bin: leave --load-format at safetensors.")
        for path in files:
            try:
                loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as e:  # torch raises many kinds for damaged or forbidden files
                raise CheckpointError(f"{path} cannot be loaded as plain tensors ({type(e).__name__}).") from None
            if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
                raise CheckpointError(f"{path} does not hold a dict of tensors: give another checkpoint.")
            self._tensors.update(loaded)
        self.names = frozenset(self._tensors)

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class RandomTensors:
    """Dummy weights: each tensor from a generator seeded by its name, so that every rank sees the same model.

    Gains are 1; matrices are normal with variance 1 / inputs, which keeps activations of order 1."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device):
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self.names = frozenset(shapes)

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1 and name.endswith(".weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        std = 1 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.02
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0, std, generator=generator)


def _weight_files(folder: Path, single: str) -> list[Path]:
    """The single file, or the files that its index names, in order; empty when neither is there."""
    if (folder / single).exists():
        return [_inside(folder, single)]
    index = folder / f"{single}.index.json"
    if not index.exists():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    return [_inside(folder, name) for name in sorted(set(weight_map.values()))]


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder; refuses names and links that lead elsewhere."""
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(
            f"{folder} names a weight file {name!r} outside of itself: download the checkpoint again."
        )
    if not path.exists():
        raise CheckpointError(f"{folder} lacks the weight file {name}: download the rest of the checkpoint.")
    home, real = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise CheckpointError(f"{path} is a link to {real}, outside of its folder: put the file itself there.")
    return path
