"""Steps as CUDA graphs: one replay gathers, runs the model, samples and advances.

A graph is captured when its key is needed (the first time for decode steps, a later one for steps with prompt chunks,
which come in more shapes), so start-up waits for none. The graphs of a cache share one static input; all share a pool.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch

from pagoda.log import get_logger

# Padding costs at most an eighth of a step's rows above 16.
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
SIZES += tuple(range(320, 1025, 64))
MIXED_SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # tokens of steps with prompt chunks
MIXED_SIZES += (640, 768, 896, 1024, 1280, 1536, 1792, 2048)
# Weights times tokens of the largest such step: beyond, a GPU computes for longer than the host needs to launch the
# step kernel by kernel (about 8 ms), so that a graph would gain nothing and its padding would cost.
MIXED_WORK = 4e12

log = get_logger(__name__)


def padded_rows(num_rows: int, most: int) -> int:
    """The smallest graph size that holds `num_rows`, at most `most`."""
    return next((size for size in SIZES if num_rows <= size <= most), most)


def padded_width(num_blocks: int, most: int) -> int:
    """Table width of a graph: a power of two of at least 8 blocks, at most the widest table."""
    return min(most, max(8, 1 << (num_blocks - 1).bit_length()))


def mixed_rows(num_rows: int, most: int) -> int:
    """Rows of a graph with prompt chunks: a power of four, at most `most`. Rows of padding cost little there, and each
    size costs a capture for each of the other sizes."""
    return min(most, 1 << -(-(num_rows - 1).bit_length() // 2) * 2)


def mixed_width(num_blocks: int, most: int) -> int:
    """The same for its table: eight blocks times a power of four."""
    return min(most, 8 * mixed_rows(-(-num_blocks // 8), most))


def largest_mixed(num_weights: int) -> int:
    """The most tokens of a graph with prompt chunks, for a model that multiplies each token with so many weights."""
    return max(size for size in MIXED_SIZES if size <= max(MIXED_SIZES[0], MIXED_WORK / num_weights))


class GraphCache:
    """Graphs of one function `body(input_N, key) -> outputs` that touches only device memory. `blank(key)` is an int64
    array to warm up with: an input of padding alone, as long (at most `size`) as all inputs of that key. `patience`:
    how often a key must have come before it gets a graph; `most`: how many graphs there may be. Caches may share their
    memory `pool` and the stream `side` on which they capture: libraries keep a workspace for each stream."""

    def __init__(
        self,
        body: Callable[[torch.Tensor, Any], Any],
        blank: Callable[[Any], np.ndarray],
        size: int,
        device: torch.device,
        pool: Any,
        side: torch.cuda.Stream,
        patience: int = 0,
        most: int = 4096,
    ):
        self._body, self._blank, self._device, self._pool, self._side = body, blank, device, pool, side
        self._patience, self._most = patience, most
        self._input_N = torch.zeros(size, dtype=torch.int64, device=device)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._seen: Counter[Hashable] = Counter()

    def takes(self, key: Hashable) -> bool:
        """Whether this occurrence of the key is to be a replay. Every occurrence must ask once."""
        if key in self._graphs:
            return True
        self._seen[key] += 1
        return self._seen[key] > self._patience and len(self._graphs) < self._most

    def run(self, key: Hashable, values_N: np.ndarray | None) -> Any:
        """Replay (capture first where needed). `values_N` None: the input is that of the last run. The outputs are
        overwritten by the next run of any graph."""
        if values_N is not None:
            host_N = torch.from_numpy(values_N).pin_memory()
            self._input_N[: len(values_N)].copy_(host_N, non_blocking=True)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        graph, outputs = self._graphs[key]
        graph.replay()
        return outputs

    def _capture(self, key: Hashable) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Warm up on padding (kernels compile, the allocator fills), then record."""
        log.debug("capture a graph: %s", key)
        wanted_N, blank_N = self._input_N.clone(), torch.from_numpy(self._blank(key))
        input_N = self._input_N[: blank_N.numel()]
        input_N.copy_(blank_N)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._side):
            for _ in range(2):
                self._body(input_N, key)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask for events meanwhile (NCCL's watchdog does): only this thread's calls are held to rules.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            outputs = self._body(input_N, key)
        self._input_N.copy_(wanted_N)
        torch.cuda.synchronize(self._device)
        return graph, outputs

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()
        self._pool = None
