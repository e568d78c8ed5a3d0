"""Attention of one new query a sequence over its cached blocks.

Letters: R rows, H query heads, K kv heads, G = H/K, D head_dim, B blocks a row (table width), S = B * block_len.
"""

import torch
from torch import Tensor

from pagoda.kernels.kv_pack import LayerCache, read_kv


def softcapped(score: Tensor, softcap: float) -> Tensor:
    """cap * tanh(score / cap); 0 is no cap."""
    return torch.tanh(score / softcap) * softcap if softcap else score


def gather_kv(cache: LayerCache, block_table_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole tables, float32 [R, K, S, D]."""
    k, v = read_kv(cache, block_table_RB)
    return k.transpose(1, 2).flatten(2, 3), v.transpose(1, 2).flatten(2, 3)


def decode_attention_reference(
    q_RHD: Tensor,
    cache: LayerCache,
    kv_len_R: Tensor,
    block_table_RB: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """`decode_attention` in plain torch: gathers the blocks, one batched product a kv head, float32 inside."""
    rows, heads, dim = q_RHD.shape
    if q_RHD.device.type == "cpu" and rows:  # no more blocks than the longest row has
        blocks = -(-int(kv_len_R.max()) // cache.block_len)
        block_table_RB = block_table_RB[:, : max(blocks, 1)]
    k, v = gather_kv(cache, block_table_RB)
    q = q_RHD.float().view(rows, cache.num_kv_heads, -1, dim)
    position_S = torch.arange(k.shape[2], device=q.device)
    seen_RS = position_S < kv_len_R[:, None]
    if window:
        seen_RS &= position_S >= kv_len_R[:, None] - window
    score = softcapped(q @ k.transpose(-1, -2) * scale, softcap)
    score = score.masked_fill(~seen_RS[:, None, None, :], float("-inf"))
    share = score.softmax(-1).masked_fill(kv_len_R[:, None, None, None] == 0, 0.0)
    out = share @ v.masked_fill(~seen_RS[:, None, :, None], 0.0)
    return out.view(rows, heads, dim).to(q_RHD.dtype)


def decode_attention(
    q_RHD: Tensor,
    cache: LayerCache,
    kv_len_R: Tensor,
    block_table_RB: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """-> out [R, H, D] in q's dtype, new memory. The query of row r is its token kv_len_R[r] - 1, whose own key and
    value the cache already holds; kv_len 0 gives zeros. It sees the last `window` keys, itself included (0: all).
    Scores are q.k * scale, then softcap * tanh(score / softcap) where softcap > 0. kv_len [R] int32, block_table [R, B]
    int32: entries past a row's length may be anything within the cache. No host synchronisation on a GPU; the grid
    depends on shapes alone.
    """
    return decode_attention_reference(q_RHD, cache, kv_len_R, block_table_RB, scale, window, softcap)
