"""Decode steps as CUDA graphs: one replay gathers, runs the model, samples and advances.

A graph is captured the first time its key is needed (rows padded to a size of `SIZES`, table width, sampling flags), so
start-up waits for none. All graphs share one memory pool and one set of static inputs and outputs.
"""

from collections.abc import Callable
from typing import Any

import torch

from pagoda.log import get_logger

# Padding costs at most an eighth of a step's rows above 16.
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
SIZES += tuple(range(320, 1025, 64))

log = get_logger(__name__)


def padded_rows(num_rows: int, most: int) -> int:
    """The smallest graph size that holds `num_rows`, at most `most`."""
    return next((size for size in SIZES if num_rows <= size <= most), most)


def padded_width(num_blocks: int, most: int) -> int:
    """Table width of a graph: a power of two of at least 8 blocks, at most the widest table."""
    return min(most, max(8, 1 << (num_blocks - 1).bit_length()))


class GraphCache:
    """Graphs of one function `body(slot_R, width, flags) -> outputs` that touches only device memory."""

    def __init__(self, body: Callable[[torch.Tensor, int, Any], Any], most_rows: int, trash: int, device: torch.device):
        self._body, self._device, self._most, self._trash = body, device, most_rows, trash
        self.slot_R = torch.zeros(most_rows, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, int, Any], tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def run(self, slot_R: torch.Tensor | None, num_rows: int, width: int, flags: Any) -> Any:
        """Replay (capture first where needed) for `num_rows` rows. `slot_R` None: the rows are those of the last run.
        Returns the outputs of all padded rows; they are overwritten by the next run."""
        rows = padded_rows(num_rows, self._most)
        if slot_R is not None:
            self.slot_R[:num_rows].copy_(slot_R)
            self.slot_R[num_rows:].fill_(self._trash)
        key = (rows, width, flags)
        if key not in self._graphs:
            self._graphs[key] = self._capture(rows, width, flags)
        graph, outputs = self._graphs[key]
        graph.replay()
        return outputs

    def _capture(self, rows: int, width: int, flags: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Warm up on trash rows (kernels compile, the allocator fills), then record."""
        log.debug("capture a decode graph: %d rows, %d blocks, %s", rows, width, flags)
        wanted = self.slot_R.clone()
        self.slot_R.fill_(self._trash)
        torch.cuda.synchronize(self._device)
        side = torch.cuda.Stream(self._device)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._body(self.slot_R[:rows], width, flags)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            outputs = self._body(self.slot_R[:rows], width, flags)
        self._pool = self._pool or graph.pool()
        self.slot_R.copy_(wanted)
        torch.cuda.synchronize(self._device)
        return graph, outputs

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()
        self._pool = None
