"""One launch gathers a decode step from the batch's state, one advances it."""

import pytest
import torch

from pagoda.kernels import batch_step


@pytest.mark.parametrize(("rows", "width", "block_len"), [(1, 8, 64), (5, 3, 16), (7, 600, 8)])
def test_kernels_equal_their_references(device: torch.device, rows: int, width: int, block_len: int) -> None:
    slots, blocks = 9, width + 5
    last_S = torch.randint(0, 1000, (slots,), device=device)
    len_S = torch.randint(0, width * block_len, (slots,), device=device, dtype=torch.int32)
    rope_S = torch.randint(0, 99, (slots,), device=device, dtype=torch.int32)
    table_SB = torch.randint(0, 5000, (slots, blocks), device=device, dtype=torch.int32)
    slot_R = torch.randperm(slots - 1, device=device)[:rows]
    args = (slot_R, last_S, len_S, rope_S, table_SB, block_len, width)
    forms = [batch_step.launch_gather] + [batch_step.gather_decode_numpy] * (device.type == "cpu")
    for form in forms:
        for got, want in zip(form(*args), batch_step.gather_decode_reference(*args), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("form", ["launch_advance", "advance_rows_numpy"])
@pytest.mark.parametrize("rows", [1, 6, 200])
def test_advance_equals_its_reference(device: torch.device, rows: int, form: str) -> None:
    if form == "advance_rows_numpy" and device.type != "cpu":
        pytest.skip("the form of CPUs")
    slots = rows + 4
    trash = slots - 1
    state = [torch.randint(1, 99, (slots,), device=device, dtype=d) for d in (torch.int64, torch.int32, torch.int64)]
    state[2][trash] = 0
    slot_R = torch.cat([torch.randperm(trash, device=device)[:rows], torch.full((3,), trash, device=device)])
    sample_R = slot_R.clone()
    sample_R[rows // 2 : rows - 1] = trash  # these do not sample
    kv_len_R = torch.randint(1, 500, (rows + 3,), device=device, dtype=torch.int32)
    token_R = torch.randint(0, 1000, (rows + 3,), device=device)
    token_R[-4] = -1  # none was chosen
    ours, theirs = ([t.clone() for t in state] for _ in range(2))
    getattr(batch_step, form)(slot_R, kv_len_R, sample_R, token_R, *ours)
    batch_step.advance_rows_reference(slot_R, kv_len_R, sample_R, token_R, *theirs)
    for got, want, before in zip(ours, theirs, state, strict=True):
        assert torch.equal(got[:trash], want[:trash])
        assert not torch.equal(got, before)
    assert ours[1][trash] == 0, "trash stays empty"
    assert (ours[0] >= 0).all(), "the next step reads the embedding of it"
    assert int(ours[2].sum() - state[2].sum()) == int((sample_R != trash).sum())


@pytest.mark.parametrize(("num_triples", "num_pairs"), [(0, 1), (4, 0), (150, 3), (2, 140)])
def test_changes_equal_their_reference(device: torch.device, num_triples: int, num_pairs: int) -> None:
    slots, width = 150, 7
    cells = torch.randperm(slots * width)[:num_triples]
    triples = torch.stack([cells // width, cells % width, torch.randint(1, 9999, (num_triples,))], 1)
    pairs = torch.stack([torch.randperm(slots)[:num_pairs], torch.randint(1, 99, (num_pairs,))], 1)
    packed = torch.cat([triples.flatten(), pairs.flatten()]).to(device)
    ours, theirs = (
        [torch.zeros(size, dtype=torch.int32, device=device) for size in ((slots, width), (slots,))] for _ in range(2)
    )
    batch_step.launch_changes(packed, num_triples, *ours)
    batch_step.write_changes_reference(packed, num_triples, *theirs)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert int((ours[0] > 0).sum()) == num_triples and int((ours[1] > 0).sum()) == num_pairs
