"""What a step reads from the running batch before the model and writes to it after, and the host's changes to it: one
launch each.

Contract. S slots (the last is trash: padding rows use it, and it stays empty), R rows, B blocks of the longest session,
W table width of this step. `slot_R` int64 names each row's slot. State: `last_token_S` int64, `kv_len_S` and
`rope_len_S` int32, `block_table_SB` int32 contiguous.

`gather_decode` -> token_R int64 (last sampled), position_R int64 (= kv_len), cache_slot_R int64 (block * block_len +
offset of that position), rope_len_R int32, kv_len_R int32 (position + 1), table_RW int32. Every row's position lies in
a block below W. early_launch (GPU): the next kernel may start at once, and must wait inside before anything else.
`advance_rows` after the sampling: writes, in place, kv_len_S[slot] = kv_len_R, but 0 for the trash slot; and for the
rows whose `sample_slot_R` (int64) is not trash last_token_S[sample_slot] = token_R (int64; 0 for -1),
count_S[sample_slot] += 1 (int64: tokens that the slot's request has generated). Slots are distinct, except for trash.
early_launch (GPU): start before the previous kernel has ended, and wait for it inside.
`write_changes`: `packed` int64 holds `num_triples` triples (slot, index in its table, block), then pairs (slot,
rope_len); all go into block_table_SB and rope_len_S. No cell is named twice.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pagoda.kernels.triton_env import HAS_TRITON, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl


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


def advance_rows_reference(
    slot_R: Tensor, kv_len_R: Tensor, sample_slot_R: Tensor, token_R: Tensor,
    last_token_S: Tensor, kv_len_S: Tensor, count_S: Tensor,
) -> None:  # fmt: skip
    trash = kv_len_S.numel() - 1
    kv_len_S[slot_R] = kv_len_R.masked_fill(slot_R == trash, 0)
    last_token_S[sample_slot_R] = token_R.clamp(min=0).masked_fill(sample_slot_R == trash, 0)
    count_S[sample_slot_R] = (count_S[sample_slot_R] + 1).masked_fill(sample_slot_R == trash, 0)


# On a CPU the steps of a small model are so short that torch's calls for a few numbers would count: numpy's cost less.


def gather_decode_numpy(
    slot_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor, rope_len_S: Tensor, block_table_SB: Tensor,
    block_len: int, width: int,
) -> DecodeRows:  # fmt: skip
    slots = slot_R.numpy()
    position_R = kv_len_S.numpy()[slots].astype(np.int64)
    table_RW = block_table_SB.numpy()[slots, :width]
    block_R = table_RW[np.arange(len(slots)), position_R // block_len].astype(np.int64)
    cache_slot_R = block_R * block_len + position_R % block_len
    kv_len_R, rope_len_R = (position_R + 1).astype(np.int32), rope_len_S.numpy()[slots]
    rows = (last_token_S.numpy()[slots], position_R, cache_slot_R, rope_len_R, kv_len_R, table_RW)
    return DecodeRows(*map(torch.from_numpy, rows))


def advance_rows_numpy(
    slot_R: Tensor, kv_len_R: Tensor, sample_slot_R: Tensor, token_R: Tensor,
    last_token_S: Tensor, kv_len_S: Tensor, count_S: Tensor,
) -> None:  # fmt: skip
    last, length, count = last_token_S.numpy(), kv_len_S.numpy(), count_S.numpy()
    slots = sample_slot_R.numpy()
    length[slot_R.numpy()] = kv_len_R.numpy()
    last[slots] = np.maximum(token_R.numpy(), 0)
    count[slots] += 1  # once a slot, however often it is named
    length[-1] = last[-1] = count[-1] = 0  # trash


@jit
def gather_kernel(
    slot_ptr, last_ptr, len_ptr, rope_ptr, table_ptr,
    token_out, position_out, cache_slot_out, rope_out, len_out, table_out,
    num_blocks, width, block_len, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
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


@jit(do_not_specialize=["R"])
def advance_kernel(
    slot_ptr, kv_len_ptr, sample_slot_ptr, token_ptr, last_ptr, len_ptr, count_ptr, R, trash,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_ptr + row, mask=row < R, other=0)
    kv_len = tl.load(kv_len_ptr + row, mask=row < R, other=0)
    tl.store(len_ptr + slot, tl.where(slot == trash, 0, kv_len), mask=row < R)
    slot = tl.load(sample_slot_ptr + row, mask=row < R, other=0)
    samples = (row < R) & (slot != trash)
    token = tl.load(token_ptr + row, mask=samples, other=0)
    tl.store(last_ptr + slot, tl.maximum(token, 0), mask=samples)
    tl.store(count_ptr + slot, tl.load(count_ptr + slot, mask=samples, other=0) + 1, mask=samples)


@jit(do_not_specialize=["num_triples", "num_pairs"])
def changes_kernel(packed, table, rope, num_triples, num_pairs, num_blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = at < num_triples
    triple = packed + at * 3
    slot, index = tl.load(triple, mask=mine, other=0), tl.load(triple + 1, mask=mine, other=0)
    tl.store(table + slot * num_blocks + index, tl.load(triple + 2, mask=mine, other=0).to(tl.int32), mask=mine)
    mine = at < num_pairs
    pair = packed + num_triples * 3 + at * 2
    tl.store(rope + tl.load(pair, mask=mine, other=0), tl.load(pair + 1, mask=mine, other=0).to(tl.int32), mask=mine)


def launch_gather(
    slot_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor, rope_len_S: Tensor, block_table_SB: Tensor,
    block_len: int, width: int, early_launch: bool = False,
) -> DecodeRows:  # fmt: skip
    """The Triton form, on a GPU or in the interpreter."""
    rows, device = slot_R.numel(), slot_R.device
    longs = torch.empty(3, rows, dtype=torch.int64, device=device)
    ints = torch.empty(2, rows, dtype=torch.int32, device=device)
    table_RW = torch.empty(rows, width, dtype=torch.int32, device=device)
    gather_kernel[(rows,)](
        slot_R, last_token_S, kv_len_S, rope_len_S, block_table_SB, longs[0], longs[1], longs[2], ints[0], ints[1],
        table_RW, block_table_SB.shape[1], width, block_len, CHUNK=min(512, next_power_of_2(width)), EARLY=early_launch,
        num_warps=1,
    )  # fmt: skip
    return DecodeRows(longs[0], longs[1], longs[2], ints[0], ints[1], table_RW)


def launch_advance(
    slot_R: Tensor, kv_len_R: Tensor, sample_slot_R: Tensor, token_R: Tensor,
    last_token_S: Tensor, kv_len_S: Tensor, count_S: Tensor, early_launch: bool = False,
) -> None:  # fmt: skip
    """The Triton form, on a GPU or in the interpreter."""
    rows, trash = slot_R.numel(), kv_len_S.numel() - 1
    advance_kernel[(-(-rows // 128),)](
        slot_R, kv_len_R, sample_slot_R, token_R, last_token_S, kv_len_S, count_S, rows, trash,
        BLOCK=128, EARLY=early_launch, num_warps=4, **({"launch_pdl": True} if early_launch else {}),
    )  # fmt: skip


def gather_decode(
    slot_R: Tensor, last_token_S: Tensor, kv_len_S: Tensor, rope_len_S: Tensor, block_table_SB: Tensor,
    block_len: int, width: int, early_launch: bool = False,
) -> DecodeRows:  # fmt: skip
    """See the module's contract."""
    assert block_table_SB.is_contiguous() and 0 < width <= block_table_SB.shape[1]
    args = (slot_R, last_token_S, kv_len_S, rope_len_S, block_table_SB, block_len, width)
    if slot_R.is_cuda:
        return launch_gather(*args, early_launch) if HAS_TRITON else gather_decode_reference(*args)
    return gather_decode_numpy(*args)


def advance_rows(
    slot_R: Tensor, kv_len_R: Tensor, sample_slot_R: Tensor, token_R: Tensor,
    last_token_S: Tensor, kv_len_S: Tensor, count_S: Tensor, early_launch: bool = False,
) -> None:  # fmt: skip
    """See the module's contract."""
    args = (slot_R, kv_len_R, sample_slot_R, token_R, last_token_S, kv_len_S, count_S)
    if slot_R.is_cuda and HAS_TRITON:
        launch_advance(*args, early_launch)
    elif slot_R.is_cuda:
        advance_rows_reference(*args)
    else:
        advance_rows_numpy(*args)


def write_changes_reference(packed: Tensor, num_triples: int, block_table_SB: Tensor, rope_len_S: Tensor) -> None:
    triple, pair = packed[: 3 * num_triples].view(-1, 3), packed[3 * num_triples :].view(-1, 2)
    block_table_SB[triple[:, 0], triple[:, 1]] = triple[:, 2].to(torch.int32)
    rope_len_S[pair[:, 0]] = pair[:, 1].to(torch.int32)


def launch_changes(packed: Tensor, num_triples: int, block_table_SB: Tensor, rope_len_S: Tensor) -> None:
    """The Triton form, on a GPU or in the interpreter."""
    num_pairs = (packed.numel() - 3 * num_triples) // 2
    grid = (-(-max(num_triples, num_pairs) // 128),)
    args = (packed, block_table_SB, rope_len_S, num_triples, num_pairs, block_table_SB.shape[1])
    changes_kernel[grid](*args, BLOCK=128, num_warps=4)


def write_changes(packed: Tensor, num_triples: int, block_table_SB: Tensor, rope_len_S: Tensor) -> None:
    """See the module's contract."""
    form = launch_changes if packed.is_cuda and HAS_TRITON else write_changes_reference
    form(packed, num_triples, block_table_SB, rope_len_S)
