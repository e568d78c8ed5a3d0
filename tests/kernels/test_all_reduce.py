"""The one-shot sum in Triton's interpreter: ranks are processes, peers' memory is memory that they share.

Natively: tests/gpu/test_all_reduce_native.py. The oracle: sums of what every rank is known to hold.
"""

import os

import pytest
import torch
import torch.multiprocessing as mp

from pagoda.kernels.all_reduce import OneShot, all_reduce_reference, takes_norm
from pagoda.kernels.triton_env import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton's interpreter")
MAX_BYTES = 1 << 14
CALLS = [  # (dtype, shape, residual, norm); the interpreter cuts bfloat16 off where a GPU rounds it
    (torch.float16, (1, 64), False, False),
    (torch.float16, (3, 64), True, True),
    (torch.float32, (2, 20), True, False),
    (torch.float32, (1, 4096), False, False),
    (torch.bfloat16, (2, 40), True, True),
    (torch.float32, (3, 36), False, True),
    (torch.float16, (5, 136), True, False),
    (torch.bfloat16, (1, 264), False, False),
]


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def work(rank: int, size: int, buffers: list[torch.Tensor]) -> None:
    sums = OneShot(rank, torch.tensor([b.data_ptr() for b in buffers]), MAX_BYTES)
    for turn in range(2):
        for n, (dtype, shape, with_residual, with_norm) in enumerate(CALLS):
            seed = 1000 * turn + 20 * n
            parts = [numbers(seed + r, shape, dtype) for r in range(size)]
            residual = numbers(seed + 10, shape, dtype) if with_residual else None
            norm = (numbers(seed + 11, shape[-1:], dtype), 1e-5) if with_norm else None
            want = all_reduce_reference(parts, residual, norm)
            s, y = sums.sum_(parts[rank], residual, norm)
            assert s is (parts[rank] if residual is None else residual)
            close = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
            exact = {"atol": 0, "rtol": 0} if dtype != torch.bfloat16 else close
            torch.testing.assert_close(s, want[1] if with_norm else want, **exact)
            if with_norm:
                torch.testing.assert_close(y, want[0], **close)


def buffers_of(size: int) -> list[torch.Tensor]:
    return [torch.zeros(OneShot.buffer_words(size, MAX_BYTES), dtype=torch.int64).share_memory_() for _ in range(size)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_sum_call_after_call(size, monkeypatch):
    """Both slots many times over, in messages of changing sizes: nobody reads a packet of another call."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    mp.spawn(work, (size, buffers_of(size)), nprocs=size)


def test_a_peer_that_sends_nothing_is_noticed():
    """With patience: the sum is a wrong one, and the call ends."""
    buffers = buffers_of(2)
    sums = OneShot(0, torch.tensor([b.data_ptr() for b in buffers]), MAX_BYTES)
    s, _ = sums.sum_(torch.ones(1, 8), patience=3)
    assert s.tolist() == [[1.0] * 8]
    assert int(buffers[1].count_nonzero()) == 8 and int(buffers[0].count_nonzero()) == 0


def test_what_it_takes():
    sums = OneShot(0, torch.zeros(2, dtype=torch.int64), MAX_BYTES)
    assert sums.takes(16, torch.bfloat16) and sums.takes(MAX_BYTES, torch.float32)
    assert not sums.takes(0, torch.float32) and not sums.takes(MAX_BYTES + 16, torch.float32)
    assert not sums.takes(24, torch.float32) and not sums.takes(16, torch.int64)
    assert takes_norm(torch.empty(4096)) and not takes_norm(torch.empty(6)) and not takes_norm(torch.empty(1 << 15))
