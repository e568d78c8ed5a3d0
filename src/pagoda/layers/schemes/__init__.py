"""Weight schemes: how the numbers of a matrix are stored and multiplied. Roles cut, schemes pack; neither knows
the other.

A matrix has three forms, each a `dict[str, Tensor]`:

  foreign    as a checkpoint has it (`load` reads it),
  canonical  one plain form per scheme, independent of device and role (workspaces store it; `quantize` makes it
             from a dense matrix; `fuse` and `shard` keep it),
  packed     for the kernels of one device (`pack` makes it; `matmul`, `fused` and `dequantize` read it).

Canonical tensors per scheme (N out features, K in features, Kp = K padded to whole groups, G groups of a row):

  dense  weight [N, K] floating
  int4   qweight uint8 [N, Kp/2], two a byte: the even k in the low nibble; value (q - zero) * scale
         scales [N, G] floating, zeros uint8 [N, G]; with act-order perm int32 [Kp]: column j belongs to input perm[j],
         or to none where perm[j] = K
  int8   qweight int8 [N, K], scales float32 [N] (symmetric, one a row)
  fp8    qweight float8_e4m3fn [N, K]; scales float32 [N] (one a row) or [N, ceil(K/128)] (groups of 128 inputs);
         value q * scale; optional input_scale float32 [] (static activations: x = q_x * input_scale)
  packed  any of the first three as the C++ step of CPUs reads it (workspaces that are written for CPUs)

A bias is not part of a scheme: the linear keeps it. Adding a scheme is one class here and one kernel.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pagoda.kernels.small_linear import Extras
from pagoda.layers.schemes.dense import Dense
from pagoda.layers.schemes.eight_bit import Fp8, Int8
from pagoda.layers.schemes.int4 import Int4
from pagoda.layers.schemes.packed import Packed

if TYPE_CHECKING:
    from pagoda.layers.linear import Linear

Tensors = dict[str, Tensor]


class Scheme(Protocol):
    """Instances hold no state."""

    name: str

    def load(self, parts: Tensors, quant: Any = None) -> Tensors:
        """Foreign to canonical. parts: the tensors of one matrix by their last name (`qweight`, `weight_packed`, ...)
        without bias; quant: the QuantSpec (reads .method, .group_size, .format where present). CheckpointError when
        the parts do not fit together."""

    def quantize(self, weight_NK: Tensor, group_size: int = 128) -> Tensors:
        """Round to nearest from a dense matrix, on its device."""

    def fuse(self, parts: list[Tensors]) -> Tensors:
        """Canonical matrices of one K stacked along N (q, k, v; gate, up)."""

    def shard(self, canonical: Tensors, role: str, rank: int, world: int, unit: int = 1) -> Tensors:
        """Rank's part of one unfused canonical matrix: column parallel roles by N, row parallel by K. Every rank gets
        ceil(size / unit / world) * unit, filled with zeros past the end; unit is the smallest run that stays whole (a
        head, a group)."""

    def pack(self, canonical: Tensors, role: str, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Canonical (fused, sharded) to packed; dtype is that of the activations."""

    def matmul(self, x_TK: Tensor, linear: "Linear", out: Tensor | None = None) -> Tensor:
        """x @ W.T + bias, any number of rows, contiguous x."""

    def fuses(self, rows: int, linear: "Linear", norm: bool, act: str | None, residual: bool) -> bool:
        """Whether `fused` takes this combination in one kernel and is the faster way."""

    def fused(self, x_TK: Tensor, linear: "Linear", extras: Extras, out: Tensor) -> None:
        """One kernel for everything, written to `out`; called only where `fuses` said yes."""

    def dequantize(self, packed: Tensors, linear: "Linear") -> Tensor:
        """The matrix that is multiplied, float32 [N, K], rows in their canonical order: the oracle."""


SCHEMES: dict[str, type] = {"dense": Dense, "int4": Int4, "int8": Int8, "fp8": Fp8, "packed": Packed}
