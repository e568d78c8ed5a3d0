"""The step program op by op in the order it is written: the oracle of the other executors, and their fallback.

Legend: T tokens of a step, L logit rows, C hidden size, P rotary pairs, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.kernels.act_mul import act_mul
from pagoda.kernels.decode_attention import decode_attention
from pagoda.kernels.kv_pack import LayerCache
from pagoda.kernels.prefill_attention import prefill_attention
from pagoda.kernels.rms_norm import rms_norm
from pagoda.kernels.rope_cache import rope_and_write
from pagoda.layers.embedding import embed
from pagoda.layers.kv_schemes import get_kv_scheme
from pagoda.layers.parallel import Group
from pagoda.layers.rope import Rope, logn_scale
from pagoda.models import decoder as ops
from pagoda.models.decoder import StepInput, StepProgram
from pagoda.models.spec import session_len

ROW_PARALLEL = ("o", "down")


@dataclass
class Frame:
    """What one forward carries from op to op: the facts of the step, and what the embedding makes: angles and the two
    registers. `early`: kernels may start before the one ahead of them has ended, and wait for it inside (GPU).
    `gather`: all ranks' logits are wanted."""

    step: StepInput
    q_scale_T: Tensor | None
    cos_TP: Tensor
    sin_TP: Tensor
    h: Tensor
    x: Tensor
    early: bool = False
    gather: bool = True


class EagerExecutor:
    """Runs anywhere, in float32, bfloat16 and float16; no host synchronisation in `forward`. `reason`: why nothing
    faster runs, for the report."""

    graph_safe = True
    weight_bytes = None

    def __init__(
        self,
        program: StepProgram,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        group: Group,
        reason: str = "",
    ):
        spec = program.spec
        self.program, self.config, self.device, self.dtype, self.group = program, config, device, dtype, group
        self.rope = Rope(spec.rope, session_len(spec, config), device)
        self.reason = f" ({reason})" if reason else ""
        self.caches: list[LayerCache] = []

    def describe(self) -> str:
        return f"op by op in torch on {self.device}, {str(self.dtype).removeprefix('torch.')}{self.reason}"

    def bytes_per_block(self) -> int:
        """Of one block of the KV cache: all layers, this rank's heads."""
        p, scheme = self.program, get_kv_scheme(self.config.quant_policy)
        layer = scheme.bytes_per_block(p.num_kv_heads, p.spec.head_dim, self.config.cache_block_seq_len, self.dtype)
        return layer * p.spec.num_layers

    def allocate_cache(self, num_blocks: int) -> None:
        """Zeroed blocks 0 .. num_blocks - 1; block 0 is scratch, where padding rows may write."""
        p, scheme = self.program, get_kv_scheme(self.config.quant_policy)
        shape = (num_blocks, p.num_kv_heads, p.spec.head_dim, self.config.cache_block_seq_len)
        static = p.kv_ranges if scheme.name == "int8" and p.kv_ranges else (None,) * p.spec.num_layers
        self.caches = [scheme.allocate(*shape, self.dtype, self.device, ranges) for ranges in static]

    def free_cache(self) -> None:
        self.caches = []

    @torch.no_grad()
    def forward(self, step: StepInput, gather: bool = True) -> Tensor:
        """One step through the model; keys and values go to the cache -> logits [L, V], float32, soft cap applied. V
        without `gather`: this rank's rows of the head, padding included."""
        return self._walk(self.program.ops, step, gather)

    def _walk(self, program_ops: tuple[Any, ...], step: StepInput, gather: bool, early: bool = False) -> Tensor:
        spec = self.program.spec
        q_scale_T = logn_scale(step.position_T, spec.logn_len) if spec.logn_len else None
        none = step.token_T  # until the embedding
        f = Frame(step, q_scale_T, cos_TP=none, sin_TP=none, h=none, x=none, early=early, gather=gather)
        for op in program_ops:
            self.HANDLERS[type(op)](self, op, f)
        return f.x

    def _embed(self, op: ops.Embed, f: Frame) -> None:
        f.h = embed(f.step.token_T, op.weight_VC, op.scale, self.group, op.split)
        f.cos_TP, f.sin_TP = self.rope.angles(f.step.position_T, f.step.rope_len_T)

    def _norm(self, op: ops.Norm, f: Frame) -> None:
        f.x = rms_norm(f.h, op.weight_C, op.eps, early_launch=f.early)

    def _project(self, op: ops.Project, f: Frame) -> None:
        f.x = op.linear(f.x, pdl=f.early)
        if op.linear.role in ROW_PARALLEL:
            f.x = self.group.all_reduce_(f.x)

    def _rope_write(self, op: ops.RopeWrite, f: Frame) -> None:
        p = self.program
        f.x = rope_and_write(
            f.x, f.cos_TP, f.sin_TP, f.step.slot_T, self.caches[op.layer], p.num_heads, p.num_kv_heads, p.spec.head_dim,
            op.q_norm_D, op.k_norm_D, op.eps, f.q_scale_T, early_launch=f.early,
        )  # fmt: skip

    def _attend(self, op: ops.Attend, f: Frame) -> None:
        step, spec, cache = f.step, self.program.spec, self.caches[op.layer]
        how = (spec.attn_scale, op.window, spec.attn_softcap)
        if step.decode:
            out = decode_attention(f.x, cache, step.kv_len_R, step.block_table_RB, *how, early_launch=f.early)
        else:
            out = prefill_attention(
                f.x, cache, step.query_start_R1, step.kv_len_R, step.block_table_RB, step.max_query_len, *how,
                single_rows=step.single_rows, single_len_R=step.single_len_R, fresh=step.fresh,
            )  # fmt: skip
        f.x = out.flatten(1)

    def _gate(self, op: ops.Gate, f: Frame) -> None:
        f.x = act_mul(f.x, op.act)

    def _post_norm(self, op: ops.PostNorm, f: Frame) -> None:
        f.x = rms_norm(f.x, op.weight_C, op.eps, early_launch=f.early)

    def _add(self, op: ops.Add, f: Frame) -> None:
        f.h = f.h + f.x

    def _take_rows(self, op: ops.TakeRows, f: Frame) -> None:
        if f.step.logit_row_L is not None:
            f.h = f.h.index_select(0, f.step.logit_row_L)

    def _head(self, op: ops.Head, f: Frame) -> None:
        f.x = self._finish_logits(op, op.linear(f.x), f)

    def _finish_logits(self, op: ops.Head, logits_LV: Tensor, f: Frame) -> Tensor:
        if f.gather:
            logits_LV = self.group.all_gather(logits_LV)[:, : op.vocab_size]
        logits_LV = logits_LV.float()
        if op.softcap:
            logits_LV = torch.tanh(logits_LV / op.softcap) * op.softcap
        return logits_LV

    HANDLERS: dict[type, Callable[[Any, Any, Frame], None]] = {
        ops.Embed: _embed,
        ops.Norm: _norm,
        ops.Project: _project,
        ops.RopeWrite: _rope_write,
        ops.Attend: _attend,
        ops.Gate: _gate,
        ops.PostNorm: _post_norm,
        ops.Add: _add,
        ops.TakeRows: _take_rows,
        ops.Head: _head,
    }
