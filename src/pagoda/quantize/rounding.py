"""Groups of weights to 4 bit: codes, scales and zero points, and the search for each group's range.

value = (q - zero) * scale, q in 0..15. Scales have the precision of bfloat16 and the range of float16, so that every
engine multiplies by the same number. Legend: N out features, K in features, G groups of g inputs, R ranges tried.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.layers.schemes import Tensors
from pagoda.layers.schemes.int4 import bytes_of

SHARES = tuple(1.1 - i / 40 for i in range(21))  # of a group's range, and
SHIFTS = (0, -1, 1)  # of its zero point: what the search tries
OPEN = {"cuda": 1 << 24, "cpu": 1 << 18}  # numbers that the search holds open at once


class Codes(NamedTuple):
    """q uint8 [N, K], scales float16 [N, G], zeros uint8 [N, G]."""

    q_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor

    def values(self) -> Tensor:
        """float32 [N, K]."""
        q = self.q_NK.float().unflatten(1, (self.scales_NG.shape[1], -1)) - self.zeros_NG.float().unsqueeze(-1)
        return (q * self.scales_NG.float().unsqueeze(-1)).flatten(1)

    def canonical(self) -> Tensors:
        """As the int4 scheme keeps it."""
        return {"qweight": bytes_of(self.q_NK), "scales": self.scales_NG, "zeros": self.zeros_NG}


def grid(w_NGg: Tensor, shrink: Tensor | float = 1.0, least_zero: int = 0) -> tuple[Tensor, Tensor]:
    """(scales float16, zeros uint8), [N, G], of the ranges [min, max] with 0 inside, times `shrink` (a number, or one
    for each of R ranges [R, 1, 1]: the result is [R, N, G])."""
    low, high = w_NGg.amin(-1).clamp(max=0) * shrink, w_NGg.amax(-1).clamp(min=0) * shrink
    scales = ((high - low) / 15).clamp(min=1e-6).bfloat16().half()
    return scales, (-low / scales.float()).round().clamp(least_zero, 15).to(torch.uint8)


def encode(w_NGg: Tensor, scales_NG: Tensor, zeros_NG: Tensor) -> Tensor:
    """The nearest codes, uint8 [N, G, g]."""
    q = (w_NGg / scales_NG.float().unsqueeze(-1)).round() + zeros_NG.float().unsqueeze(-1)
    return q.clamp(0, 15).to(torch.uint8)


def round_groups(w_NK: Tensor, group: int) -> Codes:
    """To nearest. A last group that K does not fill is padded with zeros."""
    w_NGg = F.pad(w_NK.float(), (0, -w_NK.shape[1] % group)).unflatten(1, (-1, group))
    scales, zeros = grid(w_NGg)
    return Codes(encode(w_NGg, scales, zeros).flatten(1), scales, zeros)


def rounded(w_NK: Tensor, group: int) -> Tensor:
    """The values of the codes, float32 [N, K]."""
    return round_groups(w_NK, group).values()[:, : w_NK.shape[1]]


def search_ranges(w_NK: Tensor, second_KK: Tensor, group: int) -> Codes:
    """To nearest, in the ranges that make the output's error least: of each row, d H d' with d the error of its weights
    and H (`second_KK`) the sum of x x'. Groups take turns, each counting the others' errors as they stand."""
    codes = round_groups(w_NK, group)
    error_NK = codes.values() - w_NK
    rows = max(1, OPEN[w_NK.device.type] // (len(SHARES) * len(SHIFTS) * group))
    for g, start in enumerate(range(0, w_NK.shape[1], group)):
        span = slice(start, start + group)
        h_gg = second_KK[span, span]
        pull_Ng = 2 * (error_NK @ second_KK[:, span] - error_NK[:, span] @ h_gg)
        for part in (slice(i, i + rows) for i in range(0, len(w_NK), rows)):
            best, error_NK[part, span] = _best_range(w_NK[part, span].float(), h_gg, pull_Ng[part])
            codes.q_NK[part, span], codes.scales_NG[part, g], codes.zeros_NG[part, g] = best
    return codes


def _best_range(w_Ng: Tensor, h_gg: Tensor, pull_Ng: Tensor) -> tuple[Codes, Tensor]:
    """The codes of one group (scales and zeros [N]) with the least d H d' + pull d', and their error d [N, g]."""
    scales, zeros = grid(w_Ng, torch.tensor(SHARES, device=w_Ng.device)[:, None])
    shifts = torch.tensor(SHIFTS, device=w_Ng.device)[:, None, None]
    zeros_RN = (zeros + shifts).clamp(0, 15).to(torch.uint8).flatten(0, 1)
    scales_RN = scales.repeat(len(SHIFTS), 1)
    s, z = scales_RN.float().unsqueeze(-1), zeros_RN.float().unsqueeze(-1)
    d_RNg = (w_Ng / s).round_().clamp_(-z, 15 - z).mul_(s).sub_(w_Ng)  # of encode's codes, in place
    loss_RN = (d_RNg @ h_gg).add_(pull_Ng).mul_(d_RNg).sum(-1)
    at = loss_RN.argmin(0), torch.arange(len(w_Ng), device=w_Ng.device)
    scales_N, zeros_N = scales_RN[at], zeros_RN[at]
    return Codes(encode(w_Ng, scales_N, zeros_N), scales_N, zeros_N), d_RNg[at]
