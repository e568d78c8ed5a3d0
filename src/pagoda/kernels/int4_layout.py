"""How 4-bit matrices lie in GPU memory, and the instructions that open them without moving a value between threads.

Layout (4.25 bits a weight in groups of 128). Rows stand in tiles of TILE = 64, inputs in chunks of 128:
  q     int32 [N/64, K/128, 64, 16]   a chunk of a tile is 4 KB in a run
  meta  int32 [N/64, K/group, 64]     one a row and group: the scale in the high half, the zero in the low half
Word c of a row's chunk (columns c and c+1, c even, share two words): nibble i of its low (h = 0) or high (h = 1) half
is element k = (i + 4 * (c odd)) * 16 + (c even) + h. So nibble tile j of two words is 16 consecutive k, in the order in
which the matrix instruction wants them in its registers.
The zero is kept as OFFSET + zero in the 16-bit type (bfloat16 128, float16 1024): a nibble or-ed into the bits of
OFFSET is OFFSET + nibble exactly, and the difference of the two is nibble - zero exactly.
A gate_up matrix puts 32 gate rows and then their 32 up rows in a tile. Rows and inputs past the end have scale 0.
Shape letters: N out features, K in features (padded to 128 here), C chunks, G groups, S groups a chunk (1, 2, 4).
"""

import functools

import torch
from torch import Tensor

TILE = 64
CHUNK = 128
GROUPS = (32, 64, 128)
_OFFSET = {torch.bfloat16: 128, torch.float16: 1024}


def tile_order(n: int, glu: bool, device=None) -> Tensor:
    """The matrix row at each place of the packed form; n stands where there is none."""
    half = TILE // 2
    if not glu:
        order = torch.arange(-(-n // TILE) * TILE, device=device)
        return order.clamp_(max=n)
    gate = torch.arange(-(-n // 2 // half) * half, device=device)
    gate = torch.where(gate < n // 2, gate, n).view(-1, half)
    return torch.stack([gate, torch.where(gate < n, gate + n // 2, n)], 1).flatten()


def pack_tiles(q_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, glu: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values 0..15 (uint8), scales and zeros of equal groups of 32, 64 or 128 inputs to {"q", "meta"}; same device."""
    group = q_NK.shape[1] // scales_NG.shape[1]
    assert group in GROUPS and group * scales_NG.shape[1] == q_NK.shape[1]
    order = tile_order(q_NK.shape[0], glu, q_NK.device)
    k_pad = -q_NK.shape[1] % CHUNK
    pad = torch.nn.functional.pad
    q = pad(q_NK, (0, k_pad, 0, 1))[order]
    scales = pad(scales_NG.to(dtype), (0, k_pad // group, 0, 1))[order]
    zeros = pad(zeros_NG.to(torch.int32), (0, k_pad // group, 0, 1))[order]
    # tile, row, chunk, odd word, nibble, pair of columns, half
    q = q.view(-1, TILE, q.shape[1] // CHUNK, 2, 4, 8, 2)
    words = torch.zeros(*q.shape[:4], q.shape[5], dtype=torch.int32, device=q.device)
    for nibble in range(4):
        for half in range(2):
            words |= q[:, :, :, :, nibble, :, half].to(torch.int32) << (4 * nibble + 16 * half)
    words = words.permute(0, 2, 1, 4, 3).reshape(-1, q.shape[2], TILE, 16)
    low = (zeros + _OFFSET[dtype]).to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    meta = (scales.view(torch.int16).to(torch.int32) << 16) | low
    return {"q": words.contiguous(), "meta": meta.view(-1, TILE, meta.shape[1]).transpose(1, 2).contiguous()}


def unpack_tiles(q: Tensor, meta: Tensor, n: int, k: int, glu: bool, dtype: torch.dtype) -> Tensor:
    """The matrix as float32 [n, k], exactly (nibble - zero) * scale: the layout's specification."""
    tiles, chunks = q.shape[:2]
    words = q.view(tiles, chunks, TILE, 8, 2)
    values = torch.empty(tiles, chunks, TILE, 2, 4, 8, 2, device=q.device)
    for nibble in range(4):
        for half in range(2):
            values[:, :, :, :, nibble, :, half] = ((words >> (4 * nibble + 16 * half)) & 15).transpose(3, 4).float()

    def by_row(t: Tensor) -> Tensor:
        return t.transpose(1, 2).reshape(tiles * TILE, meta.shape[1], -1)

    scales = (meta >> 16).to(torch.int16).view(dtype).float()
    zeros = (meta & 0xFFFF).to(torch.int16).view(dtype).float() - _OFFSET[dtype]
    rows = (by_row(values) - by_row(zeros)) * by_row(scales)  # rows, groups, inputs of a group
    out = torch.empty(n + 1, rows.shape[1] * rows.shape[2], device=q.device)
    out[tile_order(n, glu, q.device)] = rows.flatten(1)
    return out[:n, :k]


@functools.cache
def unpack_asm(dtype: torch.dtype, per_chunk: int, scaled: bool) -> tuple[str, str]:
    """(instructions, constraints) that take two words of one row and the row's `per_chunk` metas to eight registers of
    two 16-bit values, register j for nibble tile j: nibble - zero, times the scale if `scaled` (rounded). For sm_90."""
    magic, kind = ("0x43004300", "bf16x2") if dtype == torch.bfloat16 else ("0x64006400", "f16x2")
    temps = [f"z{s}" for s in range(per_chunk)] + [f"s{s}" for s in range(per_chunk) if scaled]
    lines = [f".reg .b32 {', '.join(temps)};"]
    for s in range(per_chunk):
        meta = f"${10 + 2 * s}"
        lines.append(f"prmt.b32 z{s}, {meta}, {meta}, 0x1010;")
        if scaled:
            lines.append(f"prmt.b32 s{s}, {meta}, {meta}, 0x3232;")
    for j in range(8):
        word, s = f"${8 + j // 4}", j * per_chunk // 8
        if j % 4:
            lines.append(f"shr.b32 ${j}, {word}, {4 * (j % 4)};")
            word = f"${j}"
        lines.append(f"lop3.b32 ${j}, {word}, 0x000F000F, {magic}, 0xEA;")
        lines.append(f"sub.{kind} ${j}, ${j}, z{s};")
        if scaled:
            lines.append(f"mul.{kind} ${j}, ${j}, s{s};")
    return "{ " + "\n".join(lines) + " }", ",".join(["=&r"] * 8 + ["r"] * (2 + 2 * per_chunk))
