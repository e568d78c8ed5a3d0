"""Choose one token a row: temperature, top-k, top-p, min-p and counter-based noise. No sort on a GPU.

Contract. `choose_tokens(logits_RV, slot_R, knob_SK, seed_S, count_S, filters) -> token_R` (int64, fresh).
`logits_RV`: float32, contiguous rows, banned tokens are -inf; not changed. `slot_R` int64 picks the rows of the state:
`knob_SK` float32 with the columns temperature (0: greedy), top_k (0: off), top_p (1: off), min_p (0: off) first;
`seed_S` int64 (bits of an unsigned number), `count_S` int64 (tokens that the request has generated). `filters` False:
no row has top-k, top-p or min-p. A row without a finite best score (nothing is a number, or all is banned) has the
token -1. No host synchronisation on CUDA; shapes alone decide the launches.

A token's noise is a function of (seed, count, token id) alone, so what a request samples depends neither on its
neighbours in the batch nor on the device's kernels. Noise is Gumbel's: the largest of score + noise is a sample of
softmax(score). The filters are those of transformers' warpers, in its order: temperature; top-k keeps what is at least
the k-th largest; top-p keeps what has less than p of the rest's mass strictly above it; min-p keeps what is at least
min_p times as likely as the most likely. Tied tokens are kept or dropped together.

Legend: R rows, S slots, K knobs, V vocabulary, P parts of the vocabulary.
"""

import torch

from pagoda.kernels.gumbel import gumbel, row_keys
from pagoda.kernels.sample_cpu import MIN_P, TEMPERATURE, TOP_K, TOP_P, choose_tokens_cpu
from pagoda.kernels.triton_env import HAS_TRITON, jit, next_power_of_2, tl

# ---- reference -----------------------------------------------------------------------------------------------------


def filter_reference(score_RV: torch.Tensor, top_k_R, top_p_R, min_p_R) -> torch.Tensor:
    """Scores (after temperature) with what the filters drop at -inf. Sorts; defines the semantics."""
    ordered_RV = score_RV.sort(-1, descending=True).values
    width = score_RV.shape[1]
    k_R = torch.where(top_k_R > 0, top_k_R, width).long().clamp(1, width)
    kept_RV = score_RV.masked_fill(score_RV < ordered_RV.gather(1, k_R[:, None] - 1), -torch.inf)
    ordered_RV = ordered_RV.masked_fill(ordered_RV < ordered_RV.gather(1, k_R[:, None] - 1), -torch.inf)
    prob_RV = ordered_RV.softmax(-1)
    above_RV = prob_RV.cumsum(-1) - prob_RV
    # The last position in order whose mass above is below p; p = 1 keeps all.
    last_R1 = ((above_RV < top_p_R[:, None]).sum(-1, keepdim=True) - 1).clamp(min=0)
    last_R1 = torch.where(top_p_R[:, None] >= 1, width - 1, last_R1)
    kept_RV = kept_RV.masked_fill(kept_RV < ordered_RV.gather(1, last_R1), -torch.inf)
    floor_R1 = ordered_RV[:, :1] + min_p_R[:, None].log()
    return kept_RV.masked_fill(kept_RV < floor_R1, -torch.inf)


def choose_tokens_reference(logits_RV, slot_R, knob_SK, seed_S, count_S, filters) -> torch.Tensor:
    """The contract in plain torch, on any device."""
    knob_RK = knob_SK.index_select(0, slot_R)
    temperature_R1 = knob_RK[:, TEMPERATURE, None]
    score_RV = logits_RV / torch.where(temperature_R1 > 0, temperature_R1, 1.0)
    if filters:
        score_RV = filter_reference(score_RV, knob_RK[:, TOP_K], knob_RK[:, TOP_P], knob_RK[:, MIN_P])
    first_R, second_R = row_keys(seed_S.index_select(0, slot_R), count_S.index_select(0, slot_R))
    token_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    noise_RV = gumbel(first_R[:, None], second_R[:, None], token_V)
    best = (score_RV + noise_RV.masked_fill(temperature_R1 <= 0, 0.0)).max(-1)
    return torch.where(best.values.isfinite(), best.indices, -1)


# ---- GPU: two kernels ------------------------------------------------------------------------------------------------
#
# A sample of the filtered set is found without building the set. The set holds the likeliest tokens down to some
# score, so the winner of score + noise over all tokens is the answer if it is in the set; if not, then nothing from its
# score down is in the set either, and the winner among the rest is asked next. A token is in the set when fewer than k
# tokens, and less than p of the mass, lie strictly above it. Most rows are done after the first question.
#
# Distances y = best score - score are 0 or more, and such floats are ordered like their bits: a bound on y is an int.


@jit
def _mix_kernel(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _keys_kernel(seed, count):
    """`row_keys` of one row."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    golden = tl.full([], 0x9E3779B9, tl.uint32)
    first = _mix_kernel(_mix_kernel(low + golden * (count + 1).to(tl.uint32)) ^ high)
    return first, _mix_kernel(first ^ low ^ 0x85EBCA6B)


@jit
def _gumbel_kernel(first, second, token):
    """`gumbel` of a block of tokens."""
    golden = tl.full([], 0x9E3779B9, tl.uint32)
    x = token.to(tl.uint32) * golden + first
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ second
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    v = ((x >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10
    series = v * (1 + v * (0.5 + v * 0.3333333333333333))
    return -tl.log(tl.where(v < 0.01, series, -tl.log(1 - tl.minimum(v, 0.99999994))))


@jit
def _parts_kernel(
    logits_ptr, slot_ptr, knob_ptr, seed_ptr, count_ptr, part_ptr, winner_ptr,
    width, logits_stride, knob_stride, FILTERS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part of one row: its best score + noise and that token; with filters also its best score and its mass
    relative to that. Part values [R, P, 3], winners [R, P]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + row)
    temperature = tl.load(knob_ptr + slot * knob_stride)
    token = part * PART + tl.arange(0, PART)
    score = tl.load(logits_ptr + row * logits_stride + token, token < width, float("-inf"))
    noisy = score
    if temperature > 0:
        first, second = _keys_kernel(tl.load(seed_ptr + slot), tl.load(count_ptr + slot))
        score = score / temperature
        noisy = score + _gumbel_kernel(first, second, token)
    out = row * tl.num_programs(1) + part
    tl.store(winner_ptr + out, part * PART + tl.argmax(noisy, 0))
    some_nan = tl.sum((noisy != noisy).to(tl.int32), 0) > 0  # which a maximum passes over
    tl.store(part_ptr + out * 3, tl.where(some_nan, float("inf"), tl.max(noisy, 0)))
    if FILTERS:
        best = tl.max(score, 0)
        tl.store(part_ptr + out * 3 + 1, best)
        mass = tl.sum(tl.exp(score - best), 0)
        tl.store(part_ptr + out * 3 + 2, tl.where(best > float("-inf"), mass, 0.0))


@jit
def _distance_bits(row_ptr, token, width, temperature, best):
    """Bits of y; those of a NaN, above all others, beyond the vocabulary."""
    score = tl.load(row_ptr + token, token < width, float("-inf")) / temperature
    y = best - score
    return tl.where(token < width, y.to(tl.int32, bitcast=True), 0x7FFFFFFF), y


@jit
def _count_to(row_ptr, width, temperature, best, b1, b2, b3, BLOCK: tl.constexpr):
    """Numbers of tokens with y up to each of three bounds."""
    n1 = tl.zeros([BLOCK], tl.int32)
    n2 = tl.zeros([BLOCK], tl.int32)
    n3 = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        bits, _ = _distance_bits(row_ptr, start + tl.arange(0, BLOCK), width, temperature, best)
        n1 += (bits <= b1).to(tl.int32)
        n2 += (bits <= b2).to(tl.int32)
        n3 += (bits <= b3).to(tl.int32)
    return tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)


@jit
def _kth_bound(row_ptr, width, temperature, best, k, BLOCK: tl.constexpr):
    """A bound on y that keeps what is at least the k-th largest: a search that quarters, done when exactly k remain."""
    low = tl.full([], -1, tl.int32)
    high = tl.full([], 0x7F800000, tl.int32)
    kept = tl.full([], 0, tl.int32) + width
    while (high - low > 1) & (kept != k):
        step = tl.maximum((high - low) // 4, 1)
        b1, b2, b3 = low + step, low + (high - low) // 2, high - step
        n1, n2, n3 = _count_to(row_ptr, width, temperature, best, b1, b2, b3, BLOCK)
        low = tl.where(n3 < k, b3, tl.where(n2 < k, b2, tl.where(n1 < k, b1, low)))
        kept = tl.where(n1 >= k, n1, tl.where(n2 >= k, n2, tl.where(n3 >= k, n3, kept)))
        high = tl.where(n1 >= k, b1, tl.where(n2 >= k, b2, tl.where(n3 >= k, b3, high)))
    return high


@jit
def _above(row_ptr, width, temperature, best, bound, BLOCK: tl.constexpr):
    """Number and mass (relative to the best token's) of the tokens with y up to a bound."""
    num = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        bits, y = _distance_bits(row_ptr, start + tl.arange(0, BLOCK), width, temperature, best)
        num += (bits <= bound).to(tl.int32)
        mass += tl.where(bits <= bound, tl.exp(-y), 0.0)
    return tl.sum(num, 0), tl.sum(mass, 0)


@jit
def _winner_to(row_ptr, width, temperature, best, bound, first, second, BLOCK: tl.constexpr):
    """The winner of score + noise among the tokens with y up to a bound; -1 if there is none."""
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, width, BLOCK):
        token = start + tl.arange(0, BLOCK)
        bits, y = _distance_bits(row_ptr, token, width, temperature, best)
        noisy = tl.where(bits <= bound, _gumbel_kernel(first, second, token) - y, float("-inf"))
        winner = tl.where(noisy > value, token, winner)
        value = tl.maximum(noisy, value)
    index = tl.argmax(value, 0)
    return tl.sum(tl.where(tl.arange(0, BLOCK) == index, winner, 0), 0)


@jit
def _filtered_kernel(
    row_ptr, width, winner, best, total, temperature, top_k, top_p, min_p, first, second, BLOCK: tl.constexpr
):
    """Ask winner after winner until one is in the filtered set."""
    limited = (top_k > 0) & (top_k < width)
    k = tl.where(limited, top_k, width)
    bound = tl.full([], 0x7F800000, tl.int32)
    if limited & (top_p < 1):  # p is a share of what top-k leaves
        bound = _kth_bound(row_ptr, width, temperature, best, k, BLOCK)
        _num, total = _above(row_ptr, width, temperature, best, bound, BLOCK)
    mass_limit = tl.where(top_p < 1, top_p * total, float("inf"))
    if min_p > 0:
        bound = tl.minimum(bound, tl.abs(tl.log(min_p)).to(tl.int32, bitcast=True))
    token, asking = winner, winner >= 0
    while asking:
        y = best - tl.load(row_ptr + token) / temperature
        bits = y.to(tl.int32, bitcast=True)
        inside = bits <= bound
        if inside & (bits > 0) & (limited | (top_p < 1)):
            num, mass = _above(row_ptr, width, temperature, best, bits - 1, BLOCK)
            inside = (num < k) & (mass < mass_limit)
        asking = (inside == 0) & (bits > 0)
        if asking:
            winner = token
            bound = tl.minimum(bound, bits - 1)
            token = _winner_to(row_ptr, width, temperature, best, bound, first, second, BLOCK)
            asking = token >= 0
    return tl.where(token >= 0, token, winner)


@jit
def _choose_kernel(
    logits_ptr, slot_ptr, knob_ptr, seed_ptr, count_ptr, part_ptr, winner_ptr, out_ptr,
    width, num_parts, logits_stride, knob_stride, FILTERS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the best of its parts, then the filters."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    at = row * num_parts + part
    noisy = tl.load(part_ptr + at * 3, part < num_parts, float("-inf"))
    winners = tl.load(winner_ptr + at, part < num_parts, 0)
    token = tl.sum(tl.where(part == tl.argmax(noisy, 0), winners, 0), 0)
    token = tl.minimum(token, width - 1)  # where nothing is a number, argmax may point anywhere
    if FILTERS:
        slot = tl.load(slot_ptr + row)
        knobs = knob_ptr + slot * knob_stride
        temperature = tl.load(knobs)
        if temperature > 0:
            bests = tl.load(part_ptr + at * 3 + 1, part < num_parts, float("-inf"))
            best = tl.max(bests, 0)
            total = tl.sum(tl.load(part_ptr + at * 3 + 2, part < num_parts, 0.0) * tl.exp(bests - best), 0)
            first, second = _keys_kernel(tl.load(seed_ptr + slot), tl.load(count_ptr + slot))
            row_ptr = logits_ptr + row * logits_stride
            top_k = tl.load(knobs + 1).to(tl.int32)
            token = _filtered_kernel(
                row_ptr, width, token, best, total, temperature, top_k, tl.load(knobs + 2), tl.load(knobs + 3),
                first, second, BLOCK,
            )  # fmt: skip
    best_noisy = tl.max(noisy, 0)
    token = tl.where((best_noisy > float("-inf")) & (best_noisy < float("inf")), token, -1)
    tl.store(out_ptr + row, token.to(tl.int64))


def choose_tokens_triton(logits_RV, slot_R, knob_SK, seed_S, count_S, filters, part: int = 8192, block: int = 4096):
    """The contract by the two kernels, in `part`s of the vocabulary and `block`s of the filters' passes."""
    rows, width = logits_RV.shape
    num_parts = -(-width // part)
    part_RP3 = torch.empty(rows, num_parts, 3, dtype=torch.float32, device=logits_RV.device)
    winner_RP = torch.empty(rows, num_parts, dtype=torch.int32, device=logits_RV.device)
    token_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    strides = (logits_RV.stride(0), knob_SK.stride(0))
    state = (logits_RV, slot_R, knob_SK, seed_S, count_S)
    _parts_kernel[rows, num_parts](
        *state, part_RP3, winner_RP, width, *strides, FILTERS=filters, PART=part, num_warps=8
    )
    _choose_kernel[(rows,)](
        *state, part_RP3, winner_RP, token_R, width, num_parts, *strides,
        FILTERS=filters, PARTS=next_power_of_2(num_parts), BLOCK=block, num_warps=16 if filters else 1,
    )  # fmt: skip
    return token_R


# ---- door ----------------------------------------------------------------------------------------------------------


def choose_tokens(
    logits_RV: torch.Tensor,
    slot_R: torch.Tensor,
    knob_SK: torch.Tensor,
    seed_S: torch.Tensor,
    count_S: torch.Tensor,
    filters: bool,
) -> torch.Tensor:
    """See the contract on top."""
    assert logits_RV.dtype == torch.float32 and logits_RV.shape[0] == slot_R.numel()
    if logits_RV.device.type == "cpu":
        return choose_tokens_cpu(logits_RV, slot_R, knob_SK, seed_S, count_S, filters)
    form = choose_tokens_triton if HAS_TRITON and logits_RV.stride(1) == 1 else choose_tokens_reference
    return form(logits_RV, slot_R, knob_SK, seed_S, count_S, filters)
