"""The sampling kernels against their plain torch reference: the same noise, so the same tokens."""

import pytest
import torch

from pagoda.kernels.sample import choose_tokens, choose_tokens_reference, choose_tokens_triton

CASES = [
    (1.0, 0, 1.0, 0.0), (0.0, 5, 0.5, 0.0), (0.5, 1, 1.0, 0.0), (1.5, 7, 1.0, 0.0), (1.0, 0, 0.3, 0.0),
    (1.0, 0, 0.95, 0.0), (2.0, 0, 1e-6, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 1.0), (0.8, 40, 0.8, 0.0),
    (1.0, 5, 0.5, 0.2), (1.0, 0, 0.9, 0.01), (3.0, 10**6, 0.99, 0.0), (1.0, 300, 0.999, 0.0),
]  # fmt: skip


def arguments(device, width, scale, seed, filters=True):
    """One row a case, in slots of another order."""
    rows = len(CASES)
    random = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(rows, width, generator=random) * scale
    slot_R = torch.randperm(rows + 3, generator=random)[:rows]
    knob_SK = torch.full((rows + 3, 8), torch.nan)
    for row, slot in enumerate(slot_R.tolist()):
        case = CASES[row]
        knob_SK[slot, :4] = torch.tensor(case if filters else (case[0], 0.0, 1.0, 0.0))
    seed_S = torch.randint(-(2**63), 2**63 - 1, (rows + 3,), generator=random)
    count_S = torch.randint(0, 5000, (rows + 3,), generator=random)
    return [t.to(device) for t in (logits_RV, slot_R, knob_SK, seed_S, count_S)]


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize(("width", "scale"), [(1, 1.0), (37, 3.0), (512, 0.2), (700, 4.0), (1025, 1.5)])
def test_kernels_choose_as_the_reference(device, width, scale, filters):
    args = arguments(device, width, scale, width, filters)
    assert torch.equal(choose_tokens_triton(*args, filters, 256, 256), choose_tokens_reference(*args, filters))


def test_banned_and_tied_tokens(device):
    logits_RV, *state = arguments(device, 300, 2.0, 5)
    logits_RV[:, 3:] = -torch.inf
    assert torch.equal(
        choose_tokens_triton(logits_RV, *state, True, 256, 512), choose_tokens_reference(logits_RV, *state, True)
    )
    tied_RV = logits_RV.masked_fill(logits_RV.isinf(), 1.0)
    assert torch.equal(
        choose_tokens_triton(tied_RV, *state, True, 256, 512), choose_tokens_reference(tied_RV, *state, True)
    )


@pytest.mark.parametrize("filters", [False, True])
def test_rows_that_hold_no_number_have_no_token(device, filters):
    logits_RV, *state = arguments(device, 300, 2.0, 6)
    for poison, where in (
        (-torch.inf, slice(None)),
        (torch.nan, slice(None)),
        (torch.inf, slice(None)),
        (torch.nan, 17),
    ):
        poisoned_RV = logits_RV.clone()
        poisoned_RV[1::2, where] = poison
        token_R = choose_tokens_triton(poisoned_RV, *state, filters, 256, 512)
        assert (token_R[1::2] == -1).all() and ((token_R[::2] >= 0) & (token_R[::2] < 300)).all()
        assert torch.equal(token_R, choose_tokens_reference(poisoned_RV, *state, filters))


def test_rows_of_a_wider_tensor(device):
    logits_RV, *state = arguments(device, 600, 2.0, 7)
    view_RV = logits_RV[:, :333]
    assert torch.equal(choose_tokens(view_RV, *state, True), choose_tokens_reference(view_RV.clone(), *state, True))
    assert torch.equal(
        choose_tokens_triton(view_RV, *state, True, 256, 512), choose_tokens_reference(view_RV, *state, True)
    )
