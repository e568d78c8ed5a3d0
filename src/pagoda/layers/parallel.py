"""The ranks that share one model: what they exchange, and nothing else."""

import datetime

import torch
import torch.distributed as dist
from torch import Tensor

from pagoda.kernels.all_reduce import OneShot
from pagoda.log import get_logger

log = get_logger(__name__)

gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
JOIN_TIMEOUT = datetime.timedelta(seconds=120)


class Group:
    """`size` ranks of one model; this process is number `rank`. Alone (`Group.single()`), every exchange is a no-op."""

    def __init__(
        self, rank: int = 0, size: int = 1, ranks: dist.ProcessGroup | None = None, device: torch.device | None = None
    ):
        assert 0 <= rank < size and (size == 1 or ranks is not None)
        self.rank = rank
        self.size = size
        self._ranks = ranks
        self._device = device
        self._one_shot: OneShot | None = None

    @classmethod
    def single(cls) -> "Group":
        return cls()

    @classmethod
    def join(cls, rank: int, size: int, address: str, device: torch.device, one_shot: bool = True) -> "Group":
        """Meet the other ranks at `address` (`tcp://host:port`, where rank 0 listens, or `file://` and a path that
        all see); NCCL on a GPU (`one_shot`: with small sums through peers' memory), gloo on a CPU. Blocks until all
        `size` are there, at most two minutes."""
        if size == 1:
            return cls.single()
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        where = {"init_method": address, "rank": rank, "world_size": size, "timeout": JOIN_TIMEOUT}
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, **where)
        group = cls(rank, size, dist.group.WORLD, device)
        if cuda and one_shot:
            group._open_one_shot()
        return group

    def _open_one_shot(self) -> None:
        """Small sums go through peers' memory where every rank can read it; which way is taken is said aloud."""
        opened = None
        try:
            opened = OneShot(self._ranks, self._device)
        except RuntimeError as error:
            log.warning("no peer memory between the GPUs, NCCL sums everything: %s", str(error).split("\n")[0])
        if self.smallest(int(opened is not None)):
            self._one_shot = opened

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; every rank gets the same bits."""
        if self.size == 1:
            return x
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot.all_reduce_(x)
        dist.all_reduce(x, group=self._ranks)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The ranks' tensors (equal shapes) side by side along `dim`, in the order of the ranks."""
        if self.size == 1:
            return x
        all_N = x.new_empty(self.size, *x.shape)
        gather_into(all_N.flatten(0, 1), x.contiguous(), group=self._ranks)
        return torch.cat(all_N.unbind(), dim)

    def smallest(self, value: int) -> int:
        """The least of the ranks' numbers, on every rank; waits for it."""
        if self.size == 1:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=self._device)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._ranks)
        return int(least)

    def close(self) -> None:
        """Leave the group; exchanges are an error from here on."""
        if self.size > 1 and self._ranks is not None:
            self._ranks = self._one_shot = None
            dist.destroy_process_group()
