"""The forward pass of every model, written down once: a spec and its weights become a flat list of operations.

An operation reads and writes two registers: `h`, the residual stream, and `x`, the value at work. Executors run the
list as it stands or rewrite parts of it into fused operations.
Legend: T tokens of a step, R sequences, B blocks per sequence, L logit rows, C hidden size, D head size, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pagoda.layers.parallel import Group

if TYPE_CHECKING:
    from pagoda.layers.kv_schemes import StaticRanges
    from pagoda.layers.linear import Linear
    from pagoda.models.loader import LayerWeights, ModelWeights
    from pagoda.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Embed:
    """h = weight[token] * scale; `split`: the table is split over the ranks by rows."""

    weight_VC: Tensor
    scale: float
    split: bool


@dataclass(frozen=True, eq=False)
class Norm:
    """x = rms_norm(h)."""

    weight_C: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Project:
    """x = linear(x), summed over the ranks where the role is row parallel."""

    linear: "Linear"


@dataclass(frozen=True, eq=False)
class RopeWrite:
    """x (q, k, v of all heads) -> k and v into the layer's cache, x = q [T, heads, D]; QK norm before, log-n after."""

    layer: int
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class Attend:
    """x = attention of the queries x over the layer's cache, [T, heads * D]; `window` 0: all keys."""

    layer: int
    window: int


@dataclass(frozen=True, eq=False)
class Gate:
    """x = act(first half of x) * second half."""

    act: str


@dataclass(frozen=True, eq=False)
class PostNorm:
    """x = rms_norm(x)."""

    weight_C: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Add:
    """h = h + x."""


@dataclass(frozen=True, eq=False)
class TakeRows:
    """h = the rows of h whose logits are wanted."""


@dataclass(frozen=True, eq=False)
class Head:
    """x = logits of x: float32 over the whole vocabulary on every rank, soft-capped."""

    linear: "Linear"
    vocab_size: int
    softcap: float


Op = Embed | Norm | Project | RopeWrite | Attend | Gate | PostNorm | Add | TakeRows | Head


@dataclass(frozen=True, eq=False)
class StepProgram:
    """`ops` in the order of execution. Head counts are this rank's."""

    ops: tuple[Op, ...]
    spec: "ModelSpec"
    num_heads: int
    num_kv_heads: int
    kv_ranges: "tuple[StaticRanges, ...]" = ()  # of an int8 cache, by layer, where calibration fixed them


@dataclass
class StepInput:
    """The device tensors of one forward. Row r owns tokens query_start[r] to query_start[r+1].

    `decode`: one token a row (T == R). A slot is block * block_len + offset, below 0: not written.
    `logit_row_L` None: all rows in order. `rope_len_T`: see `Rope.angles`. `single_rows`: so many of the first rows are
    known to have one token each. `single_len_R` (int32, `decode` False): where only the device knows how many, the
    kv_len of such rows and 0 for the others; `query_start_R1` then begins with the first of the others.
    `fresh`: last rows that the host knows to begin in this step, see `kernels/library_attention.py`.
    """

    token_T: Tensor  # int64
    position_T: Tensor  # int64
    slot_T: Tensor  # int64
    query_start_R1: Tensor  # int32
    kv_len_R: Tensor  # int32, the new tokens counted
    block_table_RB: Tensor  # int32
    logit_row_L: Tensor | None  # int64, indices into T
    max_query_len: int
    decode: bool
    rope_len_T: Tensor | None = None  # int32
    single_rows: int = 0
    single_len_R: Tensor | None = None
    fresh: tuple[tuple[int, int, int], ...] = ()


def build_program(spec: "ModelSpec", weights: "ModelWeights", group: Group) -> StepProgram:
    """The step of a model whose (this rank's) weights are given."""
    split = group.size > 1 and weights.embed.shape[0] < spec.vocab_size
    scale = torch.tensor(spec.embed_scale, dtype=weights.embed.dtype).item()  # as the checkpoints' own code rounds it
    ops: list[Op] = [Embed(weights.embed, scale, split)]
    for index, layer in enumerate(weights.layers):
        ops += layer_ops(spec, index, layer)
    ops += [TakeRows(), Norm(weights.norm, spec.norm_eps), Head(weights.head, spec.vocab_size, spec.final_softcap)]
    first = weights.layers[0]
    num_heads = first.wo.in_features // spec.head_dim
    num_kv_heads = (first.w_qkv.out_features // spec.head_dim - num_heads) // 2
    return StepProgram(tuple(ops), spec, num_heads, num_kv_heads, weights.kv_ranges)


def layer_ops(spec: "ModelSpec", index: int, layer: "LayerWeights") -> list[Op]:
    """The operations of one layer, from residual stream to residual stream."""
    return _attention(spec, index, layer) + _ffn(spec, layer)


def _attention(spec: "ModelSpec", index: int, layer: "LayerWeights") -> list[Op]:
    ops: list[Op] = [
        Norm(layer.attention_norm, spec.norm_eps),
        Project(layer.w_qkv),
        RopeWrite(index, layer.q_norm, layer.k_norm, spec.norm_eps),
        Attend(index, spec.windows[index]),
        Project(layer.wo),
    ]
    if layer.attention_post_norm is not None:
        ops.append(PostNorm(layer.attention_post_norm, spec.norm_eps))
    return [*ops, Add()]


def _ffn(spec: "ModelSpec", layer: "LayerWeights") -> list[Op]:
    ops: list[Op] = [
        Norm(layer.ffn_norm, spec.norm_eps),
        Project(layer.w_gate_up),
        Gate(spec.act),
        Project(layer.w_down),
    ]
    if layer.ffn_post_norm is not None:
        ops.append(PostNorm(layer.ffn_post_norm, spec.norm_eps))
    return [*ops, Add()]
