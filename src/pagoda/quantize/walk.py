"""One decoder layer at a time: its weights from the mapped checkpoint, the calibration sequences through it.

Memory: one layer's weights and one batch of activations on the device; the residual stream of all sequences lies on
the host. The layer runs as the engine runs it: the step program's own operations, keys and values through the cache.
Legend: S sequences of L tokens, T tokens of a batch, C hidden size, N out features, K in features.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.layers.kv_schemes import get_kv_scheme
from pagoda.layers.linear import Linear
from pagoda.layers.parallel import Group
from pagoda.layers.rope import logn_scale
from pagoda.layers.schemes import Tensors
from pagoda.models import decoder as ops
from pagoda.models.decoder import StepInput, StepProgram, layer_ops
from pagoda.models.executors.eager import EagerExecutor, Frame
from pagoda.models.loader import LayerWeights
from pagoda.models.local_weights import LAYER_ROLES, LocalMatrix, LocalTensor, LocalWeights
from pagoda.models.spec import ModelSpec

BATCH_TOKENS = {"cuda": 4096, "cpu": 2048}
Matrix = tuple[str, Tensors]  # scheme, canonical tensors
Watch = Callable[[str, Tensor], None]  # told (role or "k" or "v", value) as a layer runs


@dataclass
class Layer:
    """The canonical tensors of one layer, fused, whole. Dense until a method puts other canonical forms in."""

    index: int
    gains: dict[str, Tensor]  # by canonical name without `.weight`, float32
    matrices: dict[str, Matrix]  # by role
    biases: dict[str, Tensor | None] = field(default_factory=dict)

    def weight(self, role: str) -> Tensor:
        """A dense matrix, float32 [N, K]."""
        scheme, tensors = self.matrices[role]
        assert scheme == "dense"
        return tensors["weight"].float()

    def with_matrix(self, role: str, scheme: str, tensors: Tensors) -> "Layer":
        """A copy with one matrix replaced."""
        return dataclasses.replace(self, matrices=self.matrices | {role: (scheme, tensors)})


@dataclass
class Streams:
    """The residual stream of all sequences before a layer [S, L, C], on the host: in the original model, and in the
    model whose layers before this one are quantized."""

    original: Tensor
    ours: Tensor


def read_layer(weights: LocalWeights, index: int) -> Layer:
    """Layer `index` on the weights' device."""
    layer, prefix = Layer(index, {}, {}), f"layers.{index}."
    for item in weights.layer(index):
        name = item.name.removeprefix(prefix)
        if isinstance(item, LocalTensor):
            layer.gains[name.removesuffix(".weight")] = item.tensor
        else:
            assert isinstance(item, LocalMatrix)
            tensors = {key: t.to(weights.device) for key, t in item.tensors.items()}
            layer.matrices[LAYER_ROLES[name]] = (item.scheme, tensors)
            layer.biases[LAYER_ROLES[name]] = item.bias
    return layer


class Walk:
    """Runs layers over batches of whole sequences of length `length`."""

    def __init__(self, spec: ModelSpec, length: int, device: torch.device, dtype: torch.dtype):
        self.spec, self.length, self.device, self.dtype = spec, length, device, dtype
        program = StepProgram((), spec, spec.num_heads, spec.num_kv_heads)
        config = EngineConfig(session_len=length)
        self._run = EagerExecutor(program, config, device, dtype, Group.single())
        self.block_len, self.rows = config.cache_block_seq_len, max(1, BATCH_TOKENS[device.type] // length)
        self._blocks = -(-length // self.block_len)
        shape = (self.rows * self._blocks + 1, spec.num_kv_heads, spec.head_dim, self.block_len)
        self._run.caches = [get_kv_scheme("none").allocate(*shape, dtype, device)]

    def batches(self, num_sequences: int) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, num_sequences)) for i in range(0, num_sequences, self.rows))

    def embed(self, embed_VC: Tensor, ids_SL: Tensor) -> Tensor:
        """The residual stream before the first layer, [S, L, C] on the host."""
        scale = torch.tensor(self.spec.embed_scale, dtype=self.dtype).item()
        h_SLC = torch.empty(*ids_SL.shape, self.spec.hidden_size, dtype=self.dtype)
        for row, ids in zip(h_SLC, ids_SL.to(embed_VC.device)):
            row.copy_(embed_VC[ids].to(self.dtype) * scale)
        return h_SLC

    def linear(self, role: str, matrix: Matrix, k: int, bias: Tensor | None = None) -> Linear:
        """A matrix (scheme, canonical tensors) of `k` inputs, ready to multiply."""
        return Linear.pack(role, *matrix, bias, k, self.device, self.dtype)

    def program(self, layer: Layer) -> list[ops.Op]:
        """The layer's operations, its cache being number 0."""
        spec, gains = self.spec, {k.replace("attention.", ""): v for k, v in layer.gains.items()}
        sizes = {"o": spec.num_heads * spec.head_dim, "down": spec.ffn_size}
        linears = {
            role: self.linear(role, matrix, sizes.get(role, spec.hidden_size), layer.biases.get(role))
            for role, matrix in layer.matrices.items()
        }
        weights = LayerWeights(
            w_qkv=linears["qkv"], wo=linears["o"], w_gate_up=linears["gate_up"], w_down=linears["down"], **gains
        )
        placed = {ops.RopeWrite, ops.Attend}
        return [
            dataclasses.replace(op, layer=0) if type(op) in placed else op
            for op in layer_ops(spec, layer.index, weights)
        ]

    def step(self, num_sequences: int) -> StepInput:
        """The step of one batch of whole sequences."""
        r, length, dev = num_sequences, self.length, self.device
        position_T = torch.arange(length, device=dev).repeat(r)
        table_RB = 1 + torch.arange(r * self._blocks, device=dev, dtype=torch.int32).view(r, self._blocks)
        row_T = torch.arange(r, device=dev).repeat_interleave(length)
        slot_T = table_RB[row_T, position_T // self.block_len].long() * self.block_len + position_T % self.block_len
        return StepInput(
            token_T=position_T,
            position_T=position_T,
            slot_T=slot_T,
            query_start_R1=torch.arange(0, r * length + 1, length, device=dev, dtype=torch.int32),
            kv_len_R=torch.full((r,), length, device=dev, dtype=torch.int32),
            block_table_RB=table_RB,
            logit_row_L=None,
            max_query_len=length,
            decode=False,
            rope_len_T=torch.full_like(position_T, length, dtype=torch.int32),
        )

    def frame(self, num_sequences: int, h_TC: Tensor) -> Frame:
        """What `run` carries from operation to operation."""
        step = self.step(num_sequences)
        cos_TP, sin_TP = self._run.rope.angles(step.position_T, step.rope_len_T)
        logn = self.spec.logn_len
        q_scale = logn_scale(step.position_T, logn) if logn else None
        return Frame(step, q_scale, cos_TP=cos_TP, sin_TP=sin_TP, h=h_TC, x=h_TC)

    @torch.no_grad()
    def run(self, program: list[ops.Op], f: Frame, watch: Watch | None = None) -> Frame:
        """The operations in order; `watch` sees every matrix's input and output, and the written keys and values."""
        for op in program:
            if watch is not None and isinstance(op, ops.Project):
                watch(op.linear.role, f.x)
            self._run.HANDLERS[type(op)](self._run, op, f)
            if watch is not None and isinstance(op, ops.Project):
                watch(op.linear.role + ".out", f.x)
            if watch is not None and isinstance(op, ops.RopeWrite):
                cache, slot_T = self._run.caches[0], f.step.slot_T
                for name, t in (("k", cache.k), ("v", cache.v)):
                    watch(name, t[slot_T // self.block_len, :, slot_T % self.block_len])
        return f

    def inputs(self, layer: Layer, role: str, h_SLC: Tensor) -> Iterator[Tensor]:
        """What the matrix of `role` sees [T, K], batch by batch."""
        program = self.program(layer)
        end = next(i for i, op in enumerate(program) if isinstance(op, ops.Project) and op.linear.role == role)
        for part in self.batches(len(h_SLC)):
            h_TC = h_SLC[part].to(self.device).flatten(0, 1)
            yield self.run(program[:end], self.frame(len(h_SLC[part]), h_TC)).x

    def advance(self, layer: Layer, h_SLC: Tensor, watch: Watch | None = None) -> None:
        """The residual stream after the layer, in place; with `watch` it stays as it is."""
        program = self.program(layer)
        for part in self.batches(len(h_SLC)):
            h_TC = h_SLC[part].to(self.device).flatten(0, 1)
            out = self.run(program, self.frame(len(h_SLC[part]), h_TC), watch).h
            if watch is None:
                h_SLC[part] = out.view(-1, self.length, out.shape[-1]).to(h_SLC.device)
