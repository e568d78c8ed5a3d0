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
            with torch.cuda.graph(graph):
                group.all_reduce_(static)
            for _ in range(3):
                static.copy_(x)
                graph.replay()
            torch.testing.assert_close(static.cpu(), want, atol=atol, rtol=0.01)
            del graph
    torch.cuda.synchronize()
    group.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("one_shot", [True, False])
def test_two_gpus_sum(one_shot, tmp_path):
    mp.spawn(work, (2, f"file://{tmp_path}/meeting", one_shot), nprocs=2)
