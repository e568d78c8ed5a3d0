"""Exchanges between ranks, in real processes over gloo; the oracle: arithmetic on what every rank is known to hold."""

import pytest
import torch
import torch.multiprocessing as mp

from pagoda.layers.embedding import embed
from pagoda.layers.parallel import Group


def work(rank: int, size: int, folder: str) -> None:
    group = Group.join(rank, size, f"file://{folder}/meet", torch.device("cpu"))
    mine = torch.arange(6.0).view(2, 3) + 100 * rank
    everyone = [torch.arange(6.0).view(2, 3) + 100 * r for r in range(size)]
    torch.testing.assert_close(group.all_gather(mine), torch.cat(everyone, 1))
    torch.testing.assert_close(group.all_gather(mine, 0), torch.cat(everyone, 0))
    torch.testing.assert_close(group.all_reduce_(mine.clone()), sum(everyone))
    assert group.smallest(7 - rank) == 8 - size
    table = torch.arange(20.0).view(10, 2)
    token = torch.tensor([0, 4, 5, 9, 5])
    part = table[5 * rank : 5 * rank + 5]
    torch.testing.assert_close(embed(token, part, 3.0, group, split=True), table[token] * 3)
    group.close()


@pytest.mark.timeout(120)
def test_two_ranks_exchange(tmp_path):
    mp.spawn(work, (2, str(tmp_path)), nprocs=2)


def test_alone_every_exchange_returns_its_argument():
    group, x = Group.single(), torch.arange(6.0).view(2, 3)
    assert (group.rank, group.size) == (0, 1)
    assert group.smallest(7) == 7
    assert group.all_gather(x) is x and group.all_reduce_(x) is x
