"""The running batch as device tensors: what a decode step reads and writes without the host.

Legend: S slots (max_batch_size and one trash slot for padding rows), B blocks of a sequence, R rows of a step,
T tokens of a step, L logit rows, W the table width that a step uses.

The host decides who runs and when a request ends; it sends only changes: new slots, new blocks, prompt tokens. A row
that was launched before the host learned that its request had ended writes into the request's own block, and every
step that could reuse that block runs later on the same stream: nothing has to be undone.
"""

from typing import NamedTuple

import numpy as np
import torch

from pagoda.engine.graphs import MIXED_SIZES, mixed_rows, mixed_width
from pagoda.engine.guessed import num_logit_rows
from pagoda.engine.schedule import Row, Schedule
from pagoda.kernels.batch_step import advance_rows, gather_decode, write_changes
from pagoda.kernels.library_attention import Fresh, fresh_rows
from pagoda.kernels.triton_env import starts_early
from pagoda.models.decoder import StepInput


class MixedShape(NamedTuple):
    """Sizes of a step with prompt chunks: `width` of its block tables; `single_rows`: how many of the first rows have
    one token each, None where only the device is to know it; `fresh`: see `StepInput`."""

    tokens: int
    rows: int
    width: int
    max_query_len: int
    single_rows: int | None
    fresh: Fresh = ()


class MixedStep(NamedTuple):
    """A step with prompt chunks: the forward's input, its rows' slots, and those of the rows that sample (trash for the
    others)."""

    step: StepInput
    slot_R: torch.Tensor
    sample_slot_R: torch.Tensor


class DeviceBatch:
    """State of all slots. `table_width` is the number of blocks of the longest session."""

    def __init__(self, num_slots: int, table_width: int, block_len: int, device: torch.device):
        self.device, self.block_len, self.trash = device, block_len, num_slots
        self.last_token_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.kv_len_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.rope_len_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.block_table_SB = torch.zeros(num_slots + 1, table_width, dtype=torch.int32, device=device)
        self._start_R1 = torch.arange(num_slots + 2, dtype=torch.int32, device=device)  # of a decode step
        self._early = starts_early(device)

    def upload(self, values: np.ndarray) -> torch.Tensor:
        """An int64 array to the device, without waiting for it."""
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
        if self.device.type != "cuda":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def apply(self, schedule: Schedule) -> None:
        """Write a schedule's new blocks and new slots: one packed upload, and none when nothing changed."""
        updates = schedule.block_updates
        pairs = [(init.slot, init.rope_len) for init in schedule.inits]
        if not updates and not pairs:
            return
        flat = np.concatenate([np.array(updates, np.int64).reshape(-1), np.array(pairs, np.int64).reshape(-1)])
        write_changes(self.upload(flat), len(updates), self.block_table_SB, self.rope_len_S)

    def decode_input(self, slot_R: torch.Tensor, width: int) -> StepInput:
        """Gather one token a row (device work only; may be captured in a graph)."""
        rows = gather_decode(
            slot_R, self.last_token_S, self.kv_len_S, self.rope_len_S, self.block_table_SB, self.block_len, width,
            self._early,
        )  # fmt: skip
        return StepInput(
            token_T=rows.token_R,
            position_T=rows.position_R,
            slot_T=rows.cache_slot_R,
            rope_len_T=rows.rope_len_R,
            query_start_R1=self._start_R1[: slot_R.numel() + 1],
            kv_len_R=rows.kv_len_R,
            block_table_RB=rows.table_RW,
            logit_row_L=None,
            max_query_len=1,
            decode=True,
        )

    def advance(
        self, slot_R: torch.Tensor, kv_len_R: torch.Tensor, sample_slot_R: torch.Tensor, token_R: torch.Tensor,
        count_S: torch.Tensor,
    ) -> None:  # fmt: skip
        """After a step: the rows' cache lengths; the next input of those that sampled, and how many tokens they have
        generated. The others name the trash slot as `sample_slot_R`."""
        state = (self.last_token_S, self.kv_len_S, count_S)
        advance_rows(slot_R, kv_len_R, sample_slot_R, token_R, *state, early_launch=self._early)

    def pack_mixed(self, rows: list[Row], shape: MixedShape) -> np.ndarray:
        """A step with prompt chunks as one array for `mixed_input`. What `shape` has beyond these rows and tokens is
        padding: it belongs to the trash slot, without a query, and its tokens fall on the scratch block."""
        num, R, T = len(rows), shape.rows, shape.tokens
        starts = np.fromiter((row.start for row in rows), np.int64, num)
        lens = np.fromiter((row.num_tokens for row in rows), np.int64, num)
        slots = np.fromiter((row.slot for row in rows), np.int64, num)
        samples = np.fromiter((row.samples > 0 for row in rows), bool, num)
        ends = np.cumsum(lens)
        total, firsts = int(lens.sum()), ends - lens
        packed, (slot, sample_slot, kv_len, single_len, last, first, token, tenant, position) = _fields(R, T)
        slot[num:] = sample_slot[num:] = tenant[total:] = self.trash
        slot[:num], sample_slot[:num], kv_len[:num] = slots, np.where(samples, slots, self.trash), starts + lens
        last[:num], first[:num], first[num:] = ends - 1, firsts, total
        if shape.single_rows is None:
            single = _num_single(rows)
            single_len[:single], first[:single] = kv_len[:single], single
        # A token of -1 stands for the slot's last sampled token, which only the device knows.
        for row, at in zip(rows, firsts, strict=True):
            token[at : at + row.num_tokens] = -1 if row.tokens is None else row.tokens
        tenant[:total] = np.repeat(slots, lens)
        position[:total] = np.arange(total) + np.repeat(starts - firsts, lens)
        return packed

    def mixed_input(self, packed: torch.Tensor, shape: MixedShape) -> MixedStep:
        """The forward's input from what `pack_mixed` made, on the device (device work only). Every row has one logit
        row, of its last token."""
        sizes = _sizes(shape.rows, shape.tokens)
        parts = [part[:size] for part, size in zip(packed.split([_even(n) for n in sizes]), sizes, strict=True)]
        slot_R, sample_slot_R, kv_len_R, single_len_R, last_R, first_R1, token_T, tenant_T, position_T = parts
        block_T = self.block_table_SB[tenant_T, position_T // self.block_len].long()
        step = StepInput(
            token_T=torch.where(token_T < 0, self.last_token_S.index_select(0, tenant_T), token_T),
            position_T=position_T,
            slot_T=block_T * self.block_len + position_T % self.block_len,
            rope_len_T=self.rope_len_S.index_select(0, tenant_T),
            query_start_R1=first_R1.to(torch.int32),
            kv_len_R=kv_len_R.to(torch.int32),
            block_table_RB=self.block_table_SB[:, : shape.width].index_select(0, slot_R),
            logit_row_L=last_R,
            max_query_len=shape.max_query_len,
            decode=shape.max_query_len == 1,
            single_rows=shape.single_rows or 0,
            single_len_R=single_len_R.to(torch.int32) if shape.single_rows is None else None,
            fresh=shape.fresh,
        )
        return MixedStep(step, slot_R, sample_slot_R)

    def exact_shape(self, rows: list[Row]) -> MixedShape:
        """Without padding."""
        lens = [row.num_tokens for row in rows]
        fresh = fresh_rows([(row.start, row.num_tokens) for row in rows])
        return MixedShape(sum(lens), len(rows), self._num_blocks(rows), max(lens), _num_single(rows), fresh)

    def padded_shape(self, rows: list[Row], most_tokens: int) -> MixedShape | None:
        """One of the few shapes for graphs; None if the step is too large for them."""
        num = mixed_rows(len(rows), self.trash)
        total = max(num, sum(row.num_tokens for row in rows))
        if total > most_tokens:
            return None
        tokens = next(size for size in MIXED_SIZES if total <= size)
        width = mixed_width(self._num_blocks(rows), self.block_table_SB.shape[1])
        return MixedShape(tokens, num, width, tokens, None)

    def _num_blocks(self, rows: list[Row]) -> int:
        return (max(row.start + row.num_tokens for row in rows) - 1) // self.block_len + 1


def _num_single(rows: list[Row]) -> int:
    """How many of the first rows have one token."""
    return next((i for i, row in enumerate(rows) if row.num_tokens > 1), len(rows))


def _even(size: int) -> int:
    """Fields begin at 16 bytes, so that kernels are compiled for one alignment alone."""
    return size + size % 2


def _sizes(num_rows: int, num_tokens: int) -> list[int]:
    """Fields: slot, sample_slot, kv_len, single_len, last; first (one more than rows); token, tenant, position."""
    return [num_rows] * 5 + [num_rows + 1] + [num_tokens] * 3


def packed_size(num_rows: int, num_tokens: int) -> int:
    """Length of what `pack_mixed` makes."""
    return sum(map(_even, _sizes(num_rows, num_tokens)))


def _fields(num_rows: int, num_tokens: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A zeroed array and its fields."""
    sizes = _sizes(num_rows, num_tokens)
    ends = np.cumsum([_even(size) for size in sizes])
    packed = np.zeros(ends[-1], np.int64)
    return packed, [packed[end - _even(size) :][:size] for end, size in zip(ends, sizes, strict=True)]


def scored_rows(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """For a step with rows that report their prompt's log-probabilities or follow guesses: which tokens need logits
    (all of the former, the last ones of another), and where those that may sample, and each row's last, stand there."""
    wanted, at, first, count = [], [], 0, 0
    for row in rows:
        num, end = num_logit_rows(row), first + row.num_tokens
        wanted.append(np.arange(first if row.prompt_logprobs else end - num, end))
        first, count = end, count + len(wanted[-1])
        at.append(np.arange(count - num, count))
    return np.concatenate(wanted), np.concatenate(at)
