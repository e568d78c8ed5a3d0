"""Attention of whole prompts by the library: cuDNN through torch, the fastest of those measured on an H200.

Contract. `fresh` names rows of a step whose prompt begins in this step: (row, first token, number of tokens), so that a
row's keys are its own alone. q_THD, the cache (16 bit, no codes) and block_table_RB as in `prefill_attention`; causal,
no window, no soft cap. `library_attention` writes out_THD for these tokens. cuDNN plans each length anew, so lengths
are padded to a multiple of PAD; what the padding computes is dropped (a causal query never sees keys behind it).
Measured on an H200 (benchmarks/attention.py, 32 heads over 8, head_dim 128): 4 prompts of 4096 take 894 us, 16 of 1024
288 us; our own kernel 533 us for the latter.
Letters: T tokens of the step, R rows, H query heads, K kv heads, D head_dim, B blocks a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pagoda.kernels.kv_pack import LayerCache

PAD = 1024
Fresh = tuple[tuple[int, int, int], ...]


def library_takes(q_THD: Tensor, cache: LayerCache, window: int, softcap: float) -> bool:
    """Whether cuDNN computes this, and was measured to be faster."""
    return (
        q_THD.is_cuda
        and torch.cuda.get_device_capability(q_THD.device) >= (9, 0)
        and cache.scheme == "none"
        and cache.k.dtype == q_THD.dtype
        and q_THD.dtype in (torch.bfloat16, torch.float16)
        and cache.head_dim == 128
        and not window
        and not softcap
    )


def fresh_rows(rows: list[tuple[int, int]]) -> Fresh:
    """Of (start, number of tokens) for each row of a step in order: the longest run of last rows that are worth it."""
    fresh, end = [], sum(length for _, length in rows)
    for row in reversed(range(len(rows))):
        start, length = rows[row]
        if start or length < PAD:
            break
        end -= length
        fresh.append((row, end, length))
    return tuple(reversed(fresh))


def _keys(cached: Tensor, blocks: Tensor, length: int, padded: int) -> Tensor:
    """[1, K, padded, D] of the blocks of one row; zeros from `length` on, where a block may hold what is no number."""
    taken = cached[blocks].transpose(0, 1).flatten(1, 2)
    return F.pad(taken[:, :length], (0, 0, 0, padded - length))[None]


def library_attention(
    q_THD: Tensor, cache: LayerCache, block_table_RB: Tensor, fresh: Fresh, scale: float, out_THD: Tensor,
    backend: SDPBackend = SDPBackend.CUDNN_ATTENTION,
) -> None:  # fmt: skip
    """See the module's contract."""
    with sdpa_kernel(backend):
        for row, first, length in fresh:
            padded = -(-length // PAD) * PAD
            blocks = block_table_RB[row, : -(-length // cache.block_len)].long()
            q = F.pad(q_THD[first : first + length], (0, 0, 0, 0, 0, padded - length)).transpose(0, 1)[None]
            k, v = (_keys(cached, blocks, length, padded) for cached in (cache.k, cache.v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            out_THD[first : first + length] = out[0, :, :length].transpose(0, 1)
