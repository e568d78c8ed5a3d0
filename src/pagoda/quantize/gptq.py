"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, each one's error fed back into those to come.

The feedback is that of optimal brain surgery with H = sum of x x': with U the upper Cholesky factor of the inverse of
H (damped), column j's error e = (w_j - q_j) / U_jj changes the later columns by -e U_j. With activation order the
columns with the largest inputs come first and groups are runs of that order.
Legend: N out features, K in features, G groups.
"""

import torch
from torch import Tensor

from pagoda.errors import UsageError
from pagoda.layers.schemes import Tensors
from pagoda.quantize.moments import damped_cholesky
from pagoda.quantize.rounding import Codes, encode, grid

SHRINK = tuple(1 - i / 20 for i in range(11))  # shares of a group's range that are tried
SPAN = 128  # columns between two updates of the whole rest: whole groups
DAMPING = 0.01  # of the mean of H's diagonal


def gptq(weight_NK: Tensor, second_KK: Tensor, group: int, act_order: bool) -> Tensors:
    """Canonical int4 tensors; with `act_order` also `perm` (column j belongs to input perm[j]). K must be a multiple of
    `group`. Zero points are at least 1, so that checkpoints which store them minus one can hold them."""
    w = weight_NK.float().clone()
    diagonal = second_KK.diagonal().clone()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(diagonal), device=w.device)
    w = w[:, order]
    factor = _factor(second_KK, order)
    q = torch.zeros_like(w, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, w.shape[1], SPAN):
        stop = min(start + SPAN, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            if j % group == 0:
                span = slice(j, j + group)
                scale, zero = _range(w[:, span], diagonal[order[span]])
                scales.append(scale)
                zeros.append(zero)
            column = w[:, j : j + 1]
            code = encode(column[:, None], scale, zero)[:, 0]
            value = (code.float() - zero.float()) * scale.float()
            q[:, j : j + 1] = code
            error = (column - value) / factor[j, j]
            w[:, j:stop] -= error * factor[j, j:stop]
            errors[:, j - start : j - start + 1] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    if act_order:  # the inputs of a group in their own order, as readers of the checkpoint find them: the same sums
        within = order.view(-1, group).argsort(1) + torch.arange(0, len(order), group, device=w.device)[:, None]
        q, order = q[:, within.flatten()], order[within.flatten()]
    codes = Codes(q, torch.cat(scales, 1), torch.cat(zeros, 1)).canonical()
    return codes | {"perm": order.to(torch.int32)} if act_order else codes


def _factor(second_KK: Tensor, order_K: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped H in the given order; more damping where it is singular."""
    for damping in (DAMPING, 10 * DAMPING, 1.0):
        lower = damped_cholesky(second_KK[order_K][:, order_K], (damping, 1.0))
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if int(failed) == 0:
            return upper
    raise UsageError("GPTQ's matrix of second moments cannot be inverted: calibrate with more text.")


def _range(w_Ng: Tensor, weight_g: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, zeros) [N, 1] of one group, clipped where the error weighted by the inputs' power gets smaller."""
    w = w_Ng[:, None]
    least = torch.full((len(w), 1), torch.inf, device=w.device)
    best = grid(w, 1.0, least_zero=1)
    for shrink in SHRINK:
        scales, zeros = grid(w, shrink, least_zero=1)
        d = Codes(encode(w, scales, zeros).flatten(1), scales, zeros).values() - w_Ng
        error = (d.square() * weight_g).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, scales, best[0]), torch.where(better, zeros, best[1]))
    return best
