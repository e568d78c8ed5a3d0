"""Matrices of 8 bit that multiply activations of 8 bit: int8 (W8A8) and float8 e4m3.

Canonical: see `schemes`; packed: the same tensors on the device, scales float32. Activations are quantized a row (or a
row and 128 inputs, for float8 scales of that form) at a time as they come, or by the checkpoint's static `input_scale`.
A rank takes the scale of its own inputs: no larger than that of the whole row, so its codes are no coarser, and no
exchange stands before the product.
Shape letters: T rows, N out features, K in features, G groups of 128 inputs.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pagoda.errors import CheckpointError
from pagoda.kernels.eight_bit_linear import FEW_ROWS, eight_bit_linear, scaled
from pagoda.kernels.quantize_rows import GROUP, quantize_rows, quantize_rows_reference
from pagoda.kernels.row_blocks import in_row_blocks
from pagoda.kernels.small_linear import Extras
from pagoda.kernels.triton_env import HAS_TRITON
from pagoda.layers.schemes.cut import cut, cut_dim, share

if TYPE_CHECKING:
    from pagoda.layers.linear import Linear

Tensors = dict[str, Tensor]
KNOWN = {"weight", "weight_scale", "weight_scale_inv", "input_scale", "weight_zero_point", "weight_shape"}


class EightBit:
    """Contract: `Scheme`. One class for both kinds; `Int8` and `Fp8` name theirs."""

    name: str
    kind: torch.dtype

    def load(self, parts: Tensors, quant: Any = None) -> Tensors:
        """compressed-tensors (int-quantized, float-quantized) and fp8 checkpoints: `weight` with `weight_scale` (or
        `weight_scale_inv`, which multiplies too) per tensor, row, or block of 128 x 128; `input_scale` where static."""
        weight = parts.get("weight")
        scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
        if weight is None or scale is None or weight.dtype != self.kind or set(parts) - KNOWN:
            have = {name: str(t.dtype).removeprefix("torch.") for name, t in sorted(parts.items())}
            raise CheckpointError(
                f"An {self.name} matrix needs weight ({self.name}) and weight_scale; this has {have}."
            )
        if "weight_zero_point" in parts and bool(parts["weight_zero_point"].any()):
            raise CheckpointError(f"Asymmetric {self.name} weights (zero points other than 0) are not supported.")
        canonical = {"qweight": weight, "scales": self._scales(scale.float(), *weight.shape)}
        if "input_scale" in parts:
            canonical["input_scale"] = parts["input_scale"].float().max()
        return canonical

    def _scales(self, scale: Tensor, n: int, k: int) -> Tensor:
        blocks = (-(-n // GROUP), -(-k // GROUP))
        if scale.numel() in (1, n) and tuple(scale.shape) != blocks:
            return scale.flatten().expand(n).contiguous()
        if scale.numel() == 1:
            return scale.flatten().expand(n).contiguous()
        if tuple(scale.shape) == blocks and self.kind == torch.float8_e4m3fn:
            return scale.repeat_interleave(GROUP, 0)[:n].contiguous()
        raise CheckpointError(
            f"The scales of an {self.name} matrix {[n, k]} have the shape {list(scale.shape)}: one for the tensor or "
            "one a row is supported, and for fp8 one a block of 128 x 128."
        )

    def quantize(self, weight_NK: Tensor, group_size: int = 128) -> Tensors:
        qweight, scales = in_row_blocks(lambda w: quantize_rows_reference(w, self.kind), weight_NK)
        return {"qweight": qweight, "scales": scales}

    def fuse(self, parts: list[Tensors]) -> Tensors:
        if len({p["scales"].dim() for p in parts}) > 1 or len({"input_scale" in p for p in parts}) > 1:
            raise CheckpointError("Matrices of one input (q, k, v or gate, up) are not quantized alike.")
        fused = {key: torch.cat([p[key].view(_raw(p[key])) for p in parts]) for key in ("qweight", "scales")}
        fused["qweight"] = fused["qweight"].view(self.kind)
        if "input_scale" in parts[0]:
            fused["input_scale"] = torch.stack([p["input_scale"] for p in parts]).max()
        return fused

    def shard(self, canonical: Tensors, role: str, rank: int, world: int, unit: int = 1) -> Tensors:
        dim = cut_dim(role)
        q, scales = canonical["qweight"], canonical["scales"]
        per = share(q.shape[dim], world, unit)
        part = dict(canonical, qweight=cut(q.view(torch.uint8), dim, rank, world, unit).view(self.kind))
        if dim == 0:
            part["scales"] = cut(scales, 0, rank, world, unit)
        elif scales.dim() == 2:
            if per % GROUP:
                raise CheckpointError(
                    f"Blocks of {GROUP} inputs cannot be cut into parts of {per}: choose another number of GPUs."
                )
            part["scales"] = cut(scales, 1, rank, world, per // GROUP)
        return part

    def pack(self, canonical: Tensors, role: str, device: torch.device, dtype: torch.dtype) -> Tensors:
        return {key: t.to(device).contiguous() for key, t in canonical.items()}

    def matmul(self, x_TK: Tensor, linear: "Linear", out: Tensor | None = None) -> Tensor:
        out = x_TK.new_empty(x_TK.shape[0], linear.out_features) if out is None else out
        self.fused(x_TK, linear, Extras(bias_N=linear.bias), out)
        return out

    def fuses(self, rows: int, linear: "Linear", norm: bool, act: str | None, residual: bool) -> bool:
        """The norm always goes into the quantization of the rows; the rest where our own kernel multiplies."""
        if linear.counters is None or not HAS_TRITON or linear.dtype == torch.float32:
            return False
        library = self.kind == torch.float8_e4m3fn and rows > FEW_ROWS and linear.tensors["scales"].dim() == 1
        return not library or not (act or residual)

    def fused(self, x_TK: Tensor, linear: "Linear", extras: Extras, out: Tensor) -> None:
        packed = linear.tensors
        grouped = packed["scales"].dim() == 2
        norm = None if extras.gain_K is None else (extras.gain_K, extras.eps)
        qx_TK, sx = quantize_rows(x_TK, self.kind, norm, grouped, packed.get("input_scale"), extras.pdl)
        rest = extras._replace(gain_K=None)
        eight_bit_linear(qx_TK, sx, packed["qweight"], packed["scales"], rest, out, linear.counters)

    def dequantize(self, packed: Tensors, linear: "Linear") -> Tensor:
        return scaled(packed["qweight"], packed["scales"])


class Int8(EightBit):
    name = "int8"
    kind = torch.int8


class Fp8(EightBit):
    name = "fp8"
    kind = torch.float8_e4m3fn


def _raw(t: Tensor) -> torch.dtype:
    """A type of the same width that every operation of torch knows."""
    return torch.uint8 if t.element_size() == 1 else t.dtype
