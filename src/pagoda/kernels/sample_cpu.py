"""`choose_tokens` (contract in `sample.py`) on a CPU: candidates first, noise for them alone.

Rows whose filters leave few tokens are done together on their best `FEW` tokens: small tensors cost their calls, not
their bytes. A row that needs more goes on with more, or by itself over the whole vocabulary. Which way a row takes,
and every number on it, depends on the row alone, so its token does not depend on its neighbours.

Legend: R rows, N rows under way, W candidates of a row, B parts of the vocabulary, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from pagoda.kernels.gumbel import gumbel, gumbel_numpy, keys_of

TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)  # columns of knob_SK
FEW = (64, 1024)
PART = 64


@dataclass(eq=False)
class Row:
    """One row, and what is found out about it on the way."""

    index: int
    logits_V: torch.Tensor
    temperature: float
    top_k: float
    top_p: float
    min_p: float
    keys: tuple[int, int]
    _mass: float | None = None

    @property
    def knobs(self) -> tuple[float, float, float, float]:
        return self.temperature, self.top_k, self.top_p, self.min_p

    def mass(self) -> float:
        """Of all tokens, relative to the best one's."""
        if self._mass is None:
            score_V = self.logits_V / self.temperature
            self._mass = float((score_V - score_V.max()).exp_().sum(dtype=torch.float64))
        return self._mass

    def choose(self, filtered: bool) -> int:
        """From the whole vocabulary."""
        score_V = self.logits_V / self.temperature
        if not math.isfinite(float(score_V.max())):  # a score is no number, or all tokens are banned
            return -1
        token_M = torch.arange(score_V.numel())
        if filtered:
            token_M = _candidates(score_V, int(self.top_k), self.top_p, self.min_p)
        noise_M = gumbel(*(torch.tensor(key) for key in self.keys), token_M)
        return int(token_M[(score_V[token_M] + noise_M).numpy().argmax()])


def choose_tokens_cpu(logits_RV, slot_R, knob_SK, seed_S, count_S, filters) -> torch.Tensor:
    """See the contract in `sample.py`."""
    slots, tokens = slot_R.tolist(), [0] * len(slot_R)
    rows = [
        Row(r, logits_RV[r], *knob_SK[slot, : MIN_P + 1].tolist(), keys_of(int(seed_S[slot]), int(count_S[slot])))
        for r, slot in enumerate(slots)
    ]
    for row in rows:
        if row.temperature <= 0:
            values = row.logits_V.numpy()
            best = int(values.argmax())
            tokens[row.index] = best if math.isfinite(values[best]) else -1
    rows = [row for row in rows if row.temperature > 0]
    few = [row for row in rows if filters and (row.top_k > 0 or row.top_p < 1 or row.min_p > 0)]
    whole = [row for row in rows if row not in few]
    for width in FEW:
        if few and width < logits_RV.shape[1]:
            few = _choose_among_few(logits_RV, few, width, tokens)
    for row in few + whole:
        tokens[row.index] = row.choose(row in few)
    return torch.tensor(tokens)


@np.errstate(divide="ignore", invalid="ignore")  # min-p of 0; rows where nothing is a number
def _choose_among_few(logits_RV: torch.Tensor, rows: list[Row], width: int, tokens: list[int]) -> list[Row]:
    """Choose for the rows all of whose candidates are among their best `width` tokens; returns the others."""
    same = len(rows) == len(logits_RV)
    own_NV = logits_RV if same else logits_RV.index_select(0, torch.tensor([row.index for row in rows]))
    value_NW, token_NW = (t.numpy() for t in best_tokens(own_NV, width + 1))
    temperature, top_k, top_p, min_p = np.array([row.knobs for row in rows], np.float32).T[:, :, None]
    score_NW = value_NW / temperature
    limited = (top_k > 0) & (top_k <= width)
    kth = np.take_along_axis(score_NW, np.clip(top_k.astype(np.int64) - 1, 0, width), 1)
    floor = np.where(limited, kth, np.float32(-np.inf))
    if (top_p < 1).any():
        mass_NW = np.exp((score_NW - score_NW[:, :1]).astype(np.float64)) * (score_NW >= floor)
        whole = [0.0 if few else row.mass() for row, few in zip(rows, limited[:, 0])]
        total = np.where(limited, mass_NW.sum(1, keepdims=True), np.array(whole)[:, None])
        inside_NW = (mass_NW.cumsum(1) - mass_NW < top_p * total) & (score_NW >= floor)
        last = np.maximum(inside_NW.sum(1, keepdims=True) - 1, 0)
        floor = np.where(top_p < 1, np.take_along_axis(score_NW, last, 1), floor)
    floor = np.maximum(floor, score_NW[:, :1] + np.log(min_p))
    beyond = (top_k > width) & (top_p < 1)  # their share is of more tokens than these
    sure = ((score_NW[:, -1:] < floor) & ~beyond)[:, 0]
    first, second = np.array([row.keys for row in rows], np.uint32).T[:, :, None]
    noisy_NW = np.where(score_NW >= floor, score_NW + gumbel_numpy(first, second, token_NW), -np.inf)
    for row, at, own in zip(rows, noisy_NW.argmax(1), token_NW):
        tokens[row.index] = int(own[at])
    return [row for row, known in zip(rows, sure) if not known]


def best_tokens(logits_NV: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest values of each row, falling, and their ids. They lie in the parts of the vocabulary whose own
    largest values are the largest, which are found much faster than they. Of equal last ones any may be meant."""
    num_parts = logits_NV.shape[1] // PART
    if num_parts <= 4 * width:
        return logits_NV.topk(width, 1)
    end = num_parts * PART
    peak_NB = logits_NV[:, :end].unflatten(1, (PART, num_parts)).amax(1)  # a part is every num_parts-th token
    part_NW = peak_NB.topk(width, 1, sorted=False).indices
    token_NX = (part_NW[:, :, None] + torch.arange(0, end, num_parts)).flatten(1)
    rest = torch.arange(end, logits_NV.shape[1]).expand(len(logits_NV), -1)
    token_NX = torch.cat([token_NX, rest], 1)
    top = logits_NV.gather(1, token_NX).topk(width, 1)
    return top.values, token_NX.gather(1, top.indices)


def _candidates(score_V: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Ids that pass the filters: all from a floor on."""
    width, top = score_V.numel(), score_V.max()
    floor = score_V.topk(top_k).values[-1] if 0 < top_k < width else score_V.min()
    if top_p < 1:
        best_N = score_V[score_V >= floor]
        total = best_N.logsumexp(0)
        best_N = _best(best_N, total, top_p)
        prob_N = (best_N - total).exp()
        floor = best_N[max(int((prob_N.cumsum(0) - prob_N < top_p).sum()), 1) - 1]
    if min_p > 0:
        floor = torch.maximum(floor, top + math.log(min_p))
    return (score_V >= floor).nonzero().squeeze(1)


def _best(score_N: torch.Tensor, total: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores in falling order, at least as many as hold the share `top_p`; few of them suffice nearly always."""
    for count in (1024, 16384):
        few = score_N.topk(min(count, score_N.numel())).values
        if few.numel() == score_N.numel() or float((few - total).exp().sum()) > top_p:
            return few
    return score_N.sort(descending=True).values
