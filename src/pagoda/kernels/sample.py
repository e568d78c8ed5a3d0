"""Choose one token a row: temperature, top-k, top-p, min-p and counter-based noise. No sort on a GPU.

Contract. `choose_tokens(logits_RV, slot_R, knob_SK, seed_S, count_S, filters) -> token_R` (int64, fresh).
`logits_RV`: float32, contiguous rows, banned tokens are -inf; not changed. `slot_R` int64 picks the rows of the state:
`knob_SK` float32 with the columns temperature (0: greedy), top_k (0: off), top_p (1: off), min_p (0: off) first;
`seed_S` int64 (bits of an unsigned number), `count_S` int64 (tokens that the request has generated). `filters` False:
no row has top-k, top-p or min-p. No host synchronisation on CUDA; shapes alone decide the launches.

A token's noise is a function of (seed, count, token id) alone, so what a request samples depends neither on its
neighbours in the batch nor on the device's kernels. Noise is Gumbel's: the largest of score + noise is a sample of
softmax(score). The filters are those of transformers' warpers, in its order: temperature; top-k keeps what is at least
the k-th largest; top-p keeps what has less than p of the rest's mass strictly above it; min-p keeps what is at least
min_p times as likely as the most likely. Tied tokens are kept or dropped together.

Legend: R rows, S slots, K knobs, V vocabulary, P parts of the vocabulary.
"""

import math

import torch

TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)
PART = 8192  # tokens of one program of the first kernel
MASK32 = 0xFFFFFFFF
INF_BITS = 0x7F800000


# ---- noise ---------------------------------------------------------------------------------------------------------


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers (held in int64) that spreads every bit (the constants are Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def row_keys(seed_R: torch.Tensor, count_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit keys of a row (int64, 0 to 2^32-1)."""
    low_R, high_R = seed_R & MASK32, (seed_R >> 32) & MASK32
    first_R = _mix(_mix((low_R + 0x9E3779B9 * (count_R + 1)) & MASK32) ^ high_R)
    return first_R, _mix(first_R ^ low_R ^ 0x85EBCA6B)


def gumbel(first_R1: torch.Tensor, second_R1: torch.Tensor, token_RN: torch.Tensor) -> torch.Tensor:
    """Noise of tokens under row keys: float32, shaped as the broadcast of the arguments. int32 arithmetic wraps."""
    x = token_RN.to(torch.int32) * (0x9E3779B9 - 2**32) + first_R1.to(torch.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D ^ second_R1.to(torch.int32)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    x = x ^ ((x >> 16) & 0xFFFF)
    v = (((x >> 1) & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    series = v * (1 + v * (0.5 + v * (1 / 3)))  # -log(1 - v), whose small values float32 would lose
    return -torch.where(v < 0.01, series, -torch.log(1 - v.clamp(max=1 - 2.0**-24))).log()


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
    return (score_RV + noise_RV.masked_fill(temperature_R1 <= 0, 0.0)).argmax(-1)


# ---- CPU: candidates first, noise for them alone ---------------------------------------------------------------------


def choose_tokens_cpu(logits_RV, slot_R, knob_SK, seed_S, count_S, filters) -> torch.Tensor:
    """Row by row: a selection is much cheaper here than noise or a sort over the vocabulary."""
    first_R, second_R = row_keys(seed_S.index_select(0, slot_R), count_S.index_select(0, slot_R))
    tokens = []
    for row, slot in enumerate(slot_R.tolist()):
        temperature, top_k, top_p, min_p = knob_SK[slot, : MIN_P + 1].tolist()
        logits_V = logits_RV[row]
        if temperature <= 0:
            tokens.append(int(logits_V.argmax()))
            continue
        score_V = logits_V / temperature
        token_N = _candidates(score_V, int(top_k), top_p, min_p) if filters else torch.arange(score_V.numel())
        noise_N = gumbel(first_R[row], second_R[row], token_N)
        tokens.append(int(token_N[(score_V[token_N] + noise_N).argmax()]))
    return torch.tensor(tokens, dtype=torch.int64)


def _candidates(score_V: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Ids that pass the filters: all from a floor on."""
    width, top = score_V.numel(), score_V.max()
    floor = score_V.topk(top_k).values[-1] if 0 < top_k < width else score_V.min()
    if top_p < 1:
        best_N = score_V[score_V >= floor]
        total = best_N.logsumexp(0)
        best_N = _best(best_N, total, top_p)
        prob_N = (best_N - total).exp()
        floor = best_N[max(int((prob_N.cumsum(0) - prob_N < top_p).sum()), 1) - 1]
    if min_p > 0:
        floor = torch.maximum(floor, top + math.log(min_p))
    return (score_V >= floor).nonzero().squeeze(1)


def _best(score_N: torch.Tensor, total: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores in falling order, at least as many as hold the share `top_p`; few of them suffice nearly always."""
    few = score_N.topk(min(1024, score_N.numel())).values
    enough = few.numel() == score_N.numel() or float((few - total).exp().sum()) > top_p
    return few if enough else score_N.sort(descending=True).values


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
    return choose_tokens_reference(logits_RV, slot_R, knob_SK, seed_S, count_S, filters)
