"""What the cache of one layer looks like, and the plain-torch oracle of how keys and values get in and out of it.

Layouts (N blocks, K kv heads, L block_len, D head_dim). Keys: a token's channels lie together. Values of a quantised
cache lie transposed inside their block, so that neighbouring bytes are neighbouring tokens: the second product of
attention runs over tokens, and Triton then needs no byte gathers.

| scheme | k | v | scale (per token and head) | zero |
|---|---|---|---|---|
| none | [N, K, L, D] 16 bit or fp32 | [N, K, L, D] | | |
| int8 | [N, K, L, D] int8 | [N, K, D, L] int8 | fp32 [N, K, L] | static ranges only |
| fp8  | [N, K, L, D] e4m3 | [N, K, D, L] e4m3 | fp32 [N, K, L] | |
| int4 | [N, K, L, D/2] uint8 | [N, K, D/2, L] uint8 | fp16 [N, K, L] | fp16 [N, K, L] |

x = q * scale + zero. An int4 byte holds channel d in its low and channel d + D/2 in its high nibble. Static int8 ranges
give scale and zero per head: views with stride 0 over blocks and tokens, so readers need not know.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
MAX_COUNTERS = 2048  # (row, kv head) pairs that decode attention may split; more fill the GPU unsplit


@dataclass
class LayerCache:
    """One layer's blocks. Block 0 is scratch: padding rows may write there. `rotation` [D, D] of +-1 (times D**-0.5 it
    is orthonormal) is applied to queries and keys after rope, which leaves scores as they are and spreads outlier
    channels.
    """

    scheme: str
    block_len: int
    head_dim: int
    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_zero: Tensor | None = None
    v_zero: Tensor | None = None
    rotation: Tensor | None = None
    static: bool = False
    counters: Tensor | None = None  # int32 [MAX_COUNTERS] of 0: where the parts of split decode attention meet

    @property
    def num_blocks(self) -> int:
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]


def hadamard(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The symmetric matrix of +-1 with H H = n I (Sylvester's construction). n: a power of two. float16, exact."""
    i = torch.arange(n, device=device)
    x = i[:, None] & i[None, :]
    for shift in (16, 8, 4, 2, 1):
        x = x ^ (x >> shift)
    return (1 - 2 * (x & 1)).to(torch.float16)


def rotate(x_D: Tensor, rotation_DD: Tensor | None) -> Tensor:
    """x [..., D] float32 in the cache's basis."""
    if rotation_DD is None:
        return x_D
    return x_D @ rotation_DD.to(x_D.dtype) * x_D.shape[-1] ** -0.5


def quantize(x_D: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [..., D] -> codes [..., D], scale [...], zero [...] | None, computed from the row alone. A code is never NaN:
    what is left in a freed block must not spread."""
    x_D = x_D.float()
    if scheme == "int4":
        low, high = x_D.amin(-1), x_D.amax(-1)
        zero = low.half()
        scale = ((high - zero.float()) * (1 / 15)).clamp_min(2.0**-24).half()
        codes = ((x_D - zero.float()[..., None]) / scale.float()[..., None] + 0.5).floor().clamp(0, 15).nan_to_num(0.0)
        return codes.to(torch.uint8), scale, zero
    limit = 127.0 if scheme == "int8" else E4M3_MAX
    scale = (x_D.abs().amax(-1) * (1 / limit)).clamp_min(1e-30)
    codes = x_D / scale[..., None]
    if scheme == "int8":
        return (codes + 0.5).floor().clamp(-127, 127).nan_to_num(0.0).to(torch.int8), scale, None
    return codes.nan_to_num(0.0).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale, None


def quantize_static(x_D: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [..., D] -> int8 codes with the given scale and zero [...]."""
    codes = (x_D.float() - zero[..., None]) / scale[..., None]
    return (codes + 0.5).floor().clamp(-128, 127).to(torch.int8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., D] of 0..15 -> [..., D/2]: low nibble channel d, high nibble channel d + D/2."""
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], -1)


def _put(cache: LayerCache, name: str, block_T: Tensor, offset_T: Tensor, x_TKD: Tensor) -> None:
    """Keys (name "k") or values ("v") of T tokens into their places."""
    store: Tensor = getattr(cache, name)
    if cache.scheme == "none":
        store[block_T, :, offset_T] = x_TKD.to(store.dtype)
        return
    scale, zero = getattr(cache, f"{name}_scale"), getattr(cache, f"{name}_zero")
    if cache.static:
        codes = quantize_static(x_TKD, scale[0, :, 0], zero[0, :, 0])
    else:
        codes, scale_TK, zero_TK = quantize(x_TKD, cache.scheme)
        scale[block_T, :, offset_T] = scale_TK
        if zero_TK is not None:
            zero[block_T, :, offset_T] = zero_TK
    if cache.scheme == "int4":
        codes = pack_nibbles(codes)
    raw, codes = store.view(torch.uint8), codes.view(torch.uint8)  # index_put knows bytes on every device, e4m3 not
    if name == "k":
        raw[block_T, :, offset_T] = codes
    else:
        raw[block_T, :, :, offset_T] = codes


def write_kv(cache: LayerCache, slot_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
    """Keys and values of T tokens, float32 and in the cache's basis, to slots block * block_len + offset; slot < 0: not
    written.
    """
    keep = slot_T >= 0
    slot, k_TKD, v_TKD = slot_T[keep].long(), k_TKD[keep], v_TKD[keep]
    block, offset = slot // cache.block_len, slot % cache.block_len
    _put(cache, "k", block, offset, k_TKD)
    _put(cache, "v", block, offset, v_TKD)


def _get(cache: LayerCache, name: str, blocks: Tensor) -> Tensor:
    x = getattr(cache, name)[blocks]
    if cache.scheme == "none":
        return x.float()
    if name == "v":
        x = x.transpose(-1, -2)
    if cache.scheme == "int4":
        x = unpack_nibbles(x)
    x = x.float() * getattr(cache, f"{name}_scale")[blocks].float()[..., None]
    zero = getattr(cache, f"{name}_zero")
    return x if zero is None else x + zero[blocks].float()[..., None]


def read_kv(cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (any shape of indices) -> keys and values [*blocks, K, block_len, D] float32; keys in the cache's
    basis.
    """
    blocks = blocks.long()
    return _get(cache, "k", blocks), _get(cache, "v", blocks)
