"""QK norm, rotary embedding, log-n scale and the write of keys and values into the cache: between qkv and attention.

Letters: T tokens, H query heads, K kv heads, D head_dim, E = (H + 2K) * D, P rotated pairs (2P <= D).
"""

import torch
from torch import Tensor

from pagoda.kernels.kv_pack import LayerCache, rotate, write_kv


def rotate_half(x_TnD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Channels d and d + P of the first 2P turn as a pair (half-split form); the rest pass."""
    p = cos_TP.shape[-1]
    cos, sin = cos_TP[:, None, :], sin_TP[:, None, :]
    a, b, rest = x_TnD[..., :p], x_TnD[..., p : 2 * p], x_TnD[..., 2 * p :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rope_and_write_reference(
    qkv_TE: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    slot_T: Tensor,
    cache: LayerCache,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    norm_eps: float = 0.0,
    q_scale_T: Tensor | None = None,
) -> Tensor:
    """`rope_and_write` in plain torch, float32 inside."""
    heads = qkv_TE.view(qkv_TE.shape[0], num_heads + 2 * num_kv_heads, head_dim).float()
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    if q_norm_D is not None:
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + norm_eps) * q_norm_D.float()
    if k_norm_D is not None:
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + norm_eps) * k_norm_D.float()
    q, k = rotate_half(q, cos_TP, sin_TP), rotate_half(k, cos_TP, sin_TP)
    if q_scale_T is not None:
        q = q * q_scale_T.float()[:, None, None]
    write_kv(cache, slot_T, rotate(k, cache.rotation), v)
    return rotate(q, cache.rotation).to(qkv_TE.dtype)


def rope_and_write(
    qkv_TE: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    slot_T: Tensor,
    cache: LayerCache,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    norm_eps: float = 0.0,
    q_scale_T: Tensor | None = None,
) -> Tensor:
    """-> q [T, H, D] in qkv's dtype, new memory, in the cache's basis.

    qkv [T, E] contiguous: query heads, key heads, value heads. QK norm (gains [D], either may be None) comes before
    rope, the scale of log-n attention `q_scale_T` [T] after it. cos, sin [T, P] float32. K and V of token t go to
    slot_T[t] = block * block_len + offset; slot < 0: not written. Two tokens of a step never share a slot (but for
    scratch block 0).
    """
    args = (num_heads, num_kv_heads, head_dim, q_norm_D, k_norm_D, norm_eps, q_scale_T)
    return rope_and_write_reference(qkv_TE, cos_TP, sin_TP, slot_T, cache, *args)
