"""Packed training rows, made by worker processes while training runs and kept on the device once they are there."""

import multiprocessing
import os
from functools import partial
from pathlib import Path

import torch
from documents import TRAINED, make_shard
from torch import Tensor

SHARD_ROWS = 512


def _yield_cores() -> None:
    """In each maker: no thread pool of the tokenizer's, and way for the process that trains and compiles."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(10)


class Rows:
    """Rows are used once, in order of arrival; only when training overtakes the makers does it draw old rows again.

    Start it before the first CUDA call: the makers are forked. Shard i depends on the seed and i alone.
    """

    def __init__(
        self, folder: Path, seed: int, row_len: int, num_shards: int, workers: int, first_shard: int, shard_rows: int
    ) -> None:
        self._pool = multiprocessing.get_context("fork").Pool(workers, initializer=_yield_cores)
        make = partial(make_shard, str(folder), seed, shard_rows, row_len)
        self._made = self._pool.imap_unordered(make, range(first_shard, first_shard + num_shards))
        self._shape, self._shard_rows = (num_shards * shard_rows, row_len + 1), shard_rows
        self.filled = self.used = self.repeated = 0

    def allocate(self, device: torch.device) -> None:
        self._rows = torch.zeros(self._shape, dtype=torch.int16, device=device)

    def take_ready(self, wait: bool = False) -> None:
        """Upload the shards that are ready; `wait` for one when none is."""
        while self.filled < len(self._rows):
            try:
                shard = self._made.next(timeout=120 if wait else 0)
            except multiprocessing.TimeoutError:
                assert not wait, "no training shard arrived within two minutes"
                return
            self._rows[self.filled : self.filled + len(shard)].copy_(torch.from_numpy(shard))
            self.filled, wait = self.filled + len(shard), False

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and targets (int64 [size, row_len]), weights (float32): 1 where the assistant speaks, else 0.1."""
        if self.used + size <= self.filled:
            rows = self._rows[self.used : self.used + size]
            self.used += size
        else:
            rows = self._rows[torch.randint(self.filled, (size,), device=self._rows.device)]
            self.repeated += size
        rows = rows.long()
        target = rows[:, 1:]
        weight = torch.where(target >= TRAINED, 1.0, 0.1)
        return (rows[:, :-1] & (TRAINED - 1)).contiguous(), (target & (TRAINED - 1)).contiguous(), weight

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()
