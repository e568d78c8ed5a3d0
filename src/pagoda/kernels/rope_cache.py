"""QK norm, rotary embedding, log-n scale and the write of keys and values into the cache: between qkv and attention.

Letters: T tokens, H query heads, K kv heads, D head_dim, E = (H + 2K) * D, P rotated pairs (2P <= D).
"""

import torch
from torch import Tensor

from pagoda.kernels.kv_pack import LayerCache, rotate, write_kv
from pagoda.kernels.rope_rows import rope_rows, rotate_rows, store_row_codes
from pagoda.kernels.triton_env import HAS_TRITON, INTERPRETED, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl


def rotate_half(x_TnD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Channels d and d + P of the first 2P turn as a pair (half-split form); the rest pass."""
    p = cos_TP.shape[-1]
    cos, sin = cos_TP[:, None, :], sin_TP[:, None, :]
    a, b, rest = x_TnD[..., :p], x_TnD[..., p : 2 * p], x_TnD[..., 2 * p :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rope_and_write_reference(
    qkv_TE: Tensor, cos_TP: Tensor, sin_TP: Tensor, slot_T: Tensor, cache: LayerCache, num_heads: int,
    num_kv_heads: int, head_dim: int, q_norm_D: Tensor | None = None, k_norm_D: Tensor | None = None,
    norm_eps: float = 0.0, q_scale_T: Tensor | None = None,
) -> Tensor:  # fmt: skip
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


@jit(do_not_specialize=["T"])
def _rope_kernel(
    qkv, cos, sin, slot, q_gain, k_gain, q_scale, rotation, q, k, v, k_scale, v_scale, k_zero, v_zero, T, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, PAIRS: tl.constexpr, BL: tl.constexpr,
    BT: tl.constexpr, HEADS: tl.constexpr, SCHEME: tl.constexpr, STATIC: tl.constexpr, NORM: tl.constexpr,
    LOGN: tl.constexpr, ROTATE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BT tokens x HEADS of the H + 2K heads a program; HP is D/2 padded."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    ok = t < T
    rd = tl.arange(0, HP)
    t64 = t.to(tl.int64)
    place = tl.load(slot + t, mask=ok, other=-1).to(tl.int64)
    for j in range(HEADS):
        head = tl.program_id(1) * HEADS + j
        if head < H + 2 * K:
            x = qkv + t64 * ((H + 2 * K) * D) + head * D
            is_k = (t * 0 + head) >= H
            if head < H + K:
                low, high = rope_rows(x, ok, cos, sin, t64, q_gain, k_gain, is_k, eps, D, HP, PAIRS, NORM)
                if LOGN and head < H:
                    grow = tl.load(q_scale + t, mask=ok, other=1.0).to(tl.float32)[:, None]
                    low *= grow
                    high *= grow
                if ROTATE:
                    low, high = rotate_rows(low, high, rotation, D, HP)
            else:
                low, high = rope_rows(x, ok, cos, sin, t64, q_gain, k_gain, is_k, eps, D, HP, 0, False)
            if head < H:
                to = (t64 * H + head)[:, None] * D + rd[None, :]
                mask = ok[:, None] & (rd < D // 2)[None, :]
                tl.store(q + to, low.to(q.dtype.element_ty), mask=mask)
                tl.store(q + to + D // 2, high.to(q.dtype.element_ty), mask=mask)
            elif head < H + K:
                args = (k, k_scale, k_zero, place, head - H, low, high)
                store_row_codes(args, K, D, HP, BL, SCHEME, STATIC, False)
            else:
                args = (v, v_scale, v_zero, place, head - H - K, low, high)
                store_row_codes(args, K, D, HP, BL, SCHEME, STATIC, True)


def rope_and_write_launch(
    qkv_TE: Tensor, cos_TP: Tensor, sin_TP: Tensor, slot_T: Tensor, cache: LayerCache, num_heads: int,
    num_kv_heads: int, head_dim: int, q_norm_D: Tensor | None = None, k_norm_D: Tensor | None = None,
    norm_eps: float = 0.0, q_scale_T: Tensor | None = None, early_launch: bool = False, token_tile: int = 16,
) -> Tensor:  # fmt: skip
    """The Triton kernel; both gains or neither."""
    tokens = qkv_TE.shape[0]
    q_THD = torch.empty(tokens, num_heads, head_dim, dtype=qkv_TE.dtype, device=qkv_TE.device)
    if tokens == 0:
        return q_THD
    total = num_heads + 2 * num_kv_heads
    heads = 1 if tokens < 512 else 4  # a program of several heads reads its angles once
    scales = [s if s is not None else cache.k for s in (cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero)]
    _rope_kernel[(-(-tokens // token_tile), -(-total // heads))](
        qkv_TE,
        cos_TP,
        sin_TP,
        slot_T,
        qkv_TE if q_norm_D is None else q_norm_D,
        qkv_TE if k_norm_D is None else k_norm_D,
        cos_TP if q_scale_T is None else q_scale_T,
        qkv_TE if cache.rotation is None else cache.rotation,
        q_THD,
        cache.k,
        cache.v,
        *scales,
        tokens,
        norm_eps,
        H=num_heads,
        K=num_kv_heads,
        D=head_dim,
        HP=max(16, next_power_of_2(head_dim // 2)),
        PAIRS=cos_TP.shape[-1],
        BL=cache.block_len,
        BT=token_tile,
        HEADS=heads,
        SCHEME=cache.scheme,
        STATIC=cache.static,
        NORM=q_norm_D is not None,
        LOGN=q_scale_T is not None,
        ROTATE=cache.rotation is not None,
        EARLY=early_launch,
        num_warps=4,
        **({"launch_pdl": True} if early_launch and not INTERPRETED else {}),
    )
    return q_THD


def rope_and_write(
    qkv_TE: Tensor, cos_TP: Tensor, sin_TP: Tensor, slot_T: Tensor, cache: LayerCache, num_heads: int,
    num_kv_heads: int, head_dim: int, q_norm_D: Tensor | None = None, k_norm_D: Tensor | None = None,
    norm_eps: float = 0.0, q_scale_T: Tensor | None = None, early_launch: bool = False,
) -> Tensor:  # fmt: skip
    """-> q [T, H, D] in qkv's dtype, new memory, in the cache's basis.

    qkv [T, E] contiguous: query heads, key heads, value heads. QK norm (gains [D], either may be None) comes before
    rope, the scale of log-n attention `q_scale_T` [T] after it. cos, sin [T, P] float32. K and V of token t go to
    slot_T[t] = block * block_len + offset; slot < 0: not written. Two tokens of a step never share a slot (but for
    scratch block 0).
    early_launch (GPU): start before the previous kernel of the stream has ended, and wait for it inside.
    """
    args = (num_heads, num_kv_heads, head_dim, q_norm_D, k_norm_D, norm_eps, q_scale_T)
    assert qkv_TE.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim and cos_TP.shape[-1] * 2 <= head_dim
    if qkv_TE.is_cuda and HAS_TRITON and (q_norm_D is None) == (k_norm_D is None):
        return rope_and_write_launch(qkv_TE, cos_TP, sin_TP, slot_T, cache, *args, early_launch)
    return rope_and_write_reference(qkv_TE, cos_TP, sin_TP, slot_T, cache, *args)
