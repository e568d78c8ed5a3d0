"""The running batch as device tensors: what a decode step reads and writes without the host.

Legend: S slots (max_batch_size and one trash slot for padding rows), B blocks of a sequence, R rows of a step,
T tokens of a step, L logit rows, W the table width that a step uses.

The host decides who runs and when a request ends; it sends only changes: new slots, new blocks, prompt tokens. A row
that was launched before the host learned that its request had ended writes into the request's own block, and every
step that could reuse that block runs later on the same stream: nothing has to be undone.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pagoda.engine.schedule import Row, Schedule
from pagoda.kernels.batch_step import advance_decode, gather_decode
from pagoda.models.decoder import StepInput


@dataclass(frozen=True)
class MixedStep:
    """A step with prompt chunks: the forward's input, its rows' slots, and where the sampling rows stand."""

    step: StepInput
    row_slot_R: torch.Tensor
    sample_slot_L: torch.Tensor
    sample_logit_L: torch.Tensor


class DeviceBatch:
    """State of all slots. `table_width` is the number of blocks of the longest session."""

    def __init__(self, num_slots: int, table_width: int, block_len: int, device: torch.device):
        self.device, self.block_len, self.trash = device, block_len, num_slots
        self.last_token_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.kv_len_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.rope_len_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.block_table_SB = torch.zeros(num_slots + 1, table_width, dtype=torch.int32, device=device)

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
        packed = self.upload(flat)
        if pairs:
            pair = packed[3 * len(updates) :].view(-1, 2)
            self.rope_len_S.index_copy_(0, pair[:, 0].contiguous(), pair[:, 1].to(torch.int32))
        if updates:
            triple = packed[: 3 * len(updates)].view(-1, 3)
            self.block_table_SB.index_put_((triple[:, 0], triple[:, 1]), triple[:, 2].to(torch.int32))

    def decode_input(self, slot_R: torch.Tensor, width: int) -> StepInput:
        """Gather one token a row (device work only; may be captured in a graph)."""
        rows = gather_decode(
            slot_R, self.last_token_S, self.kv_len_S, self.rope_len_S, self.block_table_SB, self.block_len, width
        )
        return StepInput(
            token_T=rows.token_R,
            position_T=rows.position_R,
            slot_T=rows.cache_slot_R,
            rope_len_T=rows.rope_len_R,
            query_start_R1=torch.arange(slot_R.numel() + 1, dtype=torch.int32, device=self.device),
            kv_len_R=rows.kv_len_R,
            block_table_RB=rows.table_RW,
            logit_row_L=None,
            max_query_len=1,
            max_kv_len=width * self.block_len,
            decode=True,
        )

    def advance(self, slot_R: torch.Tensor, token_R: torch.Tensor) -> None:
        """After a decode step: the sampled token is the next input, the cache is one token longer."""
        advance_decode(slot_R, token_R, self.last_token_S, self.kv_len_S)

    def mixed_input(self, rows: list[Row]) -> MixedStep:
        """Input of a step that computes prompt chunks beside decode rows, from one packed upload."""
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        lens = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
        firsts = np.concatenate([[0], np.cumsum(lens)])
        row_of = np.repeat(np.arange(len(rows)), lens)
        logit_rows, samples = _logit_rows(rows, firsts)
        parts = [
            np.fromiter((row.slot for row in rows), np.int64, len(rows)),
            starts + lens,
            firsts,
            # A token of -1 stands for the slot's last sampled token, which only the device knows.
            np.concatenate([np.array([-1] if row.tokens is None else row.tokens, np.int64) for row in rows]),
            row_of,
            starts[row_of] + np.arange(firsts[-1]) - firsts[row_of],
            logit_rows,
            np.fromiter((row.slot for row in rows if row.samples), np.int64),
            samples,
        ]
        packed = self.upload(np.concatenate(parts)).split([len(p) for p in parts])
        slot_R, kv_len_R, first_R1, token_T, row_T, position_T, logit_row_L, sample_slot_L, sample_L = packed
        longest = int((starts + lens).max())
        table_RW = self.block_table_SB[:, : (longest - 1) // self.block_len + 1].index_select(0, slot_R)
        slot_of_T = slot_R.index_select(0, row_T)
        block_T = table_RW[row_T, position_T // self.block_len].long()
        step = StepInput(
            token_T=torch.where(token_T < 0, self.last_token_S.index_select(0, slot_of_T), token_T),
            position_T=position_T,
            slot_T=block_T * self.block_len + position_T % self.block_len,
            rope_len_T=self.rope_len_S.index_select(0, slot_of_T),
            query_start_R1=first_R1.to(torch.int32),
            kv_len_R=kv_len_R.to(torch.int32),
            block_table_RB=table_RW,
            logit_row_L=logit_row_L,
            max_query_len=int(lens.max()),
            max_kv_len=longest,
            decode=bool((lens == 1).all()),
        )
        return MixedStep(step, slot_R, sample_slot_L, sample_L)

    def finish_mixed(self, mixed: MixedStep, token_L: torch.Tensor) -> None:
        """After a mixed step: the cache lengths of its rows and the tokens of those that sampled."""
        self.kv_len_S.index_copy_(0, mixed.row_slot_R, mixed.step.kv_len_R)
        if mixed.sample_slot_L.numel():
            self.last_token_S.index_copy_(0, mixed.sample_slot_L, token_L)


def _logit_rows(rows: list[Row], firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens need logits (all of a row with prompt log-probabilities, the last of one that samples), and
    where the sampling ones stand among them."""
    wanted, samples, count = [], [], 0
    for r, row in enumerate(rows):
        if row.prompt_logprobs:
            wanted.append(np.arange(firsts[r], firsts[r + 1]))
        elif row.samples:
            wanted.append(firsts[r + 1 : r + 2] - 1)
        else:
            continue
        count += len(wanted[-1])
        if row.samples:
            samples.append(count - 1)
    return (np.concatenate(wanted) if wanted else np.zeros(0, np.int64)), np.array(samples, np.int64)
