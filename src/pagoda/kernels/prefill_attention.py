"""Attention of chunks of prompts over their cached blocks; the chunk's own keys and values are read from the cache as
well.

Letters: T tokens of the step, R rows, H query heads, K kv heads, D head_dim, B blocks a row (table width).
"""

import torch
from torch import Tensor

from pagoda.kernels.decode_attention import gather_kv, softcapped
from pagoda.kernels.kv_pack import LayerCache

QUERY_TILE = 256  # queries of one score matrix of the reference: bounds its memory


def prefill_attention_reference(
    q_THD: Tensor,
    cache: LayerCache,
    query_start_R1: Tensor,
    kv_len_R: Tensor,
    block_table_RB: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """`prefill_attention` in plain torch: a loop over rows and query tiles, float32 inside."""
    out_THD = torch.zeros_like(q_THD)
    heads, dim = q_THD.shape[1:]
    starts = query_start_R1.tolist()
    for row, kv_len in enumerate(kv_len_R.tolist()):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        k, v = gather_kv(cache, block_table_RB[row : row + 1, : -(-kv_len // cache.block_len)])
        k, v = k[0, :, :kv_len], v[0, :, :kv_len]
        for tile in range(start, end, QUERY_TILE):
            q = q_THD[tile : min(tile + QUERY_TILE, end)].float()
            position = torch.arange(tile, tile + len(q), device=q.device)[:, None] + (kv_len - end)
            last = kv_len - end + tile + len(q)
            first = max(0, kv_len - end + tile - window + 1) if window else 0
            key = torch.arange(first, last, device=q.device)
            seen = key <= position
            if window:
                seen &= key > position - window
            q = q.view(len(q), cache.num_kv_heads, -1, dim).permute(1, 2, 0, 3)  # [K, G, tile, D]
            score = softcapped(q @ k[:, None, first:last].transpose(-1, -2) * scale, softcap)
            share = score.masked_fill(~seen, float("-inf")).softmax(-1)
            mixed = (share @ v[:, None, first:last]).permute(2, 0, 1, 3)
            out_THD[tile : tile + mixed.shape[0]] = mixed.reshape(-1, heads, dim).to(out_THD.dtype)
    return out_THD


def prefill_attention(
    q_THD: Tensor,
    cache: LayerCache,
    query_start_R1: Tensor,
    kv_len_R: Tensor,
    block_table_RB: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """-> out [T, H, D] in q's dtype, new memory. Row r owns queries query_start[r] .. query_start[r+1] - 1 (at most
    max_query_len of them, none is allowed): the last tokens of its kv_len_R[r] cached ones. Query i of n sees keys up
    to position kv_len - n + i, and of these the last `window` (0: all). Queries of no row (past query_start[R]) come
    out zero on a CPU and undefined on a GPU. query_start [R + 1] int32, kv_len [R] int32, block_table [R, B] int32;
    scale and softcap as in `decode_attention`.
    """
    args = (query_start_R1, kv_len_R, block_table_RB, max_query_len, scale, window, softcap)
    return prefill_attention_reference(q_THD, cache, *args)
