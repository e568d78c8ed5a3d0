"""Sum of small tensors over the GPUs of one host: one shot through peer memory.

Contract: every rank calls with a tensor of equal shape and dtype, contiguous, of at most `max_bytes` bytes, in the same
order; x is overwritten by the sum, bitwise equal on every rank (each adds the ranks' parts in the order of the ranks).
Device work only, on the current stream; may be captured in a CUDA graph.

Each rank copies x into its symmetric buffer, waits until the others have, and reads all buffers itself: one kernel
(torch's, over symmetric memory), one round trip. Every rank reads what all others hold, so larger messages are left to
NCCL; `benchmarks/tensor_parallel.py` measures where. Multicast (multimem) is never used.
"""

import torch
import torch.distributed as dist
from torch import Tensor

ONE_SHOT_BYTES = {2: 1 << 20, 3: 1 << 19, 4: 1 << 19}
ONE_SHOT_BYTES_MORE = 1 << 18  # more ranks
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def all_reduce_reference(parts: list[Tensor]) -> Tensor:
    """What every rank gets."""
    return torch.stack([p.float() for p in parts]).sum(0).to(parts[0].dtype)


class OneShot:
    """A symmetric buffer of one group. Making it is a collective; `RuntimeError` where peers' memory cannot be read."""

    def __init__(self, ranks: dist.ProcessGroup, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric

        self._name = ranks.group_name
        self.max_bytes = ONE_SHOT_BYTES.get(ranks.size(), ONE_SHOT_BYTES_MORE)
        symmetric.set_backend("CUDA")
        self._buffer = symmetric.empty(self.max_bytes, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._buffer, self._name)
        self._views = {dtype: self._buffer.view(dtype) for dtype in DTYPES}

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is small enough, and of a layout that the kernel reads in whole words."""
        aligned = x.data_ptr() % 16 == 0 and x.nbytes % 16 == 0
        return 0 < x.nbytes <= self.max_bytes and x.dtype in self._views and x.is_contiguous() and aligned

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See the contract; `takes(x)`."""
        flat = x.view(-1)
        buffer = self._views[x.dtype][: flat.numel()]
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, flat, "sum", self._name, flat)
        return x
