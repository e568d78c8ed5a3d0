"""The step program on a GPU: the list is rewritten into fused kernels, where one exists for these rows and weights.

A rewrite never changes what is computed, only how many kernels it takes; what no rule takes runs as `eager` runs it.
A decode step of few rows becomes five kernels a layer, launched early (programmatic dependent launch).
Legend: T tokens of a step, R rows, L logit rows, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.kernels.all_reduce import takes_norm
from pagoda.kernels.decode_attention_fused import decode_attention_fused
from pagoda.kernels.embed_rows import embed_rows
from pagoda.kernels.rms_norm import rms_norm
from pagoda.kernels.triton_env import starts_early
from pagoda.layers.linear import Linear
from pagoda.layers.linear import Norm as InputNorm
from pagoda.layers.parallel import Group
from pagoda.models.decoder import Add, Attend, Embed, Gate, Head, Norm, Op, Project, RopeWrite, StepInput, StepProgram
from pagoda.models.executors.eager import ROW_PARALLEL, EagerExecutor, Frame

MAX_PLANNED_ROWS = 256  # steps of more rows share one plan
MAX_FUSED_ATTENTION_ROWS = 4  # above, rope and cache write are a kernel of their own (B: 26 us a step at 8 rows)
# When the attention kernel lets the next one start (see `decode_attention_fused`): at once where that is a product of
# one row with 16-bit weights, which asks for its first weights meanwhile; after its own reads where it is small or
# split, or it takes multiprocessors away.
EARLY_AT_ONCE, EARLY_AFTER_BLOCKS = 1, 3


@dataclass(frozen=True, eq=False)
class FusedProject:
    """x = act(linear(x)), of norm(h) instead of x where `norm` is given; `residual`: h = h + that."""

    linear: Linear
    norm: InputNorm | None = None
    act: str | None = None
    residual: bool = False


@dataclass(frozen=True, eq=False)
class SumProject:
    """h = h + linear(x) of all ranks; x = rms_norm(h) where `norm` is given. Two kernels, the second over the link."""

    linear: Linear
    norm: InputNorm | None = None


@dataclass(frozen=True, eq=False)
class FusedAttend:
    """RopeWrite and Attend of one token a row."""

    rope: RopeWrite
    attend: Attend
    early_launch: int


@dataclass(frozen=True, eq=False)
class AddNorm:
    """h = h + x; x = rms_norm(h)."""

    norm: Norm


@dataclass(frozen=True, eq=False)
class NormHead:
    """Norm and Head: one kernel or two, by the number of wanted rows."""

    norm: InputNorm
    head: Head


class GpuExecutor(EagerExecutor):
    """Plans are made once for each number of rows; a step only looks its plan up."""

    def __init__(
        self, program: StepProgram, config: EngineConfig, device: torch.device, dtype: torch.dtype, group: Group
    ):
        super().__init__(program, config, device, dtype, group)
        self._early = starts_early(device)
        self._plans: dict[tuple[int, bool], tuple[Any, ...]] = {}

    def describe(self) -> str:
        plan = self.plan(1, True)
        kernels = len(plan) - 3 + sum(isinstance(op, SumProject) for op in plan)  # less embedding, row choice and head
        name, dtype = torch.cuda.get_device_name(self.device), str(self.dtype).removeprefix("torch.")
        return f"fused kernels on {name}, {dtype}, {kernels // self.program.spec.num_layers} a layer at one row"

    @torch.no_grad()
    def forward(self, step: StepInput, gather: bool = True) -> Tensor:
        rows = step.token_T.shape[0]
        # NCCL's kernels take no part in early launch: nothing that may stand behind one starts early.
        early = step.decode and self._early and (self.group.size == 1 or self._sums_at_once(rows))
        return self._walk(self.plan(rows, step.decode), step, gather, early)

    def _sums_at_once(self, rows: int) -> bool:
        """Whether one kernel sums the residual stream of so many rows over the ranks."""
        return self.group.sums_at_once(rows * self.program.spec.hidden_size * self.dtype.itemsize, self.dtype)

    def plan(self, rows: int, decode: bool) -> tuple[Any, ...]:
        """The operations of a step of that many tokens."""
        key = (rows if rows <= MAX_PLANNED_ROWS else MAX_PLANNED_ROWS + 1, decode)
        if key not in self._plans:
            self._plans[key] = self._rewrite(*key)
        return self._plans[key]

    def _rewrite(self, rows: int, decode: bool) -> tuple[Any, ...]:
        ops, plan, at = self.program.ops, [], 0
        while at < len(ops):
            fused, taken = self._rule(list(ops[at : at + 5]), rows, decode)
            plan.append(fused)
            at += taken
        return tuple(plan)

    def _rule(self, ahead: list[Op], rows: int, decode: bool) -> tuple[Any, int]:
        """The first rule that fits the operations ahead: what replaces them, and how many of them."""
        alone = self.group.size == 1
        match ahead:
            case [Norm() as n, Project(linear), Gate(act), *_] if linear.fuses(rows, norm=True, act=act):
                return FusedProject(linear, InputNorm(n.weight_C, n.eps), act), 3
            case [Norm() as n, Project(linear), *_] if linear.fuses(rows, norm=True):
                return FusedProject(linear, InputNorm(n.weight_C, n.eps)), 2
            case [Norm() as n, Head() as head, *_]:
                return NormHead(InputNorm(n.weight_C, n.eps), head), 2
            case [Project(linear), Gate(act), *_] if linear.fuses(rows, act=act):
                return FusedProject(linear, act=act), 2
            case [Project(linear), Add(), *_] if alone and self._takes_sum(linear, ahead[1:], rows):
                return FusedProject(linear, residual=True), 2
            case [Project(linear), Add(), *after] if linear.role in ROW_PARALLEL and self._sums_in_step(rows):
                norm = self._norm_after_sum(after, rows, decode)
                return SumProject(linear, norm), 2 if norm is None else 3
            case [RopeWrite() as r, Attend() as a, Project(o), *_] if decode and rows <= MAX_FUSED_ATTENTION_ROWS:
                at_once = rows == 1 and o.scheme.name == "dense"
                return FusedAttend(r, a, EARLY_AT_ONCE if at_once else EARLY_AFTER_BLOCKS), 2
            case [Add(), Norm() as n, *_] if self._rule(ahead[1:], rows, decode)[0] is n:
                return AddNorm(n), 2
            case _:
                return ahead[0], 1

    def _sums_in_step(self, rows: int) -> bool:
        return rows <= MAX_PLANNED_ROWS and self._sums_at_once(rows)

    def _norm_after_sum(self, after: list[Op], rows: int, decode: bool) -> InputNorm | None:
        """The norm that the sum over the ranks does on the way: one that no product would take in."""
        if not after or not isinstance(after[0], Norm) or self._rule(after, rows, decode)[0] is not after[0]:
            return None
        gain_C = after[0].weight_C
        return InputNorm(gain_C, after[0].eps) if gain_C.dtype == self.dtype and takes_norm(gain_C) else None

    def _takes_sum(self, linear: Linear, after: list[Op], rows: int) -> bool:
        """Whether the residual sum goes into the kernel of the matrix. Where the next norm would take it for nothing,
        only if that kernel is the faster product anyway."""
        free = isinstance(self._rule(after, rows, False)[0], AddNorm)
        return linear.fuses(rows, residual=True) and (linear.fuses(rows) or not free)

    def _embed(self, op: Embed, f: Frame) -> None:
        """The rows of the table and the angles in one launch, where both are plain look-ups."""
        if self.rope.table is None:
            return super()._embed(op, f)
        step, first = f.step, self.group.rank * op.weight_VC.shape[0] if op.split else 0
        table = (op.weight_VC, op.scale, self.rope.table)
        f.h, f.cos_TP, f.sin_TP = embed_rows(step.token_T, step.position_T, *table, first, early_launch=f.early)
        if op.split:
            f.h = self.group.all_reduce_(f.h, f.early)

    def _fused_project(self, op: FusedProject, f: Frame) -> None:
        x = f.x if op.norm is None else f.h
        h = f.h if op.residual else None
        y = op.linear(x, norm=op.norm, act=op.act, residual=h, out=h, pdl=f.early)
        if op.residual:
            f.h = y
        else:
            f.x = y

    def _sum_project(self, op: SumProject, f: Frame) -> None:
        part = op.linear(f.x, pdl=f.early)
        f.h, y = self.group.sum_(part, f.h, op.norm, f.early)
        f.x = part if y is None else y

    def _fused_attend(self, op: FusedAttend, f: Frame) -> None:
        step, spec, rope = f.step, self.program.spec, op.rope
        f.x = decode_attention_fused(
            f.x, f.cos_TP, f.sin_TP, step.slot_T, self.caches[rope.layer], step.kv_len_R, step.block_table_RB,
            spec.attn_scale, op.attend.window, spec.attn_softcap, rope.q_norm_D, rope.k_norm_D, rope.eps, f.q_scale_T,
            op.early_launch if f.early else 0,
        )  # fmt: skip

    def _add_norm(self, op: AddNorm, f: Frame) -> None:
        f.x, f.h = rms_norm(f.x, op.norm.weight_C, op.norm.eps, residual_TC=f.h, out_sum=f.h, early_launch=f.early)

    def _norm_head(self, op: NormHead, f: Frame) -> None:
        linear, rows, norm = op.head.linear, f.h.shape[0], op.norm
        if not linear.fuses(rows, norm=True):
            f.h, norm = rms_norm(f.h, norm.weight_K, norm.eps, early_launch=f.early), None
        out = None
        if linear.fuses(rows, norm=norm is not None):  # these kernels round to any type, so to float32 at once
            out = torch.empty(rows, linear.out_features, dtype=torch.float32, device=self.device)
        f.x = self._finish_logits(op.head, linear(f.h, norm=norm, out=out, pdl=f.early), f)

    HANDLERS = EagerExecutor.HANDLERS | {
        Embed: _embed,
        FusedProject: _fused_project,
        SumProject: _sum_project,
        FusedAttend: _fused_attend,
        AddNorm: _add_norm,
        NormHead: _norm_head,
    }
