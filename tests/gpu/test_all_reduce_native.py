"""Sums over two GPUs, one shot and NCCL, plain and captured; the oracle: the same sum on the host."""

import pytest
import torch
import torch.multiprocessing as mp

from pagoda.kernels.all_reduce import all_reduce_reference
from pagoda.layers.parallel import Group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def check_with_residual_and_norm(group: Group, device: torch.device, dtype: torch.dtype) -> None:
    """Call after call into both slots, rows of every width, early or not; the same bits on both ranks."""
    for n, (rows, width) in enumerate([(1, 4096), (5, 1000), (64, 8192), (1, 64), (256, 4096), (3, 2888)]):
        parts = [torch.randn(rows, width, generator=torch.Generator().manual_seed(9 * n + r)).to(dtype) for r in (0, 1)]
        residual, gain = parts[0].flip(0) + 1, parts[1][0] + 2
        want_y, want_s = all_reduce_reference(parts, residual, (gain, 1e-5))
        for early in (False, True):
            norm = (gain.to(device), 1e-5)
            s, y = group.sum_(parts[group.rank].to(device), residual.to(device), norm, early)
            atol = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(s.cpu(), want_s, atol=atol, rtol=0.01)
            torch.testing.assert_close(y.cpu(), want_y, atol=atol, rtol=0.02)
            bits = int(s.view(torch.int32).long().sum())
            assert group.smallest(bits) == -group.smallest(-bits)


def work(rank: int, size: int, meeting: str, one_shot: bool) -> None:
    device = torch.device("cuda", rank)
    group = Group.join(rank, size, meeting, device, one_shot)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in ((1, 8), (3, 4096), (256, 4096), (7, 13)):
            parts = [torch.randn(shape, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(size)]
            want, x = all_reduce_reference(parts), parts[rank].to(device)
            atol = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(group.all_reduce_(x.clone()).cpu(), want, atol=atol, rtol=0.01)
            graph, static = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events
                group.all_reduce_(static)
            for _ in range(3):
                static.copy_(x)
                graph.replay()
            torch.testing.assert_close(static.cpu(), want, atol=atol, rtol=0.01)
            del graph
        if one_shot:
            assert group.sums_at_once(8192, dtype), group.describe()
            check_with_residual_and_norm(group, device, dtype)
    torch.cuda.synchronize()
    group.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("one_shot", [True, False])
def test_two_gpus_sum(one_shot, tmp_path):
    mp.spawn(work, (2, f"file://{tmp_path}/meeting", one_shot), nprocs=2)
