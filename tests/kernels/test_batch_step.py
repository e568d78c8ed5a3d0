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
    for got, want in zip(batch_step.launch_gather(*args), batch_step.gather_decode_reference(*args), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)

    padded_R = torch.cat([slot_R, torch.full((3,), slots - 1, device=device)])
    token_R = torch.randint(0, 1000, (rows + 3,), device=device)
    token_R[rows:] = 4
    states = [(last_S.clone(), len_S.clone()) for _ in range(2)]
    batch_step.launch_advance(padded_R, token_R, *states[0])
    batch_step.advance_decode_reference(padded_R, token_R, *states[1])
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])
    assert states[0][1][-1] == 0, "trash stays empty"
