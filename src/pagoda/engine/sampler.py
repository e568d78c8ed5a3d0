"""From logits to tokens: the sampling state of all slots as device tensors, and one step over it.

The order is that of transformers' logits processors: repetition penalty (prompt and generated tokens), presence and
frequency penalty (generated tokens), logit bias, bad words, no stop before `min_tokens`, grammar mask, temperature,
top-k, top-p, min-p. Log-probabilities are of the model's own logits, before any of these.

Everything here is device work of fixed shapes without synchronisation, so that a decode graph may hold it; which parts
run is decided by `SampleFlags`, which the host knows from the requests.

Legend: R rows, S slots, V vocabulary, K knobs, E edits, W bad words, L tokens of a bad word, N top log-probabilities.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from pagoda.engine.request import (
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_IDS,
    SamplingParams,
    TokenLogprobs,
)
from pagoda.engine.schedule import SlotInit
from pagoda.kernels.argmax import argmax
from pagoda.kernels.sample import choose_tokens
from pagoda.kernels.triton_env import starts_early
from pagoda.layers.parallel import Group

REPETITION, PRESENCE, FREQUENCY = 4, 5, 6  # columns of knob_SK, after those of kernels/sample.py
NUM_KNOBS = 8
TOP_COUNTS = (0, 5, 20)  # how many top log-probabilities a step computes: few values, so that graphs are few
MOST_COUNT = 2**15 - 1  # a token that was generated more often counts as this often
COLDEST = 1e-4  # a temperature below is greedy: dividing by it would overflow


class SampleFlags(NamedTuple):
    """What a step's rows need. `logprobs`: number of top log-probabilities, -1 for none at all."""

    all_greedy: bool = True
    filters: bool = False  # top-k, top-p or min-p
    penalties: bool = False
    edits: bool = False  # logit bias, bad words or min_tokens
    logprobs: int = -1

    @property
    def plain(self) -> bool:
        """The largest score of each row decides."""
        return self.all_greedy and not (self.penalties or self.edits) and self.logprobs < 0

    def union(self, other: "SampleFlags") -> "SampleFlags":
        return SampleFlags(
            self.all_greedy and other.all_greedy,
            self.filters or other.filters,
            self.penalties or other.penalties,
            self.edits or other.edits,
            max(self.logprobs, other.logprobs),
        )


def flags_of(params: SamplingParams) -> SampleFlags:
    """What one request needs."""
    greedy = params.temperature < COLDEST
    logprobs = params.logprobs
    return SampleFlags(
        all_greedy=greedy,
        filters=not greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
        penalties=(params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0),
        edits=bool(params.logit_bias or params.bad_words or (params.min_tokens and params.stop_ids)),
        logprobs=-1 if logprobs is None else next(n for n in TOP_COUNTS if logprobs <= n),
    )


@dataclass(frozen=True)
class Sampled:
    """Tokens of a step's rows; log-probabilities only when asked for."""

    token_R: torch.Tensor  # int64
    logprob_R: torch.Tensor | None = None  # float32, of the chosen token
    top_value_RN: torch.Tensor | None = None
    top_token_RN: torch.Tensor | None = None

    def to_host(self, num_rows: int) -> "Sampled":
        """Enqueue copies of the first rows into pinned memory; an event recorded afterwards tells when they arrived."""
        names = [name for name, tensor in vars(self).items() if tensor is not None]
        copies = {}
        for name in names:
            source = getattr(self, name)[:num_rows]
            pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.device.type == "cuda")
            copies[name] = pinned.copy_(source, non_blocking=True)
        return replace(self, **copies)

    def read_logprobs(self, tokens: list[int]) -> list[TokenLogprobs | None] | None:
        """Of the rows whose tokens are given, on the host; every row gets as many as the step computed."""
        if self.logprob_R is None or self.top_value_RN is None or self.top_token_RN is None:
            return None
        rows = zip(tokens, self.logprob_R.tolist(), self.top_token_RN.tolist(), self.top_value_RN.tolist())
        return [TokenLogprobs(token, own, list(zip(ids, values))) for token, own, ids, values in rows]


class SamplingState:
    """Sampling state of `num_slots` slots, the last of which is the trash slot. The large tensors are made when a
    request first needs them, and then stay, because graphs refer to them."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device):
        self.num_slots, self.vocab_size, self.device = num_slots, vocab_size, torch.device(device)
        self.knob_SK = torch.tensor(_NEUTRAL, dtype=torch.float32).repeat(num_slots, 1).to(device)
        self.seed_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.count_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.arrivals_S = torch.zeros(num_slots, dtype=torch.int32, device=device)  # counters of `argmax`
        self.early_launch = starts_early(self.device)
        self.penalties: PenaltyState | None = None
        self.edits: EditState | None = None
        self._flags = [SampleFlags()] * num_slots

    def flags(self, slots: list[int]) -> SampleFlags:
        """What a step over these slots needs."""
        result = SampleFlags()
        for flags in {self._flags[slot] for slot in slots}:
            result = result.union(flags)
        return result

    def set_slots(self, inits: list[SlotInit]) -> None:
        """Take new tenants: one packed upload, and more only for those with penalties or edits."""
        knobs = np.array([_knobs(init.params) for init in inits], np.float32)
        slots = np.array([init.slot for init in inits], np.int64)
        seeds = np.array([init.params.seed for init in inits], np.uint64).view(np.int64)
        counts = np.array([len(init.history) - init.num_prompt for init in inits], np.int64)
        packed = np.concatenate([slots, seeds, counts, knobs.reshape(-1).view(np.int64)])
        num = len(inits)
        device_packed = self._upload(packed)
        slot_R = device_packed[:num]
        self.seed_S.index_copy_(0, slot_R, device_packed[num : 2 * num])
        self.count_S.index_copy_(0, slot_R, device_packed[2 * num : 3 * num])
        self.knob_SK.index_copy_(0, slot_R, device_packed[3 * num :].view(torch.float32).view(num, NUM_KNOBS))
        for init in inits:
            before, flags = self._flags[init.slot], flags_of(init.params)
            self._flags[init.slot] = flags
            if flags.penalties:
                self.penalties = self.penalties or PenaltyState(self.num_slots, self.vocab_size, self.device)
                self.penalties.set_slot(init, self._upload)
            if flags.edits or before.edits:  # the last tenant's edits would hold wherever a neighbour has some
                self.edits = self.edits or EditState(self.num_slots, self.device)
                self.edits.set_slot(init, self._upload)

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        """To the device without waiting."""
        host = torch.from_numpy(np.ascontiguousarray(values))
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host


_NEUTRAL = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)  # greedy, no filters, no penalties; NUM_KNOBS wide


def _knobs(params: SamplingParams) -> tuple[float, ...]:
    temperature = params.temperature if params.temperature >= COLDEST else 0.0
    filters = (params.top_k, params.top_p, params.min_p)
    return (temperature, *filters, params.repetition_penalty, params.presence_penalty, params.frequency_penalty, 0.0)


class PenaltyState:
    """What a slot's request has seen: `count_SV` how often it generated each token, `prompt_SV` those of its prompt.
    On a CPU, where the host knows every token, `_seen` has their ids by slot: a small part of the vocabulary."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device):
        self.count_SV = torch.zeros(num_slots, vocab_size, dtype=torch.int16, device=device)
        self.prompt_SV = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._seen: dict[int, torch.Tensor] | None = {} if device.type == "cpu" else None

    def set_slot(self, init: SlotInit, upload) -> None:
        if self._seen is not None:
            self._seen[init.slot] = torch.from_numpy(np.unique(np.array(init.history, np.int64)))
        prompt, generated = init.history[: init.num_prompt], init.history[init.num_prompt :]
        self.prompt_SV[init.slot].zero_().index_fill_(0, upload(np.unique(np.array(prompt, np.int64))), True)
        token, count = np.unique(np.array(generated, np.int64), return_counts=True)
        self.count_SV[init.slot].zero_()[upload(token)] = upload(np.minimum(count, MOST_COUNT).astype(np.int16))

    def apply(self, logits_RV: torch.Tensor, slot_R: torch.Tensor, knob_RK: torch.Tensor) -> torch.Tensor:
        """Repetition penalty (transformers' formula: divides positive scores, multiplies negative ones), then presence
        and frequency penalty (OpenAI's formula)."""
        if self._seen is not None:
            return self._apply_seen(self._seen, logits_RV, slot_R.tolist(), knob_RK)
        count_RV = self.count_SV.index_select(0, slot_R)
        seen_RV = self.prompt_SV.index_select(0, slot_R) | (count_RV > 0)
        penalty_R1 = knob_RK[:, REPETITION, None]
        scaled_RV = torch.where(logits_RV > 0, logits_RV / penalty_R1, logits_RV * penalty_R1)
        taken_RV = (count_RV > 0) * knob_RK[:, PRESENCE, None] + count_RV * knob_RK[:, FREQUENCY, None]
        return torch.where(seen_RV, scaled_RV, logits_RV) - taken_RV

    def _apply_seen(
        self, seen: dict[int, torch.Tensor], logits_RV: torch.Tensor, slots: list[int], knob_RK: torch.Tensor
    ) -> torch.Tensor:
        """`apply`, token by token that was seen."""
        logits_RV = logits_RV.clone()
        for r, (slot, knobs) in enumerate(zip(slots, knob_RK[:, REPETITION : FREQUENCY + 1].tolist())):
            if slot not in seen or knobs == [1.0, 0.0, 0.0]:
                continue
            old_N, count_N = logits_RV[r, seen[slot]], self.count_SV[slot, seen[slot]]
            penalty, presence, frequency = knob_RK[r, REPETITION], knob_RK[r, PRESENCE], knob_RK[r, FREQUENCY]
            scaled_N = torch.where(old_N > 0, old_N / penalty, old_N * penalty)
            logits_RV[r, seen[slot]] = scaled_N - ((count_N > 0) * presence + count_N * frequency)
        return logits_RV

    def advance(self, slot_R: torch.Tensor, token_R: torch.Tensor) -> None:
        if self._seen is not None:
            for slot, token in zip(slot_R.tolist(), token_R):
                if slot in self._seen and not (self.count_SV[slot, token] > 0 or self.prompt_SV[slot, token]):
                    self._seen[slot] = torch.cat([self._seen[slot], token[None]])
        self.count_SV.index_put_((slot_R, token_R), self.count_SV[slot_R, token_R].clamp(max=MOST_COUNT - 1) + 1)


class EditState:
    """What is added to single tokens' scores. Lists are padded with -1.

    `bias_*_SE` logit bias; `stop_SE` ids that are banned before `min_tokens_S` tokens; `word_SWL` bad words, aligned to
    the right: the last token is banned when the ones before it are the last that the sequence holds (`recent_SL`).
    """

    def __init__(self, num_slots: int, device: torch.device):
        ints = {"dtype": torch.int64, "device": device}
        self.bias_token_SE = torch.full((num_slots, MAX_LOGIT_BIAS), -1, **ints)
        self.bias_SE = torch.zeros(num_slots, MAX_LOGIT_BIAS, device=device)
        self.stop_SE = torch.full((num_slots, MAX_STOP_IDS), -1, **ints)
        self.min_tokens_S = torch.zeros(num_slots, **ints)
        self.word_SWL = torch.full((num_slots, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, **ints)
        self.recent_SL = torch.full((num_slots, MAX_BAD_WORD_LEN - 1), -2, **ints)

    def set_slot(self, init: SlotInit, upload) -> None:
        params, slot = init.params, init.slot
        words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, np.int64)
        for i, word in enumerate(params.bad_words):
            words[i, -len(word) :] = word
        recent = np.full(MAX_BAD_WORD_LEN - 1, -2, np.int64)
        tail = init.history[-len(recent) :]
        recent[len(recent) - len(tail) :] = tail
        bias = np.zeros(MAX_LOGIT_BIAS, np.float32)
        bias[: len(params.logit_bias)] = list(params.logit_bias.values())
        self.bias_token_SE[slot].copy_(upload(_padded(params.logit_bias, MAX_LOGIT_BIAS)))
        self.bias_SE[slot].copy_(upload(bias))
        self.stop_SE[slot].copy_(upload(_padded(params.stop_ids, MAX_STOP_IDS)))
        self.min_tokens_S[slot] = params.min_tokens
        self.word_SWL[slot].copy_(upload(words))
        self.recent_SL[slot].copy_(upload(recent))

    def apply(self, logits_RV: torch.Tensor, slot_R: torch.Tensor, count_R: torch.Tensor) -> torch.Tensor:
        stop_RE = self.stop_SE.index_select(0, slot_R)
        early_R1 = (count_R < self.min_tokens_S.index_select(0, slot_R))[:, None]
        word_RWL = self.word_SWL.index_select(0, slot_R)
        before_RWL, last_RW = word_RWL[..., :-1], word_RWL[..., -1]
        recent_RWL = self.recent_SL.index_select(0, slot_R)[:, None]
        said_RW = ((before_RWL == -1) | (before_RWL == recent_RWL)).all(-1) & (last_RW >= 0)
        token_RE = torch.cat([self.bias_token_SE.index_select(0, slot_R), stop_RE, last_RW], 1)
        banned_RE = torch.cat([early_R1 & (stop_RE >= 0), said_RW], 1)
        ban_RE = torch.zeros_like(banned_RE, dtype=torch.float32).masked_fill(banned_RE, -torch.inf)
        # Padding adds 0 to token 0.
        added_RE = torch.cat([self.bias_SE.index_select(0, slot_R), ban_RE], 1)
        return logits_RV.scatter_add(1, token_RE.clamp(min=0), added_RE)

    def advance(self, slot_R: torch.Tensor, token_R: torch.Tensor) -> None:
        recent_RL = self.recent_SL.index_select(0, slot_R)
        self.recent_SL.index_copy_(0, slot_R, torch.cat([recent_RL[:, 1:], token_R[:, None]], 1))


def _padded(values, width: int) -> np.ndarray:
    row = np.full(width, -1, np.int64)
    row[: len(values)] = list(values)
    return row


def sample(
    logits_RV: torch.Tensor,
    slot_R: torch.Tensor,
    state: SamplingState,
    flags: SampleFlags,
    mask_RW: torch.Tensor | None = None,
    ahead_R: torch.Tensor | None = None,
) -> Sampled:
    """One token for each row, by the parameters of its slot. The caller advances `state.count_S` (`advance_rows`).

    A row without a finite best score has the token -1. `logits_RV`: float32, not changed. `mask_RW`: int32, 32 tokens a
    word, lowest bit first; a clear bit bans the token, and so does the mask's end. `flags` must cover what the slots
    need: `state.flags(slots)`. `ahead_R`: a slot may have several rows, each for the token so many after its next one;
    such a slot has neither penalties nor bad words of several tokens, whose state is not followed from row to row.
    """
    raw_RV = logits_RV
    count_R = state.count_S.index_select(0, slot_R) if flags.edits or ahead_R is not None else None
    if ahead_R is not None:
        count_R = count_R + ahead_R
    if flags.penalties:
        assert state.penalties is not None
        logits_RV = state.penalties.apply(logits_RV, slot_R, state.knob_SK.index_select(0, slot_R))
    if flags.edits:
        assert state.edits is not None
        logits_RV = state.edits.apply(logits_RV, slot_R, count_R)
    if mask_RW is not None:
        logits_RV = _masked(logits_RV, mask_RW)
    if flags.all_greedy:
        token_R = argmax(logits_RV, state.arrivals_S, state.early_launch)
    elif ahead_R is None:
        token_R = choose_tokens(logits_RV, slot_R, state.knob_SK, state.seed_S, state.count_S, flags.filters)
    else:  # every row is a slot of its own
        own = (state.knob_SK.index_select(0, slot_R), state.seed_S.index_select(0, slot_R), count_R)
        token_R = choose_tokens(logits_RV, torch.arange(len(slot_R), device=slot_R.device), *own, flags.filters)
    if flags.penalties and state.penalties is not None:
        state.penalties.advance(slot_R, token_R)
    if flags.edits and state.edits is not None:
        state.edits.advance(slot_R, token_R)
    if flags.logprobs < 0:
        return Sampled(token_R)
    total_R1 = raw_RV.logsumexp(-1, keepdim=True)
    top = raw_RV.topk(min(flags.logprobs, raw_RV.shape[1]), -1)
    own_R = (raw_RV.gather(1, token_R[:, None].clamp(min=0)) - total_R1).squeeze(1)
    return Sampled(token_R, own_R, top.values - total_R1, top.indices)


def greedy_over_ranks(part_RV: torch.Tensor, state: SamplingState, group: Group) -> Sampled:
    """The most likely token of each row, the first of equals, of logits that the ranks hold side by side: the ranks
    exchange one value and one id a row; -1 where a part has no finite best score. `part_RV`: this rank's, float32,
    padded past the end of the vocabulary."""
    start = group.rank * part_RV.shape[1]
    num_real = min(part_RV.shape[1], state.vocab_size - start)
    if num_real > 0:
        part_RV = part_RV[:, :num_real]
    index_R = argmax(part_RV, state.arrivals_S, state.early_launch)
    index_R1 = index_R[:, None]
    none_R1 = index_R1 < 0
    value_R1 = part_RV.gather(1, index_R1.clamp(min=0)).masked_fill_(none_R1, torch.inf)
    id_R1 = (index_R1 + start).float().masked_fill_(none_R1, -1.0)  # exact below 2^24
    mine_R2 = torch.cat([value_R1, id_R1], 1)
    if num_real <= 0:
        mine_R2 = torch.full_like(mine_R2, -torch.inf)
    all_NR2 = group.all_gather(mine_R2[None], 0)
    best_1R = all_NR2[..., 0].argmax(0, keepdim=True)
    return Sampled(all_NR2[..., 1].gather(0, best_1R)[0].long())


def _masked(logits_RV: torch.Tensor, mask_RW: torch.Tensor) -> torch.Tensor:
    bit = torch.arange(32, dtype=torch.int32, device=mask_RW.device)
    allowed_RV = ((mask_RW[:, :, None] >> bit) & 1).flatten(1).bool()[:, : logits_RV.shape[1]]
    missing = logits_RV.shape[1] - allowed_RV.shape[1]
    return logits_RV.masked_fill(~torch.nn.functional.pad(allowed_RV, (0, missing)), -torch.inf)
