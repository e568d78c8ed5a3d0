"""4-bit matrices in groups of 32, 64 or 128 inputs with zero points; activations of 16 (or 32) bit.

Canonical: see `schemes`. Packed on CUDA: {"q", "meta"} of `kernels.int4_layout`, plus "perm" as it is; elsewhere the
canonical tensors with float32 scales. Shape letters: N out features, K in features, Kp padded, G groups.
"""

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.errors import CheckpointError
from pagoda.kernels.int4_layout import GROUPS, pack_tiles, unpack_tiles
from pagoda.kernels.int4_linear import dequantize_int4, int4_linear_launch, supports
from pagoda.kernels.row_blocks import in_row_blocks
from pagoda.kernels.small_linear import Extras
from pagoda.kernels.triton_env import HAS_TRITON
from pagoda.layers.schemes.cut import cut, cut_dim, share
from pagoda.layers.schemes.int4_formats import Plain4, read_foreign

if TYPE_CHECKING:
    from pagoda.layers.linear import Linear

Tensors = dict[str, Tensor]
BLOCK_ELEMENTS = 1 << 22  # of a matrix opened at once on the CPU: 16 MB of float32


def nibbles(qweight: Tensor) -> Tensor:
    """[N, Kp/2] bytes to [N, Kp] values: the even k in the low nibble."""
    return torch.stack([qweight & 15, qweight >> 4], -1).flatten(-2)


def bytes_of(q_NK: Tensor) -> Tensor:
    """The inverse."""
    if sys.byteorder == "little" and q_NK.is_contiguous():  # two values a word: whole vectors at a time
        pair = q_NK.view(torch.int16)
        return ((pair >> 4) | pair).to(torch.uint8)
    return q_NK[:, 0::2] | (q_NK[:, 1::2] << 4)


def opened(canonical: Tensors) -> Tensor:
    """(q - zero) * scale, float32 [N, Kp], columns in their stored order."""
    q = nibbles(canonical["qweight"]).float()
    q = q.view(q.shape[0], canonical["scales"].shape[1], -1)
    q = (q - canonical["zeros"].float().unsqueeze(-1)) * canonical["scales"].float().unsqueeze(-1)
    return q.flatten(1)


def canonical_of(plain: Plain4) -> Tensors:
    """Any group size that 32 divides to 32, 64 or 128; inputs padded to whole groups."""
    q, scales, zeros, perm = plain
    k = q.shape[1]
    group = -(-k // scales.shape[1])
    if group % 32 and scales.shape[1] == 1:
        group += -group % 32  # one group a row: it may grow
    best = next((g for g in reversed(GROUPS) if group % g == 0), 0)
    if not best:
        raise CheckpointError(f"4-bit groups of {group} inputs are not supported: a multiple of 32 is needed.")
    q = F.pad(q, (0, scales.shape[1] * group - k))
    canonical = {
        "qweight": bytes_of(q).contiguous(),
        "scales": scales.contiguous().repeat_interleave(group // best, 1),
        "zeros": zeros.contiguous().repeat_interleave(group // best, 1),
    }
    if perm is not None:
        canonical["perm"] = F.pad(perm, (0, q.shape[1] - k), value=k).to(torch.int32)
    return canonical


def regroup(canonical: Tensors, group: int) -> Tensors:
    """Finer groups of the same numbers."""
    times = group_of(canonical) // group
    return canonical | {key: canonical[key].repeat_interleave(times, 1) for key in ("scales", "zeros")}


def group_of(canonical: Tensors) -> int:
    return canonical["qweight"].shape[1] * 2 // canonical["scales"].shape[1]


class Int4:
    """Contract: `Scheme`."""

    name = "int4"

    def load(self, parts: Tensors, quant: Any = None) -> Tensors:
        return canonical_of(read_foreign(parts, quant))

    def quantize(self, weight_NK: Tensor, group_size: int = 128) -> Tensors:
        """Asymmetric, range [min, max] of each group with 0 inside, scales kept in float16."""

        def rounds(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            w, missing = w_NK.float(), -w_NK.shape[1] % group_size
            w = (F.pad(w, (0, missing)) if missing else w).view(w.shape[0], -1, group_size)
            low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)  # one after the other: faster than aminmax
            scales = ((high - low) / 15).clamp(min=1e-6).half()
            step = scales.float()
            zeros = (-low / step).round().clamp(0, 15)
            q = (w / step.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 15)
            return bytes_of(q.to(torch.uint8).flatten(1)), scales, zeros.to(torch.uint8)

        qweight, scales, zeros = in_row_blocks(rounds, weight_NK)
        return {"qweight": qweight, "scales": scales, "zeros": zeros}

    def fuse(self, parts: list[Tensors]) -> Tensors:
        perm = parts[0].get("perm")
        if any(
            (perm is None) != ("perm" not in p) or (perm is not None and not torch.equal(perm, p["perm"]))
            for p in parts
        ):
            raise CheckpointError(
                "Matrices of one input (q, k, v or gate, up) have different activation orders: quantize the model "
                "again without desc_act, or with one order for all."
            )
        finest = min(group_of(p) for p in parts)
        parts = [regroup(p, finest) for p in parts]
        fused = {key: torch.cat([p[key] for p in parts]) for key in ("qweight", "scales", "zeros")}
        return fused if perm is None else fused | {"perm": perm}

    def shard(self, canonical: Tensors, role: str, rank: int, world: int, unit: int = 1) -> Tensors:
        """By inputs at group borders where these fall on the cut (finer groups of the same numbers if need be); else,
        and with an activation order, each rank keeps its inputs sorted by group, in padded groups of 32."""
        if cut_dim(role) == 0:
            return {k: t if k == "perm" else cut(t, 0, rank, world, unit) for k, t in canonical.items()}
        k = canonical["qweight"].shape[1] * 2
        per = share(k, world, unit)
        group = next((g for g in reversed(GROUPS) if per % g == 0 and group_of(canonical) % g == 0), 0)
        if "perm" in canonical or not group:
            return _gathered(canonical, rank * per, rank * per + per)
        canonical = regroup(canonical, group)
        return {
            "qweight": cut(canonical["qweight"], 1, rank, world, unit=per // 2),
            "scales": cut(canonical["scales"], 1, rank, world, unit=per // group),
            "zeros": cut(canonical["zeros"], 1, rank, world, unit=per // group),
        }

    def pack(self, canonical: Tensors, role: str, device: torch.device, dtype: torch.dtype) -> Tensors:
        moved = {key: t.to(device) for key, t in canonical.items()}
        if device.type != "cuda" or dtype == torch.float32:
            packed = {"qweight": moved["qweight"], "scales": moved["scales"].float(), "zeros": moved["zeros"]}
        else:
            q = nibbles(moved["qweight"])
            packed = pack_tiles(q, moved["scales"], moved["zeros"], role == "gate_up", dtype)
        if "perm" in moved:
            packed["perm"] = moved["perm"].long()
        return packed

    def matmul(self, x_TK: Tensor, linear: "Linear", out: Tensor | None = None) -> Tensor:
        packed, n = linear.tensors, linear.out_features
        if "q" not in packed:
            y = _matmul_blocks(_gather(x_TK, packed), packed, linear.bias)
            return y if out is None else out.copy_(y)
        x_TK = _gather(x_TK, packed)
        glu = linear.role == "gate_up"
        w_NK = dequantize_int4(packed["q"], packed["meta"], n, x_TK.shape[1], glu, x_TK.dtype)
        y = F.linear(x_TK, w_NK, linear.bias)
        return y if out is None else out.copy_(y)

    def fuses(self, rows: int, linear: "Linear", norm: bool, act: str | None, residual: bool) -> bool:
        packed = linear.tensors
        if "q" not in packed or linear.counters is None or not HAS_TRITON or (norm and "perm" in packed):
            return False
        return supports(rows, linear.dtype, norm)

    def fused(self, x_TK: Tensor, linear: "Linear", extras: Extras, out: Tensor) -> None:
        packed = linear.tensors
        x_TK = _gather(x_TK, packed).contiguous()
        glu = linear.role == "gate_up"
        int4_linear_launch(x_TK, packed["q"], packed["meta"], linear.out_features, glu, extras, out, linear.counters)

    def dequantize(self, packed: Tensors, linear: "Linear") -> Tensor:
        n, k, perm = linear.out_features, linear.in_features, packed.get("perm")
        width = k if perm is None else perm.numel()
        if "q" in packed:
            w = unpack_tiles(packed["q"], packed["meta"], n, width, linear.role == "gate_up", linear.dtype)
        else:
            w = opened(packed)[:, :width]
        if perm is None:
            return w
        natural = torch.zeros(n, k + 1, device=w.device)
        natural[:, perm] = w
        return natural[:, :k]


def _gather(x_TK: Tensor, packed: Tensors) -> Tensor:
    """x in the order of the matrix's columns, where that is not its own; the place after the last input is 0."""
    perm = packed.get("perm")
    return x_TK if perm is None else F.pad(x_TK, (0, 1)).index_select(1, perm)


def _matmul_blocks(x_TK: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
    """Opens a few rows of the matrix at a time: memory stays bounded."""
    n, half = packed["qweight"].shape
    rows = max(1, BLOCK_ELEMENTS // (2 * half))
    y = x_TK.new_empty(x_TK.shape[0], n)
    for i in range(0, n, rows):
        w = opened({key: t[i : i + rows] for key, t in packed.items() if key != "perm"})[:, : x_TK.shape[1]]
        y[:, i : i + rows] = F.linear(x_TK, w.to(x_TK.dtype))
    return y if bias is None else y + bias


def _gathered(canonical: Tensors, start: int, stop: int) -> Tensors:
    """The columns of inputs start..stop-1, each group's in padded groups of 32, with their order as `perm`."""
    q, group = nibbles(canonical["qweight"]), group_of(canonical)
    perm = canonical.get("perm")
    perm = torch.arange(q.shape[1], dtype=torch.int32, device=q.device) if perm is None else perm
    columns, owners, order = [], [], []
    for g in range(canonical["scales"].shape[1]):
        inputs = perm[g * group : (g + 1) * group]
        mine = ((inputs >= start) & (inputs < stop)).nonzero().flatten()
        padded = F.pad(mine + g * group, (0, -len(mine) % 32), value=-1)
        columns.append(padded)
        order.append(F.pad(inputs[mine] - start, (0, len(padded) - len(mine)), value=stop - start))
        owners += [g] * (len(padded) // 32)
    if not owners:  # a rank past the last input: one group that multiplies zeros
        columns, owners = [perm.new_zeros(32, dtype=torch.long)], [0]
        order = [perm.new_full((32,), stop - start)]
    column, owner = torch.cat(columns), torch.tensor(owners, dtype=torch.long, device=q.device)
    return {
        "qweight": bytes_of(q[:, column]),  # a padding place holds some value; its input is 0
        "scales": canonical["scales"][:, owner],
        "zeros": canonical["zeros"][:, owner],
        "perm": torch.cat(order).to(torch.int32),
    }
