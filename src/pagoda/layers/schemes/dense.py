"""Matrices of 32 or 16 bit floating point numbers."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.errors import CheckpointError
from pagoda.kernels.small_linear import Extras, small_linear_launch, supports
from pagoda.kernels.triton_env import HAS_TRITON
from pagoda.layers.schemes.cut import cut, cut_dim

if TYPE_CHECKING:
    from pagoda.layers.linear import Linear

Tensors = dict[str, Tensor]


class Dense:
    """Contract: `Scheme`. Canonical {"weight" [N, K]}; packed the same in the activations' dtype, contiguous."""

    name = "dense"

    def load(self, parts: Tensors, quant: Any = None) -> Tensors:
        if set(parts) != {"weight"}:
            raise CheckpointError(f"A dense matrix has one tensor 'weight', this one has {sorted(parts)}.")
        return dict(parts)

    def quantize(self, weight_NK: Tensor, group_size: int = 128) -> Tensors:
        return {"weight": weight_NK}

    def fuse(self, parts: list[Tensors]) -> Tensors:
        return {"weight": torch.cat([p["weight"] for p in parts])}

    def shard(self, canonical: Tensors, role: str, rank: int, world: int, unit: int = 1) -> Tensors:
        return {"weight": cut(canonical["weight"], cut_dim(role), rank, world, unit)}

    def pack(self, canonical: Tensors, role: str, device: torch.device, dtype: torch.dtype) -> Tensors:
        return {"weight": canonical["weight"].to(device=device, dtype=dtype).contiguous()}

    def matmul(self, x_TK: Tensor, linear: "Linear", out: Tensor | None = None) -> Tensor:
        if out is None or out.dtype != x_TK.dtype or linear.bias is not None:
            y = F.linear(x_TK, linear.tensors["weight"], linear.bias)
            return y if out is None else out.copy_(y)
        return torch.mm(x_TK, linear.tensors["weight"].t(), out=out)

    def fuses(self, rows: int, linear: "Linear", norm: bool, act: str | None, residual: bool) -> bool:
        w = linear.tensors["weight"]
        return (
            linear.counters is not None and HAS_TRITON and supports(rows, *w.shape, w.dtype, norm, act or "", residual)
        )

    def fused(self, x_TK: Tensor, linear: "Linear", extras: Extras, out: Tensor) -> None:
        small_linear_launch(x_TK.contiguous(), linear.tensors["weight"], extras, out, linear.counters)

    def dequantize(self, packed: Tensors, linear: "Linear") -> Tensor:
        return packed["weight"].float()
