"""One matrix of the model: a role (how it is cut over ranks) and a scheme (how its numbers are stored).

`Linear.__call__` computes, in this order, each step optional but the product:

    x = rms_norm(x, norm)          the gain is passed, never folded into the weights
    y = x @ W.T + bias
    y = act(y[:, :N/2]) * y[:, N/2:]      role gate_up
    y = y + residual

in one kernel where the scheme has one for these rows (`fuses`), op by op otherwise; the result is the same up to
rounding (op by op rounds to the activations' dtype between the steps). No all-reduce happens here: the executor adds
bias and residual of a row parallel matrix on one rank only, or after the sum.
Shape letters: T tokens (rows), K in features, N out features (2F for gate_up), F ffn size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagoda.kernels.act_mul import act_mul
from pagoda.kernels.rms_norm import rms_norm
from pagoda.kernels.small_linear import Extras
from pagoda.layers.schemes import SCHEMES, Tensors
from pagoda.layers.schemes.cut import COLUMN_PARALLEL, ROW_PARALLEL

ROLES = COLUMN_PARALLEL + ROW_PARALLEL

MAX_COUNTERS = 4096  # output tiles of one fused launch that may meet in a split sum


class Norm(NamedTuple):
    """The RMSNorm that stands before a matrix: its gain as it multiplies, and its epsilon."""

    weight_K: Tensor
    eps: float


class Linear:
    """A packed matrix, ready to multiply. `tensors` is the scheme's packed form, `bias` [N] or None in the activations'
    dtype (`dtype`); `counters` are the fused kernels' arrival counters: zero between
    launches, one stream at a time; None where these kernels do not run (CPU)."""

    def __init__(
        self,
        role: str,
        scheme: str,
        tensors: Tensors,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
    ):
        assert role in ROLES
        self.role = role
        self.scheme = SCHEMES[scheme]()
        self.tensors = tensors
        self.bias = bias
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        device = next(iter(tensors.values())).device
        self.counters = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device) if device.type == "cuda" else None

    @classmethod
    def pack(
        cls,
        role: str,
        scheme: str,
        canonical: Tensors,
        bias: Tensor | None,
        in_features: int,
        device: Any,
        dtype: torch.dtype,
    ) -> "Linear":
        """From the canonical form, fused and sharded. in_features: K of the activations (the canonical K may be padded
        to whole groups); dtype: of the activations."""
        out_features = next(iter(canonical.values())).shape[0] if scheme != "packed" else int(canonical["form"][-1])
        packed = SCHEMES[scheme]().pack(canonical, role, torch.device(device), dtype)
        bias = None if bias is None else bias.to(device=device, dtype=dtype)
        return cls(role, scheme, packed, bias, out_features, in_features, dtype)

    def __call__(
        self,
        x_TK: Tensor,
        *,
        norm: Norm | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        pdl: bool = False,
    ) -> Tensor:
        """y_TN (y_TF with `act`) in x's dtype. `out` may be `residual` itself (not x). pdl: launch early (programmatic
        dependent launch), only inside a chain of kernels that all wait for the one before."""
        assert x_TK.dim() == 2 and x_TK.shape[1] == self.in_features, (x_TK.shape, self.in_features)
        if self.fuses(x_TK.shape[0], norm is not None, act, residual is not None):
            if out is None:
                out = x_TK.new_empty(x_TK.shape[0], self.out_features // (2 if act else 1))
            self.scheme.fused(x_TK, self, self._extras(norm, act, residual, pdl), out)
            return out
        if norm is not None and not ((act or residual is not None) and self.fuses(x_TK.shape[0], True)):
            x_TK, norm = rms_norm(x_TK, norm.weight_K, norm.eps, early_launch=pdl), None
            if act or residual is not None:
                return self(x_TK, act=act, residual=residual, out=out)
        if act is None and residual is None:
            return self.scheme.matmul(x_TK, self, out)
        y = self(x_TK, norm=norm)
        if act is not None:
            y = act_mul(y, act, out if residual is None else None)
        return y if residual is None else torch.add(y, residual, out=out)

    def fuses(self, rows: int, norm: bool = False, act: str | None = None, residual: bool = False) -> bool:
        """Whether a call with these extras on this many rows is one kernel (and faster than op by op)."""
        return rows > 0 and self.scheme.fuses(rows, self, norm, act, residual)

    def _extras(self, norm: Norm | None, act: str | None, residual: Tensor | None, pdl: bool) -> Extras:
        """The same, as the fused kernels take it."""
        gain_K, eps = norm or (None, 0.0)
        return Extras(gain_K, eps, self.bias, act or "", None if residual is None else residual.contiguous(), pdl)

    def release(self) -> Tensors:
        """Give the tensors away, for who keeps them in another form: the matrix cannot multiply any more."""
        tensors, self.tensors = self.tensors, {}
        return tensors

    def dequantize(self) -> Tensor:
        """The matrix that is multiplied, float32 [N, K]: the oracle."""
        return self.scheme.dequantize(self.tensors, self)

    def nbytes(self) -> int:
        """Bytes that a step must read for this matrix."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
