"""4-bit matrices as checkpoints hold them: AWQ, GPTQ and compressed-tensors to (q, scales, zeros, perm).

All three pack eight values into an int32, bits 4i to 4i + 3 for i = 0..7, but along different axes and in different
orders:
  AWQ (gemm)  qweight [K, N/8] along outputs, place i of word c is output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i];
              qzeros [G, N/8] alike; scales [G, N]
  GPTQ        qweight [K/8, N] along inputs; qzeros [G, N/8] along outputs, stored minus one (format gptq) or as they
              are (gptq_v2); scales [G, N]; g_idx [K]: the group of each input
  compressed-tensors (pack-quantized)  weight_packed [N, K/8] along inputs, values plus 8; weight_scale [N, G];
              weight_zero_point [N/8, G] along outputs, plus 8 (absent: symmetric); weight_g_idx [K]; weight_shape [2]
Shape letters: N out features, K in features, G groups.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagoda.errors import CheckpointError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Plain4(NamedTuple):
    """q uint8 [N, K] of 0..15, scales [N, G], zeros uint8 [N, G]; perm [K]: column j is input perm[j] (None: j)."""

    q_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor
    perm_K: Tensor | None


def unpack_words(words: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 words to uint8 values, dimension `dim` eight times as long; place i of a word is value order[i]."""
    places = [0] * 8
    for place, value in enumerate(order):
        places[value] = place
    values = torch.stack([((words >> (4 * p)) & 15).to(torch.uint8) for p in places], dim + 1)
    return values.flatten(dim, dim + 1)


def pack_words(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """The inverse, for writing checkpoints; the length of `dim` must be a multiple of eight."""
    if values.shape[dim] % 8:
        raise CheckpointError(
            f"4-bit checkpoints hold eight values a word: {values.shape[dim]} is not a multiple of 8."
        )
    values = values.unflatten(dim, (-1, 8)).to(torch.int64)
    words = torch.zeros_like(values.select(dim + 1, 0))
    for place, value in enumerate(order):
        words |= values.select(dim + 1, value) << (4 * place)
    return words.to(torch.int32)  # keeps the low 32 bits


def read_awq(parts: dict[str, Tensor], quant: Any) -> Plain4:
    q_KN = unpack_words(parts["qweight"], 1, AWQ_ORDER)
    zeros_GN = unpack_words(parts["qzeros"], 1, AWQ_ORDER)
    return Plain4(q_KN.t(), parts["scales"].t(), zeros_GN.t(), None)


def read_gptq(parts: dict[str, Tensor], quant: Any) -> Plain4:
    q_KN = unpack_words(parts["qweight"], 0)
    zeros_GN = unpack_words(parts["qzeros"], 1)
    if getattr(quant, "layout", "") != "gptq_v2":
        zeros_GN = (zeros_GN + 1) & 15
    return _ordered(q_KN.t(), parts["scales"].t(), zeros_GN.t(), parts.get("g_idx"))


def read_compressed(parts: dict[str, Tensor], quant: Any) -> Plain4:
    n, k = parts["weight_shape"].tolist() if "weight_shape" in parts else (parts["weight_packed"].shape[0], None)
    q_NK = unpack_words(parts["weight_packed"], 1)[:, :k]
    scales_NG = parts["weight_scale"]
    if "weight_zero_point" in parts:
        zeros_NG = unpack_words(parts["weight_zero_point"], 0)[:n]
    else:
        zeros_NG = torch.full(scales_NG.shape, 8, dtype=torch.uint8, device=scales_NG.device)
    return _ordered(q_NK, scales_NG, zeros_NG, parts.get("weight_g_idx"))


def _ordered(q_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, g_idx_K: Tensor | None) -> Plain4:
    """Columns sorted by group where g_idx (activation order) is not already in order."""
    if g_idx_K is None or bool((g_idx_K < 0).any()) or bool((g_idx_K[1:] >= g_idx_K[:-1]).all()):
        return Plain4(q_NK, scales_NG, zeros_NG, None)
    counts = torch.bincount(g_idx_K.long(), minlength=scales_NG.shape[1])
    if bool((counts != counts[0]).any()):
        raise CheckpointError("g_idx gives the groups of a 4-bit matrix different sizes: the checkpoint is damaged.")
    perm = torch.argsort(g_idx_K.long(), stable=True)
    return Plain4(q_NK[:, perm], scales_NG, zeros_NG, perm.to(torch.int32))


FORMATS = {"awq": read_awq, "gptq": read_gptq, "compressed-tensors": read_compressed}
TENSORS = {
    "awq": {"qweight", "qzeros", "scales"},
    "gptq": {"qweight", "qzeros", "scales"},
    "compressed-tensors": {"weight_packed", "weight_scale"},
}


def read_foreign(parts: dict[str, Tensor], quant: Any) -> Plain4:
    """By quant.method. CheckpointError when tensors are missing or their shapes do not fit together."""
    missing = TENSORS[quant.method] - set(parts)
    if missing:
        raise CheckpointError(
            f"A 4-bit {quant.method} matrix lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(parts))}."
        )
    plain = FORMATS[quant.method](parts, quant)
    (n, k), (rows, groups) = plain.q_NK.shape, plain.scales_NG.shape
    if rows != n or plain.zeros_NG.shape != plain.scales_NG.shape or not 0 < groups <= k:
        raise CheckpointError(
            f"The tensors of a 4-bit {quant.method} matrix do not fit together: weights {[n, k]}, scales "
            f"{[rows, groups]}, zeros {list(plain.zeros_NG.shape)} (outputs first)."
        )
    return plain
