"""Groups of weights to 4 bit: codes, scales and zero points, and how far each group's range should be clipped.

value = (q - zero) * scale, q in 0..15. Scales have the precision of bfloat16 and the range of float16, so that every
engine multiplies by the same number. Legend: N out features, K in features, G groups of g inputs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.layers.schemes import Tensors
from pagoda.layers.schemes.int4 import bytes_of

SHRINK = tuple(1 - i / 20 for i in range(11))  # shares of a group's range that the clipping search tries
ROWS = 2048  # of a matrix that the search holds open


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
    """(scales float16, zeros uint8), [N, G], of the ranges [min, max] with 0 inside, times `shrink` (a number or
    [N, G])."""
    low, high = w_NGg.amin(-1).clamp(max=0) * shrink, w_NGg.amax(-1).clamp(min=0) * shrink
    scales = ((high - low) / 15).clamp(min=1e-6).bfloat16().half()
    return scales, (-low / scales.float()).round().clamp(least_zero, 15).to(torch.uint8)


def encode(w_NGg: Tensor, scales_NG: Tensor, zeros_NG: Tensor) -> Tensor:
    """The nearest codes, uint8 [N, G, g]."""
    q = (w_NGg / scales_NG.float().unsqueeze(-1)).round() + zeros_NG.float().unsqueeze(-1)
    return q.clamp(0, 15).to(torch.uint8)


def round_groups(w_NK: Tensor, group: int, shrink_NG: Tensor | float = 1.0) -> Codes:
    """To nearest. A last group that K does not fill is padded with zeros."""
    w_NGg = F.pad(w_NK.float(), (0, -w_NK.shape[1] % group)).unflatten(1, (-1, group))
    scales, zeros = grid(w_NGg, shrink_NG)
    return Codes(encode(w_NGg, scales, zeros).flatten(1), scales, zeros)


def rounded(w_NK: Tensor, group: int) -> Tensor:
    """The values of the codes, float32 [N, K]."""
    return round_groups(w_NK, group).values()[:, : w_NK.shape[1]]


def search_clip(w_NK: Tensor, second_Ggg: Tensor, first_row: int = 0) -> Tensor:
    """Shrink [N, G] that makes the group's share of the output error least: d H d', d the error of the weights, H
    (`second_Ggg`) the sum of x x' over the group's inputs. Rows before `first_row` keep their range."""
    group = second_Ggg.shape[-1]
    w_NGg = w_NK.float().unflatten(1, (-1, group))
    best = torch.ones(w_NGg.shape[:2], device=w_NK.device)
    for start in range(first_row, len(w_NGg), ROWS):
        part = w_NGg[start : start + ROWS]
        least = torch.full(part.shape[:2], torch.inf, device=w_NK.device)
        for shrink in SHRINK:
            scales, zeros = grid(part, shrink)
            codes = Codes(encode(part, scales, zeros).flatten(1), scales, zeros)
            d = codes.values().view_as(part) - part
            error = (torch.einsum("ngi,gij->ngj", d, second_Ggg) * d).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best[start : start + ROWS] = torch.where(better, shrink, best[start : start + ROWS])
    return best
