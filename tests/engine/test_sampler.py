"""Sampling against transformers' logits processors, against itself in other batches, and against chance."""

import random

import numpy as np
import pytest
import torch
import transformers

from pagoda.engine.request import SamplingParams, check_sizes
from pagoda.engine.sampler import SampleFlags, SamplingState, flags_of, sample
from pagoda.engine.schedule import SlotInit
from pagoda.errors import RequestError
from pagoda.kernels.gumbel import gumbel, gumbel_numpy, keys_of, row_keys
from pagoda.kernels.sample import choose_tokens_reference, filter_reference
from pagoda.kernels.sample_cpu import best_tokens, choose_tokens_cpu

V = 300


def make(*requests: tuple[dict, list[int], int], slots: tuple[int, ...] | None = None, num_slots: int = 6):
    """A state whose slots hold requests of (params, history, prompt length)."""
    state = SamplingState(num_slots + 1, V, torch.device("cpu"))
    slots = slots or tuple(range(len(requests)))
    state.set_slots(
        [SlotInit(s, "", SamplingParams(**p), h, n, n) for s, (p, h, n) in zip(slots, requests, strict=True)]
    )
    return state, torch.tensor(slots)


def logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def run(state, slots, logits_RV, mask=None):
    sampled = sample(logits_RV, slots, state, state.flags(slots.tolist()), mask)
    state.count_S[slots] += 1
    return sampled


FILTERS = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": V + 9}, {"top_p": 0.3}, {"top_p": 0.95}, {"top_p": 1e-6}, {"min_p": 0.05},
    {"min_p": 1.0}, {"top_k": 40, "top_p": 0.8}, {"top_k": 5, "top_p": 0.5, "min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.01},
]  # fmt: skip


def hf_filter(score_RV, top_k=0, top_p=1.0, min_p=0.0):
    if top_k:
        score_RV = transformers.TopKLogitsWarper(top_k)(None, score_RV)
    if top_p < 1:
        score_RV = transformers.TopPLogitsWarper(top_p)(None, score_RV)
    return transformers.MinPLogitsWarper(min_p)(None, score_RV) if min_p else score_RV


@pytest.mark.parametrize("knobs", FILTERS)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_filters_keep_what_transformers_keeps(knobs, scale):
    score_RV = logits(20, seed=len(knobs), scale=scale)
    column = {n: torch.full((20,), float(knobs.get(n, d))) for n, d in (("top_k", 0), ("top_p", 1), ("min_p", 0))}
    ours = filter_reference(score_RV, column["top_k"], column["top_p"], column["min_p"])
    assert torch.equal(ours, hf_filter(score_RV, **knobs))


@pytest.mark.parametrize("knobs", [{}, *FILTERS])
def test_cpu_form_chooses_as_the_reference(knobs):
    state, slots = make(
        *[({"temperature": 0.7, "seed": s, **knobs}, [1], 1) for s in range(5)], ({"temperature": 0}, [1], 1)
    )
    for seed in range(40):
        arguments = (logits(6, seed, 0.3 + seed % 4), slots, state.knob_SK, state.seed_S, state.count_S, bool(knobs))
        assert torch.equal(choose_tokens_cpu(*arguments), choose_tokens_reference(*arguments))
        state.count_S += 1


def test_the_best_tokens_are_found_by_the_parts_that_they_lie_in():
    rng = torch.Generator().manual_seed(4)
    for width, size in ((1000, 5), (20000, 65), (20011, 65), (300000, 1025)):
        scores = torch.randn(3, width, generator=rng)
        value, token = best_tokens(scores, size)
        want = scores.topk(size, 1)
        assert torch.equal(value, want.values) and torch.equal(token, want.indices)


def test_small_amounts_of_noise_are_the_same_noise():
    rng = random.Random(2)
    for _ in range(50):
        seed, count = rng.getrandbits(64), rng.randrange(10000)
        signed = seed - (seed >> 63 << 64)
        keys = row_keys(torch.tensor([signed]), torch.tensor([count]))
        assert tuple(int(key) for key in keys) == keys_of(signed, count) == keys_of(seed, count)
        token = torch.randint(0, 2**18, (1, 400))
        ours = gumbel_numpy(*(np.array([[int(key)]], np.uint32) for key in keys), token.numpy())
        torch.testing.assert_close(torch.from_numpy(ours), gumbel(keys[0][:, None], keys[1][:, None], token))


def test_a_real_vocabulary_of_few_likely_tokens_chosen_in_any_company():
    """Peaked scores, rows of every kind at once; each as the reference chooses it, and as alone."""
    kinds = [{"top_k": 20, "top_p": 0.9}, {"top_p": 0.95}, {"min_p": 0.02}, {}, {"temperature": 0.0}, {"top_k": 900},
             {"top_k": 3000, "top_p": 0.5}, {"top_p": 0.9999}, {"top_k": 64}, {"top_k": 65, "min_p": 0.3}]  # fmt: skip
    requests = [({"temperature": 0.8, "seed": i, **kind}, [1], 1) for i, kind in enumerate(kinds)]
    state, slots = make(*requests, num_slots=len(kinds))
    for seed in range(12):
        scores = torch.randn(len(kinds), 30000, generator=torch.Generator().manual_seed(seed)) * (0.5 + seed % 4)
        scores[:, 77:90] += 6.0
        if seed % 3 == 0:
            scores = scores.round()  # ties
        arguments = (state.knob_SK, state.seed_S, state.count_S, True)
        chosen = choose_tokens_cpu(scores, slots, *arguments)
        assert chosen.tolist() == choose_tokens_reference(scores, slots, *arguments).tolist()
        alone = [int(choose_tokens_cpu(scores[i : i + 1], slots[i : i + 1], *arguments)) for i in range(len(kinds))]
        assert alone == chosen.tolist()
        state.count_S += 1


@pytest.mark.parametrize(
    "knobs", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}]
)
@pytest.mark.parametrize("logprobs", [None, 2])
def test_rows_without_numbers_get_no_token(knobs, logprobs):
    state, slots = make(*[({**knobs, "repetition_penalty": 1.5, "logprobs": logprobs}, [1], 1)] * 5)
    scores = torch.stack([torch.full((V,), value) for value in (torch.nan, -torch.inf, torch.inf, 1.0, 1.0)])
    scores[3, 7] = torch.nan
    for _ in range(2):
        chosen = sample(scores, slots, state, state.flags(slots.tolist())).token_R.tolist()
        assert chosen[:4] == [-1] * 4 and 0 <= chosen[4] < V


def test_a_token_that_was_generated_ever_so_often_stays_penalised():
    """Counts stop at what their type holds; they do not wrap."""
    many = 2**15 - 2
    state, slots = make(({"frequency_penalty": 1.0, "temperature": 0.0}, [1] + [5] * many, 1))
    scores = torch.zeros(1, V)
    scores[0, 5] = many + 10.0
    for _ in range(4):
        assert sample(scores, slots, state, state.flags([0])).token_R.tolist() == [5]
    scores[0, 5] = many - 10.0
    assert sample(scores, slots, state, state.flags([0])).token_R.tolist() != [5]
    again, _ = make(({"frequency_penalty": 1.0, "temperature": 0.0}, [1] + [5] * (2 * many), 1))
    assert sample(scores, slots, again, again.flags([0])).token_R.tolist() != [5]


@pytest.mark.parametrize("width", [5000, 20000])
def test_cpu_form_with_a_large_flat_vocabulary_and_ties(width):
    flat_V = torch.zeros(1, width)
    flat_V[0, -1000:] = torch.linspace(0, 1, 1000)
    knob_SK = torch.tensor([[1.0, 0.0, 0.9, 0.0]])
    for count in range(20):
        seed_S, count_S = torch.tensor([5]), torch.tensor([count])
        arguments = (flat_V, torch.tensor([0]), knob_SK, seed_S, count_S, True)
        assert torch.equal(choose_tokens_cpu(*arguments), choose_tokens_reference(*arguments))


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 8}, {"top_p": 0.7}, {"min_p": 0.1, "top_k": 30}]
)
def test_frequencies_follow_the_filtered_distribution(knobs):
    """Chi-square over 20000 draws of consecutive counters under one seed."""
    knobs = {"temperature": 1.0, **knobs}
    score_V = logits(1, 3, 1.5)[:, :40]
    state, _ = make(({**knobs, "seed": 2**64 - 3}, [1], 1))
    num = 20000
    count_S = torch.arange(num)
    token_R = choose_tokens_reference(
        score_V.expand(num, -1),
        torch.arange(num),
        state.knob_SK[:1].expand(num, -1),
        state.seed_S[:1].expand(num),
        count_S,
        True,
    )
    temperature = knobs.pop("temperature")
    prob_V = hf_filter(score_V / temperature, **knobs).softmax(-1)[0].double()
    seen_V = torch.bincount(token_R, minlength=40).double()
    assert (seen_V[prob_V == 0] == 0).all()
    kept = prob_V > 0
    chi = ((seen_V - num * prob_V)[kept] ** 2 / (num * prob_V)[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi < freedom + 5 * (2 * max(freedom, 1)) ** 0.5


def test_noise_is_gumbel_and_independent_of_neighbours():
    first, second = row_keys(torch.arange(50), torch.zeros(50, dtype=torch.int64))
    noise_RN = gumbel(first[:, None], second[:, None], torch.arange(20000)).double()
    assert abs(noise_RN.mean() - 0.57721) < 0.005 and abs(noise_RN.std() - 1.28255) < 0.005
    assert abs(torch.corrcoef(noise_RN)[~torch.eye(50, dtype=torch.bool)]).max() < 0.04
    lagged = torch.stack([noise_RN[:, 1:].flatten(), noise_RN[:, :-1].flatten()])
    assert abs(torch.corrcoef(lagged)[0, 1]) < 0.005
    keys = torch.stack(row_keys(torch.tensor(7), torch.arange(10000)))
    assert len(set(map(tuple, keys.T.tolist()))) == 10000


def test_a_row_samples_the_same_alone_in_a_batch_and_after_a_preemption():
    one = ({"seed": 11, "top_k": 50, "repetition_penalty": 1.3, "bad_words": ((4, 5),)}, [1, 2, 3], 3)
    others = [({"seed": s, "top_p": 0.9}, [1], 1) for s in range(3)]
    alone, slot = make(one)
    tokens = []
    for i in range(8):
        tokens.append(int(run(alone, slot, logits(4, i)[:1]).token_R))
    batch, slots = make(one, *others, slots=(4, 0, 2, 1))
    assert [int(run(batch, slots, logits(4, i)).token_R[0]) for i in range(8)] == tokens
    resumed, slot = make((one[0], [1, 2, 3, *tokens[:5]], 3))
    assert [int(run(resumed, slot, logits(4, i)[:1]).token_R) for i in range(5, 8)] == tokens[5:]


def test_penalties_equal_transformers_and_the_formula():
    history = [3, 4, 5, 5, 9, 9, 9]
    state, slots = make(({"repetition_penalty": 1.7, "temperature": 0}, history, 3), ({"temperature": 0}, history, 3))
    logits_RV = logits(2)
    ours = state.penalties.apply(logits_RV, slots, state.knob_SK[slots])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), logits_RV[:1].clone())
    torch.testing.assert_close(ours, torch.cat([theirs, logits_RV[1:]]))
    state, slots = make(({"presence_penalty": 0.5, "frequency_penalty": 0.25}, history, 3))
    expected = logits_RV[:1].clone()
    expected[0, 5] -= 0.5 + 0.25
    expected[0, 9] -= 0.5 + 0.75
    torch.testing.assert_close(state.penalties.apply(logits_RV[:1], slots, state.knob_SK[slots]), expected)


def test_penalties_follow_what_is_sampled_and_leave_with_the_request():
    state, slots = make(({"temperature": 0, "frequency_penalty": 2.0}, [1], 1))
    fixed = logits(1)
    order = fixed[0].sort(descending=True)
    seen = [int(run(state, slots, fixed).token_R) for _ in range(6)]
    assert seen[0] == order.indices[0] and len(set(seen)) > 1
    counts, free = {}, fixed[0].clone()
    for token in seen:
        assert token == int(free.argmax())
        counts[token] = counts.get(token, 0) + 1
        free[token] -= 2.0
    state.set_slots([SlotInit(0, "", SamplingParams(temperature=0, frequency_penalty=0.1), [1], 1, 1)])
    assert int(run(state, slots, fixed).token_R) == order.indices[0]


def test_bias_bad_words_and_min_tokens_equal_transformers():
    history = [7, 8, 9, 20, 21]
    words = ((30,), (20, 21, 31), (21, 32), (9, 21, 33), (8, 9, 20, 21, 34), (1, 2, 3, 4, 5, 6, 35))
    bias = {40: 5.0, 41: -100.0, 0: 1.5}
    params = {"bad_words": words, "logit_bias": bias, "stop_ids": (50, 51), "min_tokens": 3, "temperature": 0}
    state, slots = make((params, history, 3), ({**params, "min_tokens": 2}, history, 3))
    logits_RV = logits(2)
    ours = state.edits.apply(logits_RV, slots, state.count_S[slots])
    ids = torch.tensor([history] * 2)
    above = [[[t], b] for t, b in bias.items() if t > 0]  # some releases of transformers refuse token 0
    theirs = transformers.SequenceBiasLogitsProcessor(above)(ids, logits_RV.clone())
    theirs[:, 0] += bias[0]
    theirs = transformers.NoBadWordsLogitsProcessor([list(w) for w in words], eos_token_id=[299])(ids, theirs)
    theirs[0, [50, 51]] = -torch.inf
    torch.testing.assert_close(ours, theirs)
    assert ours[0].isinf().sum() == 6 and ours[1].isinf().sum() == 4


def test_edits_leave_with_the_request():
    old = {"temperature": 0.0, "logit_bias": {3: 90.0}, "bad_words": ((5,),), "min_tokens": 4, "stop_ids": (6,)}
    state, slots = make((old, [1], 1), (old, [1], 1))
    state.set_slots([SlotInit(0, "", SamplingParams(temperature=0.0), [1], 1, 1)])
    for token in (4, 5, 6):
        scores = torch.zeros(2, V)
        scores[:, token] = 9.0
        assert run(state, slots, scores).token_R.tolist() == [token, 3]


def test_bad_words_follow_what_is_sampled():
    state, slots = make(({"temperature": 0, "bad_words": ((5, 6), (6, 7))}, [1], 1))
    rows = torch.zeros(4, 1, V)
    rows[0, 0, 5], rows[1:, 0, 6], rows[1:, 0, 8], rows[2, 0, 6], rows[3, 0, 7] = 1, 2, 1, 2, 3
    assert [int(run(state, slots, row).token_R) for row in rows] == [5, 8, 6, 6]


def test_no_stop_before_min_tokens():
    state, slots = make(({"temperature": 0, "stop_ids": (3,), "min_tokens": 2}, [1], 1))
    sure = torch.zeros(1, V)
    sure[0, 3], sure[0, 4] = 9, 8
    assert [int(run(state, slots, sure).token_R) for _ in range(4)] == [4, 4, 3, 3]


def test_grammar_mask_bans_clear_bits_and_what_lies_beyond():
    state, slots = make(({"temperature": 0}, [1], 1), ({"seed": 1}, [1], 1))
    mask = torch.zeros(2, 9, dtype=torch.int32)
    mask[0, 3], mask[1, 1] = -(2**31), 1 << 4
    assert run(state, slots, logits(2), mask).token_R.tolist() == [127, 36]


def test_logprobs_are_of_the_raw_logits():
    state, slots = make(
        ({"temperature": 0.01, "logprobs": 2, "repetition_penalty": 9.0, "seed": 1}, [1], 1), ({}, [1], 1)
    )
    logits_RV = logits(2)
    result = run(state, slots, logits_RV)
    expected = logits_RV.log_softmax(-1)
    tokens = result.token_R.tolist()
    for row, news in enumerate(result.read_logprobs(tokens)):
        assert news.token == tokens[row] and news.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        best = expected[row].topk(5)
        assert [t for t, _ in news.top] == best.indices.tolist()
        assert [p for _, p in news.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    greedy, slots = make(({"temperature": 0}, [1], 1))
    assert run(greedy, slots, logits_RV[:1]).read_logprobs([1]) is None


def test_flags_say_what_is_needed_and_large_tensors_come_on_demand():
    assert flags_of(SamplingParams(temperature=0, top_k=5)) == SampleFlags()
    assert flags_of(SamplingParams(top_p=0.5, logprobs=3)) == SampleFlags(False, True, logprobs=5)
    assert flags_of(SamplingParams(temperature=1e-5, stop_ids=(1,), min_tokens=1)) == SampleFlags(edits=True)
    state, _ = make(({"temperature": 0}, [1], 1), ({}, [1], 1))
    assert state.penalties is None and state.edits is None
    assert state.flags([0]) == SampleFlags() and state.flags([0, 1]) == SampleFlags(False)
    state.set_slots([SlotInit(1, "", SamplingParams(presence_penalty=1.0), [1], 1, 1)])
    assert state.penalties is not None and state.flags([0, 1]) == SampleFlags(False, penalties=True)


def test_logits_are_not_changed_and_padding_rows_are_harmless():
    state, _ = make(({"temperature": 0, "repetition_penalty": 1.5, "logit_bias": {3: 9.0}}, [1], 1))
    logits_RV = logits(4)
    kept = logits_RV.clone()
    trash = state.num_slots - 1
    result = sample(logits_RV, torch.tensor([0, trash, trash, trash]), state, state.flags([0]))
    assert torch.equal(logits_RV, kept) and torch.equal(result.token_R[1:], kept[1:].argmax(-1))


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"stop_ids": tuple(range(65))}, "stop_ids"),
        ({"logit_bias": {i: 0.0 for i in range(1025)}}, "logit_bias"),
        ({"bad_words": ((1,),) * 129}, "bad_words"),
        ({"bad_words": ((1,) * 17,)}, "bad_words"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_lists_that_do_not_fit_are_refused(params, field):
    with pytest.raises(RequestError) as error:
        check_sizes(SamplingParams(**params))
    assert error.value.param == field
    check_sizes(SamplingParams(stop_ids=tuple(range(64)), bad_words=((1,) * 16,), logprobs=20))
