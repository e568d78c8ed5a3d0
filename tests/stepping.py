"""Drives an executor by hand: sequences with blocks of their own, any mix of chunks in one step."""

import torch
from torch import Tensor

from pagoda.models.decoder import StepInput


class Stepper:
    """`num_rows` sequences of at most `max_len` tokens, their blocks shuffled over the cache."""

    def __init__(self, executor, block_len: int, num_rows: int, max_len: int, device: str = "cpu"):
        width = -(-max_len // block_len)
        executor.allocate_cache(1 + num_rows * width)
        order = torch.randperm(num_rows * width, generator=torch.Generator().manual_seed(0))
        self.table = (order + 1).view(num_rows, width).to(torch.int32)
        self.executor, self.block_len, self.device = executor, block_len, device
        self.len = [0] * num_rows

    def step_input(self, chunks: list[tuple[int, list[int]]], rope_len: dict[int, int]) -> StepInput:
        """One step that appends each chunk's tokens to its row, with logits of every token."""
        position, slot, rope, starts = [], [], [], [0]
        for row, tokens in chunks:
            for p in range(self.len[row], self.len[row] + len(tokens)):
                position.append(p)
                slot.append(int(self.table[row, p // self.block_len]) * self.block_len + p % self.block_len)
                rope.append(rope_len.get(row, 0))
            self.len[row] += len(tokens)
            starts.append(len(position))
        rows = [row for row, _ in chunks]
        lens = [self.len[row] for row in rows]
        int64, int32 = (lambda v: torch.tensor(v, device=self.device)), (lambda v: int64(v).to(torch.int32))
        return StepInput(
            token_T=int64([t for _, tokens in chunks for t in tokens]),
            position_T=int64(position),
            slot_T=int64(slot),
            query_start_R1=int32(starts),
            kv_len_R=int32(lens),
            block_table_RB=self.table[rows].to(self.device),
            logit_row_L=torch.arange(len(position), device=self.device),
            max_query_len=max(len(tokens) for _, tokens in chunks),
            decode=all(len(tokens) == 1 for _, tokens in chunks),
            rope_len_T=int32(rope),
        )

    def step(self, chunks: list[tuple[int, list[int]]], rope_len: dict[int, int] | None = None) -> list[Tensor]:
        """Logits [tokens, V] of each chunk."""
        logits = self.executor.forward(self.step_input(chunks, rope_len or {}))
        return list(logits.split([len(tokens) for _, tokens in chunks]))
