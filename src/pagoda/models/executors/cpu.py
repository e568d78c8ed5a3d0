"""The step program as a table that one C++ call walks, with all threads in one parallel region.

Legend: T tokens of a step, L logit rows, P rotary pairs, D head size, V vocabulary.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.kernels.cpu.build import BuildError, load, usable_variants
from pagoda.kernels.cpu.pack import (
    I8,
    KINDS,
    Arena,
    PackedWeight,
    address,
    has_kernel,
    pack_cpu,
    return_freed_memory,
)
from pagoda.kernels.cpu.step_table import CacheStruct, LayerStruct, ModelStruct, StepContext, StepStruct
from pagoda.kernels.cpu.threads import default_threads
from pagoda.layers.kv_schemes import StaticRanges
from pagoda.layers.parallel import Group
from pagoda.layers.rope import Rope, logn_scale
from pagoda.models import decoder as ops
from pagoda.models.decoder import StepInput, StepProgram
from pagoda.models.spec import session_len

UNIT = 16  # tokens of the cache that lie together
# The only shape of layer that the table has; the post norms may be absent.
LAYER_OPS = (
    ops.Norm, ops.Project, ops.RopeWrite, ops.Attend, ops.Project, ops.PostNorm, ops.Add,
    ops.Norm, ops.Project, ops.Gate, ops.Project, ops.PostNorm, ops.Add,
)  # fmt: skip


class CannotRun(Exception):
    """The C++ step does not take this program; the message is the reason, for the start-up report."""


def cut_layers(program: StepProgram) -> list[list[Any]]:
    """The program's layers, each as LAYER_OPS with None for an absent post norm. CannotRun for any other program."""
    body = list(program.ops[1:-3])
    kinds = (type(program.ops[0]), *(type(op) for op in program.ops[-3:]))
    if kinds != (ops.Embed, ops.TakeRows, ops.Norm, ops.Head):
        raise CannotRun("the program does not begin and end as the C++ step does")
    layers = []
    while body:
        layer: list[Any] = []
        for kind in LAYER_OPS:
            if body and type(body[0]) is kind:
                layer.append(body.pop(0))
            elif kind is ops.PostNorm:
                layer.append(None)
            else:
                raise CannotRun(f"the C++ step has no place for {type(body[0]).__name__ if body else 'the end'} here")
        layers.append(layer)
    return layers


def _check(program: StepProgram, config: EngineConfig, dtype: torch.dtype, group: Group) -> None:
    spec = program.spec
    if group.size > 1:
        raise CannotRun("tensor parallel ranks meet in torch")
    if config.quant_policy not in ("none", "int8"):
        raise CannotRun(f"the C++ step has no {config.quant_policy} cache")
    if config.cache_block_seq_len % UNIT:
        raise CannotRun(f"the C++ step wants cache blocks of {UNIT} tokens or a multiple")
    if dtype not in KINDS:
        raise CannotRun(f"the C++ step does not compute in {dtype}")
    if spec.head_dim > 256 or spec.head_dim % 2:
        raise CannotRun(f"the C++ step does not take heads of {spec.head_dim}")
    if program.num_heads % program.num_kv_heads:
        raise CannotRun("query heads are not a multiple of kv heads")
    for op in program.ops:
        if isinstance(op, ops.Gate) and op.act not in ("silu", "gelu_tanh"):
            raise CannotRun(f"the C++ step does not know the activation {op.act}")
        if isinstance(op, ops.Project | ops.Head) and not has_kernel(op.linear.scheme.name, op.linear.tensors):
            raise CannotRun(f"the C++ step has no kernel for these {op.linear.scheme.name} weights")


class CpuExecutor:
    """The Executor of CPUs. Raises CannotRun at construction where the table cannot express the program (and BuildError
    where nothing can be compiled), before it touches a weight: the caller then takes the eager one and says why.

    Weights are packed anew; with `take_weights` the program's own go one by one as they are, so that memory holds them
    once: the program is of no use afterwards."""

    graph_safe = False

    def __init__(
        self,
        program: StepProgram,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        group: Group,
        variant: str | None = None,
        take_weights: bool = False,
    ):
        _check(program, config, dtype, group)
        spec = program.spec
        self.spec, self.config, self.dtype = spec, config, dtype
        self.variant = variant or usable_variants()[0]
        self.threads = config.num_threads or default_threads()
        self.kv_kind = I8 if config.quant_policy == "int8" else KINDS[dtype]
        self.fixed = self.kv_kind == I8 and len(program.kv_ranges) > 0
        self.width = -(-spec.head_dim // 16) * 16
        self.rope = Rope(spec.rope, session_len(spec, config), device)
        self.context = StepContext(load(self.variant))
        layers = cut_layers(program)
        self._keep: list[Any] = []  # what the tables point to
        self._take, self._arena = take_weights, Arena()
        self.layers = (LayerStruct * len(layers))(*(self._layer(layer) for layer in layers))
        if self.fixed:
            for entry, ranges in zip(self.layers, program.kv_ranges, strict=True):
                self._fix(entry.cache, ranges)
        self.model = self._model(program, layers[0][9].act)
        self.weight_bytes = sum(self._sizes().values())
        return_freed_memory()
        self.cache: list[Tensor] = []

    def describe(self) -> str:
        return f"one C++ call a step, {self.variant}, {self.threads} threads, {str(self.dtype).removeprefix('torch.')}"

    # ---- the table
    def _float(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.float().contiguous()
        self._keep.append(tensor)
        return address(tensor)

    def _sizes(self) -> dict[int, int]:
        """Bytes of everything that the tables point to, by address: a tied embedding counts once."""
        kept = [t for kept in self._keep for t in (kept.tensors() if isinstance(kept, PackedWeight) else [kept])]
        return {t.data_ptr(): t.nbytes for t in kept}

    def _weight(self, linear: Any) -> PackedWeight:
        scheme, bias, inputs = linear.scheme.name, linear.bias, linear.in_features
        tensors = linear.release() if self._take else linear.tensors
        packed = pack_cpu(scheme, tensors, linear.role, bias, inputs, self._arena, self.spec.quant is not None)
        self._keep.append(packed)
        return packed

    def _layer(self, layer: list[Any]) -> LayerStruct:
        norm, qkv, rope, attend, o, o_post, _, ffn_norm, gate_up, _, down, ffn_post, _ = layer
        return LayerStruct(
            qkv=self._weight(qkv.linear).struct,
            o=self._weight(o.linear).struct,
            gate_up=self._weight(gate_up.linear).struct,
            down=self._weight(down.linear).struct,
            attention_norm=self._float(norm.weight_C),
            q_norm=self._float(rope.q_norm_D),
            k_norm=self._float(rope.k_norm_D),
            attention_post=self._float(o_post and o_post.weight_C),
            ffn_norm=self._float(ffn_norm.weight_C),
            ffn_post=self._float(ffn_post and ffn_post.weight_C),
            window=attend.window,
        )

    def _model(self, program: StepProgram, act: str) -> ModelStruct:
        spec, embed, head = program.spec, program.ops[0], program.ops[-1]
        tied = any(t is embed.weight_VC for t in head.linear.tensors.values()) and spec.quant is None
        head_weight = self._weight(head.linear)
        table_VC = head_weight.q if tied else embed.weight_VC.contiguous()
        self._keep.append(table_VC)
        model = ModelStruct(
            layers=len(self.layers),
            hidden=spec.hidden_size,
            ffn=self.layers[0].gate_up.rows // 2,
            vocab=head.vocab_size,
            rotary_pairs=spec.rope.dim // 2,
            gelu=act == "gelu_tanh",
            embed_kind=head_weight.kind if tied else KINDS[embed.weight_VC.dtype],
            embed_blocks=tied,
            eps=spec.norm_eps,
            embed_scale=torch.tensor(embed.scale, dtype=self.dtype).item(),
            final_softcap=head.softcap,
            embed=address(table_VC),
            norm=self._float(program.ops[-2].weight_C),
            layer=ctypes.addressof(self.layers),
            head=head_weight.struct,
        )
        shape = model.shape
        shape.kind, shape.dim, shape.width = self.kv_kind, spec.head_dim, self.width
        shape.heads, shape.kv_heads = program.num_heads, program.num_kv_heads
        shape.block_len, shape.scale, shape.softcap = (
            self.config.cache_block_seq_len, spec.attn_scale, spec.attn_softcap
        )  # fmt: skip
        return model

    # ---- the cache: per layer k and v [units, kv heads, 16 * width], for int8 their scales [units, kv heads, 16] where
    # calibration did not fix them
    def _fix(self, cache: CacheStruct, ranges: StaticRanges) -> None:
        scales = (self._float(scale_K.repeat_interleave(UNIT)) for scale_K in (ranges.k_scale, ranges.v_scale))
        cache.k_scale, cache.v_scale = scales
        cache.k_zero, cache.v_zero = self._float(ranges.k_zero), self._float(ranges.v_zero)

    def bytes_per_block(self) -> int:
        """Of one block of the KV cache: all layers."""
        scale = 4 if self.kv_kind == I8 and not self.fixed else 0
        per_token = self.width * (1 if self.kv_kind == I8 else self.dtype.itemsize) + scale
        block_len, heads = self.config.cache_block_seq_len, self.model.shape.kv_heads
        return 2 * block_len * heads * per_token * len(self.layers)

    def allocate_cache(self, num_blocks: int) -> None:
        """Zeroed blocks 0 .. num_blocks - 1; block 0 is scratch, where padding rows may write. The system gives their
        memory when they are first written."""
        units, heads = num_blocks * self.config.cache_block_seq_len // UNIT, self.model.shape.kv_heads
        dtype = torch.int8 if self.kv_kind == I8 else self.dtype
        self.free_cache()
        arena = Arena()
        for layer in self.layers:
            numbers = [arena.take(units, heads, UNIT * self.width, dtype=dtype) for _ in range(2)]
            own_scales = self.kv_kind == I8 and not self.fixed
            scales = [torch.zeros(units, heads, UNIT) for _ in range(2)] if own_scales else []
            self.cache += numbers + scales
            layer.cache.k, layer.cache.v = (address(t) for t in numbers)
            if scales:
                layer.cache.k_scale, layer.cache.v_scale = (address(t) for t in scales)
        self.model.num_blocks = num_blocks

    def free_cache(self) -> None:
        self.cache = []
        self.model.num_blocks = 0

    # ---- the step
    @torch.no_grad()
    def forward(self, step: StepInput, gather: bool = True) -> Tensor:
        """One step through the model; keys and values go to the cache -> logits [L, V], float32, soft cap applied.
        There is one rank, so nothing to gather."""
        spec = self.spec
        cos_TP, sin_TP = self.rope.angles(step.position_T, step.rope_len_T)
        q_scale_T = logn_scale(step.position_T, spec.logn_len) if spec.logn_len else None
        num_tokens, num_rows = step.token_T.shape[0], step.kv_len_R.shape[0]
        row_L = torch.arange(num_tokens) if step.logit_row_L is None else step.logit_row_L
        logits_LV = torch.empty(row_L.shape[0], self.model.vocab)
        if num_tokens == 0:
            return logits_LV
        held = {
            "token": step.token_T, "slot": step.slot_T, "logit_row": row_L, "cos": cos_TP, "sin": sin_TP,
            "q_scale": q_scale_T, "query_start": step.query_start_R1, "kv_len": step.kv_len_R,
            "block_table": step.block_table_RB,
        }  # fmt: skip
        held = {name: None if t is None else t.contiguous() for name, t in held.items()}
        table = StepStruct(
            tokens=num_tokens, sequences=num_rows, logit_rows=row_L.shape[0],
            table_width=step.block_table_RB.shape[1], threads=self.threads, logits=address(logits_LV),
            **{name: address(t) for name, t in held.items()},
        )  # fmt: skip
        self.context.run(self.model, table)
        return logits_LV


def make_cpu_executor(
    program: StepProgram, config: EngineConfig, device: torch.device, dtype: torch.dtype, group: Group
) -> "CpuExecutor | str":
    """The C++ executor, which takes the program's weights, or the reason why it cannot run this program here."""
    try:
        return CpuExecutor(program, config, device, dtype, group, take_weights=True)
    except (CannotRun, BuildError) as e:
        return str(e)
