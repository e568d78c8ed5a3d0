"""The index of each row's largest value: the greedy choice of a token.

Contract. `argmax(value_RV, counters, early_launch) -> index_R` (int64, fresh memory). value_RV: float32 [R, V], V of
1 or more, values of a row contiguous, any row stride; not changed. Of equal values the lowest index wins, as in
torch. A row whose largest value is no finite number has -1: one of NaN or -inf alone, one with +inf, and one with a NaN
that is not negative (those count as large). `counters` int32 [at least R], zero before and
after, belong to one stream. early_launch (GPU): start before the previous kernel of the stream has ended, and wait for
it inside. No host synchronisation; the grid depends on shapes alone.

A row is cut into parts over many programs; the last one to arrive compares the parts.
Shape letters: R rows, V values, P parts.
"""

import numpy as np
import torch
from torch import Tensor

from pagoda.kernels.triton_env import HAS_TRITON, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

MAX_PARTS = 256


def argmax_reference(value_RV: Tensor) -> Tensor:
    best = value_RV.max(-1)
    return torch.where(best.values.isfinite(), best.indices, -1)


@jit
def _finite_or_none(index, order):
    """-1 unless a value's order is between those of the infinities."""
    return tl.where((order < 0x7F800000) & (order > -0x7F800001), index, -1)


@jit
def _argmax_kernel(
    value, out, part, counter, V, stride, parts, PART: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr
):
    """Grid (R, parts). A part leaves its winner as one int64: the value's order above, the index's reverse below, so
    that the largest such number is the answer."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, p = tl.program_id(0), tl.program_id(1)
    at = p * PART + tl.arange(0, PART)
    x = tl.load(value + row.to(tl.int64) * stride + at, mask=at < V, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # one zero, as floats compare
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(at < V, order, -0x80000000)
    best = tl.max(order, 0)
    index = tl.min(tl.where(order == best, at, 0x7FFFFFFF), 0)
    winner = best.to(tl.int64) * 0x100000000 + (0x7FFFFFFF - index).to(tl.int64)
    if PARTS == 1:
        tl.store(out + row, _finite_or_none(index, best).to(tl.int64))
    else:
        tl.store(part + row * parts + p, winner)
        tl.debug_barrier()
        if tl.atomic_add(counter + row, 1, sem="acq_rel") == parts - 1:
            tl.store(counter + row, 0)
            rp = tl.arange(0, PARTS)
            lowest = -0x8000000000000000
            winners = tl.load(part + row * parts + rp, mask=rp < parts, other=lowest, cache_modifier=".cg")
            winner = tl.max(winners, 0)
            tl.store(out + row, _finite_or_none(0x7FFFFFFF - (winner & 0x7FFFFFFF), winner >> 32))


def part_of(rows: int, width: int) -> int:
    """Values of a part: few where rows are few, so that many programs share one row."""
    part = 1024 if rows <= 4 else 4096 if rows <= 32 else 8192
    return max(part, next_power_of_2(-(-width // MAX_PARTS)))


def argmax_launch(value_RV: Tensor, counters: Tensor, early_launch: bool = False, part: int | None = None) -> Tensor:
    """The Triton kernel; `part` is a power of two."""
    rows, width = value_RV.shape
    part = part or part_of(rows, width)
    parts = -(-width // part)
    index_R = torch.empty(rows, dtype=torch.int64, device=value_RV.device)
    winner_RP = torch.empty(rows, parts, dtype=torch.int64, device=value_RV.device)
    if rows:
        _argmax_kernel[(rows, parts)](
            value_RV, index_R, winner_RP, counters, width, value_RV.stride(0), parts,
            PART=part, PARTS=next_power_of_2(parts), EARLY=early_launch, num_warps=max(1, min(8, part // 512)),
            **({"launch_pdl": True} if early_launch else {}),
        )  # fmt: skip
    return index_R


def argmax(value_RV: Tensor, counters: Tensor, early_launch: bool = False) -> Tensor:
    """See the contract."""
    rows = value_RV.shape[0]
    if value_RV.is_cuda and HAS_TRITON and value_RV.stride(1) == 1 and rows <= counters.numel():
        return argmax_launch(value_RV, counters, early_launch)
    if not value_RV.is_cuda:  # numpy's takes a tenth of the time of torch's
        values = value_RV.numpy()
        best = values.argmax(-1)
        best[~np.isfinite(values[np.arange(len(best)), best])] = -1
        return torch.from_numpy(best)
    return argmax_reference(value_RV)
