"""What a decode step reads from the running batch before the model, and writes to it after: one launch each.

Contract. S slots (the last is trash: padding rows use it, and it stays empty), R rows, B blocks of the longest session,
W table width of this step. `slot_R` int64 names each row's slot. State: `last_token_S` int64, `kv_len_S` and
`rope_len_S` int32, `block_table_SB` int32 contiguous.

`gather_decode` -> token_R int64 (last sampled), position_R int64 (= kv_len), cache_slot_R int64 (block * block_len +
offset of that position), rope_len_R int32, kv_len_R int32 (position + 1), table_RW int32. Every row's position lies in
a block below W.
`advance_decode` writes, in place, last_token_S[slot] = token and kv_len_S[slot] += 1, but 0 for the trash slot. Slots
are distinct, except for trash.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pagoda.kernels.triton_env import HAS_TRITON, jit, tl, triton


class DecodeRows(NamedTuple):
    """The rows of a decode step; see the module's contract."""

    token_R: Tensor
    position_R: Tensor
    cache_slot_R: Tensor
    rope_len_R: Tensor
    kv_len_R: Tensor
    table_RW: Tensor


def gather_decode_reference(
    slot_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor, rope_len_S: Tensor, block_table_SB: Tensor,
    block_len: int, width: int,
) -> DecodeRows:  # fmt: skip
    position_R = kv_len_S[slot_R].long()
    table_RW = block_table_SB[slot_R, :width]
    block_R = table_RW.gather(1, (position_R // block_len)[:, None])[:, 0].long()
    cache_slot_R = block_R * block_len + position_R % block_len
    kv_len_R = (position_R + 1).to(torch.int32)
    return DecodeRows(last_token_S[slot_R], position_R, cache_slot_R, rope_len_S[slot_R], kv_len_R, table_RW)


def advance_decode_reference(slot_R: Tensor, token_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor) -> None:
    last_token_S[slot_R] = token_R
    kv_len_S[slot_R] = (kv_len_S[slot_R] + 1).masked_fill(slot_R == kv_len_S.numel() - 1, 0)


@jit
def gather_kernel(
    slot_ptr, last_ptr, len_ptr, rope_ptr, table_ptr,
    token_out, position_out, cache_slot_out, rope_out, len_out, table_out,
    num_blocks, width, block_len, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    position = tl.load(len_ptr + slot)
    block = tl.load(table_ptr + slot * num_blocks + position // block_len)
    tl.store(token_out + row, tl.load(last_ptr + slot))
    tl.store(position_out + row, position.to(tl.int64))
    tl.store(cache_slot_out + row, block.to(tl.int64) * block_len + position % block_len)
    tl.store(rope_out + row, tl.load(rope_ptr + slot))
    tl.store(len_out + row, position + 1)
    for first in range(0, width, CHUNK):
        at = first + tl.arange(0, CHUNK)
        blocks = tl.load(table_ptr + slot * num_blocks + at, mask=at < width, other=0)
        tl.store(table_out + row * width + at, blocks, mask=at < width)


@jit
def advance_kernel(slot_ptr, token_ptr, last_ptr, len_ptr, trash):
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    tl.store(last_ptr + slot, tl.load(token_ptr + row))
    tl.store(len_ptr + slot, tl.where(slot == trash, 0, tl.load(len_ptr + slot) + 1))


def launch_gather(
    slot_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor, rope_len_S: Tensor, block_table_SB: Tensor,
    block_len: int, width: int,
) -> DecodeRows:  # fmt: skip
    """The Triton form, on a GPU or in the interpreter."""
    rows, device = slot_R.numel(), slot_R.device
    longs = torch.empty(3, rows, dtype=torch.int64, device=device)
    ints = torch.empty(2, rows, dtype=torch.int32, device=device)
    table_RW = torch.empty(rows, width, dtype=torch.int32, device=device)
    gather_kernel[(rows,)](
        slot_R, last_token_S, kv_len_S, rope_len_S, block_table_SB, longs[0], longs[1], longs[2], ints[0], ints[1],
        table_RW, block_table_SB.shape[1], width, block_len, CHUNK=min(512, triton.next_power_of_2(width)), num_warps=1,
    )  # fmt: skip
    return DecodeRows(longs[0], longs[1], longs[2], ints[0], ints[1], table_RW)


def launch_advance(slot_R: Tensor, token_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor) -> None:
    """The Triton form, on a GPU or in the interpreter."""
    trash = kv_len_S.numel() - 1
    advance_kernel[(slot_R.numel(),)](slot_R, token_R, last_token_S, kv_len_S, trash, num_warps=1)


def gather_decode(
    slot_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor, rope_len_S: Tensor, block_table_SB: Tensor,
    block_len: int, width: int,
) -> DecodeRows:  # fmt: skip
    """See the module's contract."""
    assert block_table_SB.is_contiguous() and 0 < width <= block_table_SB.shape[1]
    form = launch_gather if slot_R.is_cuda and HAS_TRITON else gather_decode_reference
    return form(slot_R, last_token_S, kv_len_S, rope_len_S, block_table_SB, block_len, width)


def advance_decode(slot_R: Tensor, token_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor) -> None:
    """See the module's contract."""
    form = launch_advance if slot_R.is_cuda and HAS_TRITON else advance_decode_reference
    form(slot_R, token_R, last_token_S, kv_len_S)
