"""A checkpoint's tensors as one rank needs them: canonical names, fused, cut for the rank, one at a time.

This is the road both of loading and of converting: the loader packs what comes out, `convert` writes it down.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError
from pagoda.layers.schemes import SCHEMES, Tensors
from pagoda.models.checkpoint import BinFolder, RandomTensors, SafetensorsFolder, TensorSource
from pagoda.models.families import LEFTOVER
from pagoda.models.layout import (
    Part,
    Piece,
    gate_up_parts,
    gate_up_pieces,
    layer_name,
    qkv_parts,
    qkv_pieces,
    take_matrix,
    take_rows,
    vocab_pieces,
)
from pagoda.models.spec import ModelSpec

LAYER_ROLES = {"attention.w_qkv": "qkv", "attention.wo": "o", "ffn.w_gate_up": "gate_up", "ffn.w_down": "down"}
"""The matrices of a layer by their canonical names."""
BAICHUAN2_VOCAB = 125696  # the vocabulary that tells Baichuan 2 from 1


@dataclass(frozen=True)
class LocalMatrix:
    """One canonical matrix of this rank. `in_features`: K of the activations that it multiplies."""

    name: str
    role: str
    scheme: str
    tensors: Tensors
    bias: Tensor | None
    in_features: int


@dataclass(frozen=True)
class LocalTensor:
    """The embedding, or the gain of a norm (float32)."""

    name: str
    tensor: Tensor


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a dense checkpoint of this spec, by the checkpoint's names."""
    names, C = spec.row.names, spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{names.embed}.weight": (spec.vocab_size, C), f"{names.norm}.weight": (C,)}
    if not spec.tied_embeddings:
        shapes[f"{names.head}.weight"] = (spec.vocab_size, C)
    for layer in range(spec.num_layers):
        for module, n, k, bias in _modules(spec, layer):
            shapes[f"{module}.weight"] = (n, k)
            if bias:
                shapes[f"{module}.bias"] = (n,)
        shapes.update({f"{layer_name(spec, layer, n)}.weight": (size,) for _, n, size in layer_gains(spec)})
    return shapes


def _modules(spec: ModelSpec, layer: int) -> Iterator[tuple[str, int, int, bool]]:
    """(module, rows, inputs, has a bias) of a layer's linear modules."""
    names, C = spec.row.names, spec.hidden_size
    for part in qkv_parts(spec, layer):
        yield part.module, part.rows, C, spec.qkv_bias
    yield layer_name(spec, layer, names.o), C, spec.num_heads * spec.head_dim, spec.o_bias
    for part in gate_up_parts(spec, layer):
        yield part.module, part.rows, C, spec.mlp_bias
    yield layer_name(spec, layer, names.down), C, spec.ffn_size, spec.mlp_bias


def layer_gains(spec: ModelSpec) -> list[tuple[str, str, int]]:
    """(canonical name, checkpoint's name, size) of a layer's norms."""
    names, C = spec.row.names, spec.hidden_size
    gains = [("attention_norm", names.attention_norm, C), ("ffn_norm", names.ffn_norm, C)]
    if spec.qk_norm:
        gains += [("attention.q_norm", names.q_norm, spec.head_dim), ("attention.k_norm", names.k_norm, spec.head_dim)]
    if spec.post_norms:
        gains += [("attention_post_norm", names.attention_post_norm, C), ("ffn_post_norm", names.ffn_post_norm, C)]
    return gains


def stored_quantized(spec: ModelSpec, module: str) -> bool:
    """Whether the checkpoint itself holds this module in quantized form."""
    return spec.quant is not None and spec.quant.method != "online" and spec.quant.covers(module)


class LocalWeights:
    """Iterating gives every LocalMatrix and LocalTensor of rank `rank` of `size`, layer by layer. Names and shapes are
    checked before the first one: CheckpointError names what is missing or left over."""

    def __init__(self, spec: ModelSpec, source: TensorSource, rank: int, size: int, device: torch.device):
        self.spec, self.source, self.device = spec, source, device
        self.shape = spec.shard(rank, size)
        self._suffixes: dict[str, list[str]] = {}
        for name in source.names:
            module, _, suffix = name.rpartition(".")
            self._suffixes.setdefault(module, []).append(suffix)
        self._check_names()

    def _check_names(self) -> None:
        wanted: set[str] = set()
        missing: list[str] = []
        for name in expected_shapes(self.spec):
            module, _, suffix = name.rpartition(".")
            if suffix == "weight" and stored_quantized(self.spec, module) and self._is_linear(module):
                parts = [f"{module}.{s}" for s in self._suffixes.get(module, []) if s != "bias"]
                wanted.update(parts)
                missing += [] if parts else [f"{module}.*"]
            else:
                wanted.add(name)
                missing += [] if name in self.source.names else [name]
        if missing:
            raise CheckpointError(f"The checkpoint lacks {_few(missing)}: download the rest of it.")
        extra = sorted(n for n in self.source.names - wanted if not self._harmless(n))
        if extra:
            raise CheckpointError(
                f"The checkpoint has tensors that {self.spec.architecture} does not use, {_few(extra)}: "
                "its config.json does not describe it."
            )

    def _is_linear(self, module: str) -> bool:
        """Quantization covers the layers' matrices only: neither norms nor embedding nor head."""
        prefix = self.spec.row.names.layer.split("{")[0]
        norms = {name.split(".")[-1] for _, name, _ in layer_gains(self.spec)}
        return module.startswith(prefix) and module.split(".")[-1] not in norms

    def _harmless(self, name: str) -> bool:
        """Rotary tables, the copy of a tied head, and the zero biases that GPTQ writers add."""
        if LEFTOVER.search(name) or (self.spec.tied_embeddings and name == f"{self.spec.row.names.head}.weight"):
            return True
        return self.spec.quant is not None and name.endswith(".bias") and not self.source.get(name).any()

    def __len__(self) -> int:
        """How many items iteration gives."""
        return self.spec.num_layers * (4 + len(layer_gains(self.spec))) + 2 + (not self.spec.tied_embeddings)

    def __iter__(self) -> Iterator[LocalMatrix | LocalTensor]:
        spec, names = self.spec, self.spec.row.names
        embed = self._take(f"{names.embed}.weight", (spec.vocab_size, spec.hidden_size))
        yield LocalTensor("embed.weight", take_rows([embed], vocab_pieces(self.shape), self.device))
        for layer in range(spec.num_layers):
            yield from self.layer(layer)
        yield LocalTensor("norm.weight", self._gain(names.norm, spec.hidden_size))
        if not spec.tied_embeddings:
            yield self._head()

    def layer(self, layer: int) -> Iterator[LocalMatrix | LocalTensor]:
        """The items of one layer."""
        spec, shape = self.spec, self.shape
        for name, theirs, size in layer_gains(spec):
            yield LocalTensor(f"layers.{layer}.{name}.weight", self._gain(layer_name(spec, layer, theirs), size))
        prefix, C = f"layers.{layer}.", spec.hidden_size
        qkv, gate_up = qkv_parts(spec, layer), gate_up_parts(spec, layer)
        yield self._columns(prefix + "attention.w_qkv", "qkv", qkv, qkv_pieces(spec, shape), spec.qkv_bias)
        o = layer_name(spec, layer, spec.row.names.o)
        heads = spec.num_heads * spec.head_dim, shape.num_heads * spec.head_dim
        yield self._rows(prefix + "attention.wo", "o", Part(o, C), *heads, spec.o_bias)
        yield self._columns(prefix + "ffn.w_gate_up", "gate_up", gate_up, gate_up_pieces(spec, shape), spec.mlp_bias)
        down = layer_name(spec, layer, spec.row.names.down)
        yield self._rows(prefix + "ffn.w_down", "down", Part(down, C), spec.ffn_size, shape.ffn_size, spec.mlp_bias)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.source.get(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"The tensor {name} has the shape {list(tensor.shape)} where config.json calls for {list(shape)}: "
                "the two do not belong together."
            )
        return tensor

    def _gain(self, module: str, size: int) -> Tensor:
        gain = self._take(f"{module}.weight", (size,)).to(self.device).float()
        return gain + 1 if self.spec.row.gemma else gain

    def _head(self) -> LocalMatrix:
        spec = self.spec
        head = self._take(f"{spec.row.names.head}.weight", (spec.vocab_size, spec.hidden_size))
        rows = take_rows([head], vocab_pieces(self.shape), self.device)
        if spec.row.normalised_head and spec.vocab_size == BAICHUAN2_VOCAB:
            rows = F.normalize(rows.float(), dim=1).to(rows.dtype)
        return LocalMatrix("head", "head", "dense", {"weight": rows}, None, spec.hidden_size)

    def _part(self, part: Part, k: int) -> tuple[str, Tensors]:
        """(scheme, canonical tensors) of one module, whole."""
        quant = self.spec.quant
        if not stored_quantized(self.spec, part.module):
            weight = self._take(f"{part.module}.weight", (part.rows, k))
            if quant is None or not quant.covers(part.module):
                return "dense", {"weight": weight}
            return quant.scheme, self._quantize(weight)
        assert quant is not None
        suffixes = [s for s in self._suffixes[part.module] if s != "bias"]
        foreign = {s: self.source.get(f"{part.module}.{s}").to(self.device) for s in suffixes}
        canonical = SCHEMES[quant.scheme]().load(foreign, quant)
        rows = canonical["qweight"].shape[0]
        if rows != part.rows:
            raise CheckpointError(f"The matrix {part.module} has {rows} rows where config.json calls for {part.rows}.")
        return quant.scheme, canonical

    def _quantize(self, weight_NK: Tensor) -> Tensors:
        """Round to nearest on the device, in the largest groups that divide K."""
        assert self.spec.quant is not None
        group = next((g for g in (128, 64, 32) if weight_NK.shape[1] % g == 0), 32)
        return SCHEMES[self.spec.quant.scheme]().quantize(weight_NK.to(self.device), group)

    def _columns(self, name: str, role: str, parts: list[Part], pieces: list[Piece], bias: bool) -> LocalMatrix:
        """A column parallel matrix: the rank's rows of its parts."""
        k = self.spec.hidden_size
        loaded = [self._part(part, k) for part in parts]
        schemes = {scheme for scheme, _ in loaded}
        if len(schemes) > 1:
            raise CheckpointError(
                f"{parts[0].module} and its siblings are not quantized alike, so they cannot be fused."
            )
        scheme = schemes.pop()
        tensors = take_matrix(scheme, [canonical for _, canonical in loaded], pieces, self.device)
        rows = None
        if bias:
            rows = take_rows([self._take(f"{p.module}.bias", (p.rows,)) for p in parts], pieces, self.device)
        return LocalMatrix(name, role, scheme, tensors, rows, k)

    def _rows(self, name: str, role: str, part: Part, k: int, local_k: int, bias: bool) -> LocalMatrix:
        """A row parallel matrix: the rank's inputs. Its bias is whole on rank 0 and absent elsewhere, so that the sum
        over the ranks holds it once."""
        rank, size = self.shape.rank, self.shape.size
        quant = self.spec.quant
        if size > 1 and local_k % 32 and quant is not None and quant.method == "online" and quant.scheme == "int4":
            weight = {"weight": self._take(f"{part.module}.weight", (part.rows, k))}  # no group would end at the cut
            weight = SCHEMES["dense"]().shard(weight, role, rank, size, local_k)
            scheme, canonical = quant.scheme, self._quantize(weight["weight"])
        else:
            scheme, canonical = self._part(part, k)
            canonical = SCHEMES[scheme]().shard(canonical, role, rank, size, local_k) if size > 1 else canonical
        tensors = {key: t.to(self.device) for key, t in canonical.items()}
        whole = self._take(f"{part.module}.bias", (part.rows,)).to(self.device) if bias and rank == 0 else None
        return LocalMatrix(name, role, scheme, tensors, whole, local_k)


def open_weights(
    folder: Path, spec: ModelSpec, config: EngineConfig, rank: int, size: int, device: torch.device
) -> LocalWeights:
    """A rank's weights of a checkpoint folder, read as `config.load_format` says. Dummy weights are made dense and
    rounded by us where the spec is quantized."""
    if config.load_format == "dummy":
        if spec.quant is not None:
            spec = dataclasses.replace(spec, quant=dataclasses.replace(spec.quant, method="online"))
        source: TensorSource = RandomTensors(expected_shapes(spec), getattr(torch, spec.dtype), device)
    else:
        source = BinFolder(folder) if config.load_format == "bin" else SafetensorsFolder(folder)
    return LocalWeights(spec, source, rank, size, device)


def _few(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
