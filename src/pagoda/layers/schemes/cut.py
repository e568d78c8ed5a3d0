"""How a dimension is divided over tensor parallel ranks: the rule that all schemes share."""

import torch.nn.functional as F
from torch import Tensor

COLUMN_PARALLEL = ("qkv", "gate_up", "head")  # split by outputs
ROW_PARALLEL = ("o", "down")  # split by inputs, summed over ranks afterwards


def cut_dim(role: str) -> int:
    """The dimension of [N, K] that `role` splits: 0 by outputs, 1 by inputs."""
    assert role in COLUMN_PARALLEL or role in ROW_PARALLEL, role
    return 0 if role in COLUMN_PARALLEL else 1


def share(size: int, world: int, unit: int = 1) -> int:
    """What each rank gets of `size`: whole units, as even as they go."""
    return -(-size // (unit * world)) * unit


def cut(tensor: Tensor, dim: int, rank: int, world: int, unit: int = 1) -> Tensor:
    """Rank's `share` of dimension `dim`, zeros past the end."""
    per = share(tensor.shape[dim], world, unit)
    start = min(rank * per, tensor.shape[dim])
    part = tensor.narrow(dim, start, min(per, tensor.shape[dim] - start))
    if part.shape[dim] < per:
        pad = [0, 0] * (tensor.dim() - 1 - dim) + [0, per - part.shape[dim]]
        part = F.pad(part, pad)
    return part
