"""Matrices that were packed for the C++ step of CPUs when their workspace was written."""

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Packed:
    """A matrix and its bias as `kernels.cpu.pack.PackedWeight.to_file` gives them. Only the C++ step multiplies them,
    so of `Scheme` there is `pack` alone, and that has nothing left to do."""

    name = "packed"

    def pack(self, canonical: Tensors, role: str, device: torch.device, dtype: torch.dtype) -> Tensors:
        return canonical
