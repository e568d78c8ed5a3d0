"""Quantized layers as ordinary checkpoints (AWQ, GPTQ, compressed-tensors), written shard by shard, resumable.

A shard holds one layer and appears under its name when it is complete; the index comes last. Formats: see
`layers.schemes.int4_formats`; int8 and float8 matrices are `weight` with `weight_scale` [N, 1] (and `input_scale`).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.errors import UsageError
from pagoda.layers.schemes import Tensors
from pagoda.layers.schemes.int4 import nibbles
from pagoda.layers.schemes.int4_formats import AWQ_ORDER, pack_words
from pagoda.models.checkpoint import TensorSource
from pagoda.models.convert import copy_text
from pagoda.models.layout import (
    NOT_BY_ROWS,
    Part,
    Piece,
    gate_up_parts,
    gate_up_pieces,
    layer_name,
    qkv_parts,
    qkv_pieces,
)
from pagoda.models.local_weights import LocalWeights, expected_shapes, layer_gains
from pagoda.models.quant_config import parse_quant
from pagoda.models.safetensors_file import SafetensorsFile, write_tensors
from pagoda.models.spec import ModelSpec, read_json
from pagoda.quantize.recipe import Recipe
from pagoda.quantize.walk import Layer

STATE = "quantize_state.json"  # stands in the folder until it is complete


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """The entry of config.json that tells other engines what the checkpoint holds."""
    if recipe.format == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": recipe.group, "zero_point": True, "version": "gemm"}
    if recipe.format == "gptq":
        order = {"desc_act": recipe.act_order, "static_groups": False, "true_sequential": False}
        fixed = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq", "lm_head": False}
        return fixed | {"group_size": recipe.group, "damp_percent": 0.01} | order
    kind, layout = ("int", "int-quantized") if recipe.method == "smooth" else ("float", "float-quantized")
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = weights | {"strategy": "tensor" if recipe.static else "token", "dynamic": not recipe.static}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": layout}},
        "ignore": ["lm_head"],
    }


def foreign_layer(spec: ModelSpec, layer: Layer, recipe: Recipe) -> dict[str, Tensor]:
    """A quantized layer's tensors by the checkpoint's names."""
    out: dict[str, Tensor] = {}
    dtype = getattr(torch, spec.dtype)
    offset = 1.0 if spec.row.gemma else 0.0
    for ours, theirs, _ in layer_gains(spec):
        out[f"{layer_name(spec, layer.index, theirs)}.weight"] = (layer.gains[ours] - offset).to(dtype)
    for role, (parts, pieces) in places(spec, layer.index).items():
        _, tensors = layer.matrices[role]
        for i, part in enumerate(parts):
            mine = {k: t if k in NOT_BY_ROWS else part_rows(t, i, part.rows, pieces) for k, t in tensors.items()}
            for suffix, tensor in FORMATS[recipe.format](mine, recipe).items():
                out[f"{part.module}.{suffix}"] = tensor.contiguous()
            bias = layer.biases.get(role)
            if bias is not None:
                out[f"{part.module}.bias"] = part_rows(bias, i, part.rows, pieces).to(dtype)
    return out


def places(spec: ModelSpec, index: int) -> dict[str, tuple[list[Part], list[Piece]]]:
    """Role -> (the checkpoint's modules, where the canonical rows lie in them)."""
    names, C, whole = spec.row.names, spec.hidden_size, spec.shard(0, 1)
    return {
        "qkv": (qkv_parts(spec, index), qkv_pieces(spec, whole)),
        "o": ([Part(layer_name(spec, index, names.o), C)], [Piece(0, 0, C)]),
        "gate_up": (gate_up_parts(spec, index), gate_up_pieces(spec, whole)),
        "down": ([Part(layer_name(spec, index, names.down), C)], [Piece(0, 0, C)]),
    }


def part_rows(canonical: Tensor, part: int, rows: int, pieces: list[Piece]) -> Tensor:
    """The rows of one module out of the canonical order: the inverse of `take_rows`."""
    out, at = torch.empty(rows, *canonical.shape[1:], dtype=canonical.dtype, device=canonical.device), 0
    for piece in pieces:
        if piece.part == part:
            out[piece.start : piece.start + piece.rows] = canonical[at : at + piece.rows]
        at += piece.rows
    return out


def _awq(canonical: Tensors, recipe: Recipe) -> Tensors:
    return {
        "qweight": pack_words(nibbles(canonical["qweight"]).t(), 1, AWQ_ORDER),
        "qzeros": pack_words(canonical["zeros"].t(), 1, AWQ_ORDER),
        "scales": canonical["scales"].t(),
    }


def _gptq(canonical: Tensors, recipe: Recipe) -> Tensors:
    q_NK = nibbles(canonical["qweight"])
    g_idx = torch.arange(q_NK.shape[1], dtype=torch.int32, device=q_NK.device) // recipe.group
    if "perm" in canonical:
        back = torch.argsort(canonical["perm"])
        q_NK, g_idx = q_NK[:, back], g_idx[back]
    return {
        "qweight": pack_words(q_NK.t(), 0),
        "qzeros": pack_words((canonical["zeros"] - 1).t(), 1),
        "scales": canonical["scales"].t(),
        "g_idx": g_idx,
    }


def _eight_bit(canonical: Tensors, recipe: Recipe) -> Tensors:
    out = {"weight": canonical["qweight"], "weight_scale": canonical["scales"][:, None]}
    return out | ({"input_scale": canonical["input_scale"].view(1)} if "input_scale" in canonical else {})


FORMATS: dict[str, Callable[[Tensors, Recipe], Tensors]] = {
    "awq": _awq, "gptq": _gptq, "compressed-tensors": _eight_bit,
}  # fmt: skip


class Draft:
    """A checkpoint folder on its way. `errors`: by layer, of the layers that are there already."""

    def __init__(self, model: Path, folder: Path, spec: ModelSpec, recipe: Recipe, settings: dict[str, Any]):
        self.folder, self.spec, self.recipe = folder, spec, recipe
        self._state = {"source": str(model.resolve()), **recipe.settings(), **settings}
        self.errors: list[dict[str, float]] = []
        if (folder / STATE).is_file():
            kept = read_json(folder / STATE)
            self.errors = kept.pop("errors", [])
            if kept != self._state:
                raise UsageError(
                    f"{folder} holds an unfinished run with other settings: remove it, or choose another --work-dir."
                )
        elif folder.exists() and any(folder.glob("*.safetensors")):
            raise UsageError(f"{folder} holds a model already: choose another --work-dir, or remove it.")
        folder.mkdir(parents=True, exist_ok=True)
        copy_text(model, folder)
        config = read_json(model / "config.json") | {"quantization_config": quantization_config(recipe)}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def shard(self, number: int) -> Path:
        """Number num_layers is the last shard: embedding, last norm, head."""
        return self.folder / f"model-{number + 1:05d}-of-{self.spec.num_layers + 1:05d}.safetensors"

    @property
    def num_done(self) -> int:
        return len(self.errors)

    def write_layer(self, layer: Layer, errors: dict[str, float]) -> None:
        self._write(self.shard(layer.index), foreign_layer(self.spec, layer, self.recipe))
        self.errors.append(errors)
        draft = self.folder / f".{STATE}"
        draft.write_text(json.dumps(self._state | {"errors": self.errors}), encoding="utf-8")
        draft.replace(self.folder / STATE)

    def finish(self, source: TensorSource) -> None:
        """Whatever belongs to no layer, as it is, and the index."""
        prefix = self.spec.row.names.layer.split("{")[0]
        rest = {n: source.get(n) for n in expected_shapes(self.spec) if not n.startswith(prefix)}
        self._write(self.shard(self.spec.num_layers), rest)
        shards = {self.shard(i).name: SafetensorsFile(self.shard(i)) for i in range(self.spec.num_layers + 1)}
        weight_map = {name: shard for shard, file in shards.items() for name in sorted(file.names)}
        size = sum((self.folder / shard).stat().st_size for shard in shards)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        (self.folder / STATE).unlink(missing_ok=True)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        draft = path.with_name(f".{path.name}")
        write_tensors(draft, tensors)
        draft.replace(path)

    def written(self, source: TensorSource, device: torch.device) -> LocalWeights:
        """The layers that are there already, in their quantized form."""
        spec, done = self.spec, self.num_done
        prefixes = [spec.row.names.layer.format(i) for i in range(spec.num_layers)]
        quant = parse_quant(quantization_config(self.recipe))
        assert quant is not None
        skip = tuple(f"re:{prefix.replace('.', '[.]')}" for prefix in prefixes[done:])
        spec = dataclasses.replace(spec, quant=dataclasses.replace(quant, skip=skip))
        return LocalWeights(spec, _Overlay(source, [self.shard(i) for i in range(done)], prefixes[:done]), 0, 1, device)


class _Overlay:
    """A `TensorSource`: a checkpoint's tensors, those under `prefixes` replaced by the shards'."""

    def __init__(self, source: TensorSource, shards: list[Path], prefixes: list[str]):
        self._source = source
        self._files = {name: file for file in map(SafetensorsFile, shards) for name in file.names}
        kept = {name for name in source.names if not name.startswith(tuple(prefixes))}
        self.names = frozenset(kept | self._files.keys())

    def get(self, name: str) -> Tensor:
        return self._files[name].get(name) if name in self._files else self._source.get(name)
