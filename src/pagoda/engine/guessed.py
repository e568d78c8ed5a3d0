"""A step in which some rows follow guessed tokens: where their positions stand, and which of the tokens count.

A sampled token counts while every guess before it in its row was right: equal to what was sampled in its place.
Legend: R rows of a step, G most positions of a row that sample, L logit rows: those positions of all rows, and the last
one of a row that samples nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pagoda.engine.schedule import Row


class GuessedStep(NamedTuple):
    """Device tensors, int64."""

    slot_L: torch.Tensor  # the trash slot for rows that sample nothing
    ahead_L: torch.Tensor  # how many positions of the same row stand before it
    at_RG: torch.Tensor  # which of L; what is behind a row's last position repeats it
    guess_RG: torch.Tensor  # the guess that follows; -1 for none

    def accept(self, token_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row: how many guesses were right and how many wrong (or behind a wrong one), and the last token that
        counts."""
        token_RG = token_L[self.at_RG]
        right_R = ((token_RG == self.guess_RG) & (token_RG >= 0)).long().cumprod(1).sum(1)
        wrong_R = (self.guess_RG >= 0).sum(1) - right_R
        return right_R, wrong_R, token_RG.gather(1, right_R[:, None])[:, 0]


def num_logit_rows(row: Row) -> int:
    """Of one row that does not report its prompt's log-probabilities."""
    return max(1, row.samples)


def guessed_step(rows: list[Row], trash: int, upload: Callable[[np.ndarray], torch.Tensor]) -> GuessedStep:
    """From the rows of a schedule, in one upload."""
    count_R = np.array([num_logit_rows(row) for row in rows])
    first_R, width = np.cumsum(count_R) - count_R, int(count_R.max())
    slot_L = np.repeat([row.slot if row.samples else trash for row in rows], count_R)
    ahead_L = np.arange(count_R.sum()) - np.repeat(first_R, count_R)
    at_RG = first_R[:, None] + np.minimum(np.arange(width), count_R[:, None] - 1)
    guess_RG = np.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        if row.samples > 1:
            assert row.tokens is not None and len(row.tokens) == row.samples
            guess_RG[r, : row.samples - 1] = row.tokens[1:]
    parts = [slot_L, ahead_L, at_RG.reshape(-1), guess_RG.reshape(-1)]
    slot, ahead, at, guess = upload(np.concatenate(parts)).split([part.size for part in parts])
    return GuessedStep(slot, ahead, at.view(-1, width), guess.view(-1, width))
