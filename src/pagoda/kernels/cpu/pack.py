"""Canonical weights to the layout that the C++ step reads (see linear.h): blocks of 16 output rows.

Legend: N output rows, K input columns, G groups of a row.
"""

import ctypes
import math
import mmap
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.kernels.row_blocks import in_row_blocks

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
W8, W4, I8 = 3, 4, 5
BITS = {0: 32, 1: 16, 2: 16, W8: 8, W4: 4}  # of a weight, by kind
PARTS = ("q", "scales", "zeros", "bias", "perm")
MIN_GROUP = 32  # columns that the integer kernels take at once
HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14


class WeightStruct(ctypes.Structure):
    """`Weight` of linear.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "rows", "cols", "in_", "group")]
    _fields_ += [("unit", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("q", "scales", "zeros", "bias", "perm")]


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a contiguous tensor lie."""
    assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu")
    return None if tensor is None else tensor.data_ptr()


@dataclass
class PackedWeight:
    """One matrix for the C++ step. Owns its memory: keep it as long as a table points to it."""

    kind: int
    rows: int  # padded to 16; with `glu` both halves are
    cols: int
    in_features: int
    q: Tensor
    group: int = 0
    unit: float = 1.0
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None
    perm: Tensor | None = None
    struct: WeightStruct = field(init=False)

    def __post_init__(self) -> None:
        pointers = (address(t) for t in (self.q, self.scales, self.zeros, self.bias, self.perm))
        self.struct = WeightStruct(
            self.kind, self.rows, self.cols, self.in_features, self.group, self.unit, *pointers
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """All that it owns."""
        return [t for t in (self.q, self.scales, self.zeros, self.bias, self.perm) if t is not None]

    def to_file(self, out_features: int) -> dict[str, Tensor]:
        """Everything as tensors by name, for a file. `out_features`: rows of the matrix without padding, which `form`
        [kind, rows, cols, in_features, group, unit, out_features] remembers beside what the kernels need."""
        numbers = (self.kind, self.rows, self.cols, self.in_features, self.group, self.unit, out_features)
        return {"form": torch.tensor(numbers, dtype=torch.float64)} | {
            name: t for name in PARTS if (t := getattr(self, name)) is not None
        }

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor], arena: "Arena | None" = None) -> "PackedWeight":
        """What `to_file` gave, copied to the arena where there is one. ValueError where the tensors do not belong
        together."""
        if not {"form", "q"} <= set(tensors) <= {"form", *PARTS}:
            raise ValueError("its parts are not those of a packed matrix")
        kind, rows, cols, in_features, group, unit, _ = tensors["form"].tolist()
        parts = {name: t for name, t in tensors.items() if name != "form"}
        if arena is not None:
            parts = {name: arena.take(*t.shape, dtype=t.dtype).copy_(t) for name, t in parts.items()}
        made = cls(int(kind), int(rows), int(cols), int(in_features), group=int(group), unit=unit, **parts)
        made._check_sizes()
        return made

    def _check_sizes(self) -> None:
        """ValueError unless every part has the size that the kernels read."""
        if self.kind not in BITS or self.cols < 1 or self.rows % 16 or self.in_features > self.cols:
            raise ValueError(f"a matrix of kind {self.kind} cannot be {self.rows} by {self.cols}")
        groups = self.cols // self.group if self.group else 0
        wanted = {
            "q": self.rows * self.cols * BITS[self.kind] // 8,
            "scales": self.rows * groups * 2,
            "zeros": self.rows * groups,
            "bias": self.rows * 4,
            "perm": self.cols * 4,
        }
        needed = {"q", "scales"} if self.kind in (W8, W4) else {"q"}
        for name, nbytes in wanted.items():
            part = getattr(self, name)
            if part.nbytes != nbytes if part is not None else name in needed:
                raise ValueError(f"its {name} are not of {nbytes} bytes")


def _padded(t: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros after the end of a dimension, up to a multiple; the tensor itself where none are missing."""
    missing = -t.shape[dim] % multiple
    return F.pad(t, (0, 0) * (t.dim() - 1 - dim) + (0, missing)) if missing else t


def _rows16(t: Tensor, glu: bool) -> Tensor:
    """[N, ...] with zero rows up to a multiple of 16; `glu`: 16 rows of the first half, then 16 of the second."""
    if not glu:
        return _padded(t, 0, 16)
    halves = [_rows16(half, False) for half in t.chunk(2)]
    return torch.stack([half.view(-1, 16, *t.shape[1:]) for half in halves], 1).flatten(0, 2)


class Arena:
    """Memory for a model's packed weights, one behind the other in huge pages where the kernel has them: weights in
    small pages read a tenth slower. Memory is taken where it is first written and goes with the last tensor in it."""

    def __init__(self, chunk: int = 64 << 20):
        self._chunk, self._rest = chunk, torch.empty(0, dtype=torch.uint8)

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros that begin on a multiple of 64 bytes."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > len(self._rest):
            size = max(self._chunk, nbytes)
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory, the default, has no huge pages
            chunk = torch.frombuffer(mmap.mmap(-1, size + HUGE_PAGE, private), dtype=torch.uint8)
            self._rest = chunk[-chunk.data_ptr() % HUGE_PAGE :][:size]
            if sys.platform == "linux":  # without effect where there are no huge pages
                start, size = ctypes.c_void_p(self._rest.data_ptr()), ctypes.c_size_t(size)
                ctypes.CDLL(None).madvise(start, size, MADV_HUGEPAGE)
        taken, self._rest = self._rest[:nbytes], self._rest[-(-nbytes // 64) * 64 :]
        return taken.view(dtype).view(shape)


def return_freed_memory() -> None:
    """Tell the C library (glibc) to give what was freed back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _blocks(t: Tensor, arena: Arena | None) -> Tensor:
    """[N, M] -> [N/16, M, 16]: the 16 rows of a block side by side."""
    blocks = t.view(t.shape[0] // 16, 16, t.shape[1]).transpose(1, 2)
    return (arena or Arena()).take(*blocks.shape, dtype=t.dtype).copy_(blocks)


def _pack_bias(bias: Tensor | None, glu: bool) -> Tensor | None:
    return None if bias is None else _rows16(bias.float(), glu).contiguous()


def pack_dense(
    weight_NK: Tensor, bias_N: Tensor | None = None, glu: bool = False, arena: Arena | None = None
) -> PackedWeight:
    """float32, float16 or bfloat16 weights, kept as they are."""
    w = _padded(_rows16(weight_NK, glu), 1, 16)
    kind = KINDS[w.dtype]
    q = _blocks(w.contiguous().view(torch.int32) if kind == KINDS[torch.bfloat16] else w, arena)
    return PackedWeight(kind, w.shape[0], w.shape[1], weight_NK.shape[1], q, bias=_pack_bias(bias_N, glu))


def pack_int8(
    q_NK: Tensor,
    scales_NG: Tensor,
    bias_N: Tensor | None = None,
    glu: bool = False,
    in_features: int | None = None,
    arena: Arena | None = None,
) -> PackedWeight:
    """int8 weights with scales [N] or [N, G]: value q * scale."""
    scales_NG = scales_NG.view(q_NK.shape[0], -1)
    k = q_NK.shape[1]
    if scales_NG.shape[1] == 1:  # one scale a row: groups are the activations' only
        group = next((g for g in (128, 64) if k % g == 0), MIN_GROUP)
        q_NK = _padded(q_NK, 1, group)
        scales_NG = scales_NG.expand(-1, q_NK.shape[1] // group)
    else:
        group = k // scales_NG.shape[1]
    assert group % MIN_GROUP == 0, group
    u = _rows16(q_NK, glu).contiguous().view(torch.uint8) ^ 128  # q + 128
    unit, scales = _pack_scales(scales_NG, glu, arena)
    q = _blocks(u.view(torch.int32), arena)
    return PackedWeight(
        W8, u.shape[0], u.shape[1], in_features or k, q, group, unit, scales, bias=_pack_bias(bias_N, glu)
    )


def quantize_int8(weight_NK: Tensor, group: int = MIN_GROUP) -> tuple[Tensor, Tensor]:
    """(int8 [N, K padded], scales [N, G]): round to nearest, symmetric, in groups of columns."""

    def rounds(w_NK: Tensor) -> tuple[Tensor, Tensor]:
        w = _padded(w_NK, 1, group).float().view(w_NK.shape[0], -1, group)
        scales_NG = w.abs().amax(-1) / 127
        inverse_NG = torch.where(scales_NG > 0, 1 / scales_NG, 0.0)
        q = (w * inverse_NG.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
        return q.flatten(1), scales_NG

    return in_row_blocks(rounds, weight_NK)


def pack_int4(
    qweight: Tensor,
    scales_NG: Tensor,
    zeros_NG: Tensor,
    perm_K: Tensor | None = None,
    bias_N: Tensor | None = None,
    glu: bool = False,
    in_features: int | None = None,
    arena: Arena | None = None,
) -> PackedWeight:
    """The canonical int4 form: qweight [N, K/2] with the even column in the low nibble, value (q - zero) * scale."""
    k = qweight.shape[1] * 2
    group = k // scales_NG.shape[1]
    assert group % MIN_GROUP == 0, group
    v = _rows16(qweight, glu)
    # Bytes hold columns (2i, 2i + 1), the kernel wants (j, j + 4) of every 8: the nibbles 01234567 of a word become
    # 01452367, then 04152637.
    (words,) = in_row_blocks(
        lambda w: (_swapped(_swapped(w, 0xFF00, 8), 0xF000F0, 4),), v.contiguous().view(torch.int32)
    )
    zeros = None if bool((zeros_NG == 8).all()) else _blocks(_rows16(zeros_NG.to(torch.uint8), glu), arena)
    unit, scales = _pack_scales(scales_NG, glu, arena)
    perm = None if perm_K is None else perm_K.to(torch.int32).contiguous()
    bias = _pack_bias(bias_N, glu)
    return PackedWeight(
        W4, v.shape[0], k, in_features or k, _blocks(words, arena), group, unit, scales, zeros, bias, perm
    )  # fmt: skip


def _swapped(words: Tensor, mask: int, shift: int) -> Tensor:
    """int32 words with the bits under `mask` and those `shift` places above exchanged."""
    differ = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
    return (differ << shift).bitwise_xor_(differ).bitwise_xor_(words)


def _pack_scales(scales_NG: Tensor, glu: bool, arena: Arena | None) -> tuple[float, Tensor]:
    """(unit, fp16 [N/16, G, 16]) with scale = unit * fp16; the unit is a power of two that keeps fp16 in its range."""
    top = float(scales_NG.abs().max())
    unit = 2.0 ** (torch.tensor(top).log2().floor().item() - 14) if top > 0 else 1.0
    return unit, _blocks((_rows16(scales_NG.float(), glu) / unit).half(), arena)


def has_kernel(scheme: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the C++ step takes a matrix in this scheme's canonical form."""
    if scheme == "dense":
        return tensors["weight"].dtype in KINDS
    if scheme == "int4":
        return tensors["qweight"].shape[1] * 2 // tensors["scales"].shape[1] % MIN_GROUP == 0
    return scheme in ("int8", "packed")


def pack_cpu(
    scheme: str,
    tensors: dict[str, Tensor],
    role: str,
    bias: Tensor | None,
    in_features: int,
    arena: Arena,
    quantized: bool = False,
) -> PackedWeight:
    """A matrix in its scheme's canonical form, for which there is a kernel, or as a file has it packed. `quantized`:
    the layers are, and beside them a dense head would be the most of a step's bytes: it goes to 8 bit."""
    glu = role == "gate_up"
    if scheme == "packed":
        return PackedWeight.from_file(tensors, arena)
    if scheme == "dense" and role == "head" and quantized:
        return pack_int8(*quantize_int8(tensors["weight"]), bias, in_features=in_features, arena=arena)
    if scheme == "dense":
        return pack_dense(tensors["weight"], bias, glu, arena)
    if scheme == "int8":
        return pack_int8(tensors["qweight"], tensors["scales"], bias, glu, in_features, arena)
    assert scheme == "int4", scheme
    four = (tensors["qweight"], tensors["scales"], tensors["zeros"], tensors.get("perm"))
    return pack_int4(*four, bias, glu, in_features, arena)
