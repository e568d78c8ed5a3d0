"""Where the rows of a rank's fused matrices lie in the checkpoint: q, k, v and gate, up, separate or fused there.

A checkpoint's part is one module (`q_proj`, or `qkv_proj` for all three); a piece is a run of its rows, or of zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pagoda.layers.schemes import SCHEMES, Tensors
from pagoda.models.sharding import ZERO, LocalShape
from pagoda.models.spec import ModelSpec

NOT_BY_ROWS = ("perm", "input_scale")  # canonical tensors that belong to the whole matrix


class Part(NamedTuple):
    """One module of the checkpoint: its name and its number of rows."""

    module: str
    rows: int


class Piece(NamedTuple):
    """`rows` rows from row `start` of part number `part`; part ZERO: rows of zeros."""

    part: int
    start: int
    rows: int


def layer_name(spec: ModelSpec, layer: int, name: str) -> str:
    """The checkpoint's name of a layer's module."""
    return spec.row.names.layer.format(layer) + name


def qkv_parts(spec: ModelSpec, layer: int) -> list[Part]:
    names, d = spec.row.names.qkv, spec.head_dim
    sizes = [spec.num_heads * d, spec.num_kv_heads * d, spec.num_kv_heads * d]
    sizes = sizes if len(names) == 3 else [sum(sizes)]
    return [Part(layer_name(spec, layer, n), rows) for n, rows in zip(names, sizes)]


def gate_up_parts(spec: ModelSpec, layer: int) -> list[Part]:
    names = spec.row.names.gate_up
    rows = 2 * spec.ffn_size // len(names)
    return [Part(layer_name(spec, layer, n), rows) for n in names]


def qkv_pieces(spec: ModelSpec, shape: LocalShape) -> list[Piece]:
    """The rank's q heads, then its k heads, then its v heads."""
    H, K, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    group = H // K

    def place(kind: int, head: int) -> Piece:
        if head == ZERO:
            return Piece(ZERO, 0, D)
        if spec.row.grouped_qkv:
            block, inner = divmod(head, group) if kind == 0 else (head, group + kind - 1)
            return Piece(0, (block * (group + 2) + inner) * D, D)
        if len(spec.row.names.qkv) == 1:
            return Piece(0, ((0, H, H + K)[kind] + head) * D, D)
        return Piece(kind, head * D, D)

    heads = [(0, h) for h in shape.q_heads] + [(kind, h) for kind in (1, 2) for h in shape.kv_heads]
    return _merge([place(kind, head) for kind, head in heads])


def gate_up_pieces(spec: ModelSpec, shape: LocalShape) -> list[Piece]:
    """The rank's gate rows, then its up rows, each padded with zeros to the local ffn size."""
    fused = len(spec.row.names.gate_up) == 1
    pieces = []
    for kind in (0, 1):
        part, offset = (0, kind * spec.ffn_size) if fused else (kind, 0)
        pieces.append(Piece(part, offset + shape.ffn_start, shape.ffn_valid))
        pieces.append(Piece(ZERO, 0, shape.ffn_size - shape.ffn_valid))
    return _merge(pieces)


def vocab_pieces(shape: LocalShape) -> list[Piece]:
    """The rank's rows of the embedding or the head."""
    padding = Piece(ZERO, 0, shape.vocab_rows - shape.vocab_valid)
    return _merge([Piece(0, shape.vocab_start, shape.vocab_valid), padding])


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Join pieces that follow each other in their part; drop empty ones."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if piece.rows == 0:
            continue
        if last and last.part == piece.part and piece.part != ZERO and last.start + last.rows == piece.start:
            merged[-1] = Piece(last.part, last.start, last.rows + piece.rows)
        else:
            merged.append(piece)
    return merged


def take_rows(parts: list[Tensor], pieces: list[Piece], device: torch.device) -> Tensor:
    """The pieces of dim 0 one below the other on `device`; a single piece is not copied where it lies there already."""
    taken = []
    for piece in pieces:
        if piece.part == ZERO:
            taken.append(torch.zeros(piece.rows, *parts[0].shape[1:], dtype=parts[0].dtype, device=device))
        else:
            taken.append(parts[piece.part].narrow(0, piece.start, piece.rows).to(device))
    return taken[0] if len(taken) == 1 else torch.cat([t.view(torch.uint8) for t in taken]).view(taken[0].dtype)


def take_matrix(scheme: str, parts: list[Tensors], pieces: list[Piece], device: torch.device) -> Tensors:
    """The same for canonical tensors of one scheme. Zero rows have zero scales, so their products are zero."""
    blocks = []
    for piece in pieces:
        source = parts[max(piece.part, 0)]
        by_rows = {
            k: take_rows([t], [piece._replace(part=min(piece.part, 0))], device)
            for k, t in source.items()
            if k not in NOT_BY_ROWS
        }
        blocks.append(by_rows | {k: source[k].to(device) for k in NOT_BY_ROWS if k in source})
    return blocks[0] if len(blocks) == 1 else SCHEMES[scheme]().fuse(blocks)
