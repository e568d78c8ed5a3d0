"""The ranks that share one model: what they exchange, and nothing else."""

import datetime
import os
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pagoda.kernels.all_reduce import OneShot
from pagoda.log import get_logger

log = get_logger(__name__)

gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # it can wedge a shared host
JOIN_TIMEOUT = datetime.timedelta(seconds=120)
GATHER_BYTES = 1 << 16  # up to here a gather is a sum with zeros: one way over the link, where NCCL takes several


class Group:
    """`size` ranks of one model; this process is number `rank`. Alone (`Group.single()`), every exchange is a no-op."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        ranks: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        one_shot: OneShot | None = None,
    ):
        assert 0 <= rank < size and (size == 1 or ranks is not None)
        self.rank = rank
        self.size = size
        self._ranks = ranks
        self._device = device
        self._one_shot = one_shot
        self._way = f"{dist.get_backend(ranks)} sums everything" if ranks is not None else "one rank"

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
            os.environ.update(NO_MULTICAST)
        where = {"init_method": address, "rank": rank, "world_size": size, "timeout": JOIN_TIMEOUT}
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, **where)
        group = cls(rank, size, dist.group.WORLD, device)
        if cuda and one_shot:
            group._open_one_shot()
        return group

    def _open_one_shot(self) -> None:
        """Small sums go through peers' memory where every rank can write it and the sums are right there."""
        assert self._ranks is not None and self._device is not None
        if not self._on_one_host():
            self._way = "NCCL sums everything: the ranks are not on one machine"
            return
        opened, why = None, "a test of it gave wrong sums, or another rank could not open it"
        try:
            opened = OneShot.open(self._ranks, self._device)
        except (RuntimeError, ImportError, AttributeError, TypeError) as error:  # torch's API is alpha
            why = str(error).split("\n")[0]
        if self.smallest(int(opened is not None)) and opened and self.smallest(int(opened.works())):
            self._one_shot = opened
            self._way = f"sums of up to {opened.max_bytes >> 10} KiB in one shot through peers' memory, others by NCCL"
        else:
            self._way = f"NCCL sums everything, no peer memory between the GPUs: {why}"
            log.warning(self._way)

    def _on_one_host(self) -> bool:
        boot = Path("/proc/sys/kernel/random/boot_id")
        name = zlib.crc32(boot.read_bytes()) if boot.exists() else 0
        return self.smallest(name) == -self.smallest(-name)

    def describe(self) -> str:
        """How sums travel, for the start-up report."""
        return self._way

    def sums_at_once(self, num_bytes: int, dtype: torch.dtype) -> bool:
        """Whether `sum_` takes a message of that size."""
        return self._one_shot is not None and self._one_shot.takes(num_bytes, dtype)

    def sum_(
        self, x_TC: Tensor, residual: Tensor, norm: Any = None, early: bool = False
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(residual + the ranks' x, in place of the residual; its RMSNorm with `norm`, a gain and an epsilon) in one
        kernel; only where `sums_at_once`. The same bits on every rank. early: see `kernels.all_reduce`."""
        assert self._one_shot is not None
        return self._one_shot.sum_(x_TC, residual, norm, early)

    def all_reduce_(self, x: Tensor, early: bool = False) -> Tensor:
        """Sum over the ranks, in place; every rank gets the same bits. early: as in `sum_`, where it goes that way."""
        if self.size == 1:
            return x
        if x.is_contiguous() and x.data_ptr() % 16 == 0 and self.sums_at_once(x.nbytes, x.dtype):
            assert self._one_shot is not None
            return self._one_shot.sum_(x, early=early)[0]
        dist.all_reduce(x, group=self._ranks)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The ranks' tensors (equal shapes) side by side along `dim`, in the order of the ranks."""
        if self.size == 1:
            return x
        if self.size * x.nbytes <= GATHER_BYTES and self.sums_at_once(self.size * x.nbytes, x.dtype):
            all_N = x.new_zeros(self.size, *x.shape)
            all_N[self.rank] = x
            return torch.cat(self.all_reduce_(all_N).unbind(), dim)
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
            self._ranks = self._one_shot = None  # peers' memory is unmapped before the ranks part
            dist.destroy_process_group()
