"""Executors run a step program; they differ in speed, not in result."""

from typing import Protocol

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.errors import WorkspaceError
from pagoda.layers.parallel import Group
from pagoda.models.decoder import StepInput, StepProgram


class Executor(Protocol):
    """One rank's model and its cache. `graph_safe`: `forward` of a decode step may be captured into a CUDA graph.
    `weight_bytes`: what its own copy of the weights holds; None where it runs on those that were loaded."""

    graph_safe: bool
    weight_bytes: int | None

    def bytes_per_block(self) -> int:
        """Of one block of the KV cache: all layers, this rank's heads."""

    def allocate_cache(self, num_blocks: int) -> None:
        """Blocks 0 .. num_blocks - 1; block 0 is scratch, where padding rows may write. A token past the end of a row
        has no effect on it, even if what a block's earlier owner left there is no number."""

    def free_cache(self) -> None:
        """Give the blocks' memory back."""

    def forward(self, step: StepInput, gather: bool = True) -> Tensor:
        """Logits [L, V] float32 of the wanted rows, on every rank; the step's keys and values go to the cache.
        Without `gather` V is this rank's rows of the head, padding included."""

    def describe(self) -> str:
        """One line for the start-up report: what runs, and why not something faster."""


def make_executor(
    program: StepProgram, config: EngineConfig, device: torch.device, dtype: torch.dtype, group: Group
) -> Executor:
    """The fastest executor for this device that takes this program."""
    why_eager = ""
    if device.type == "cpu":
        from pagoda.models.executors.cpu import make_cpu_executor

        made = make_cpu_executor(program, config, device, dtype, group)
        if not isinstance(made, str):
            return made
        why_eager = made
        if any(getattr(op, "linear", None) is not None and op.linear.scheme.name == "packed" for op in program.ops):
            raise WorkspaceError(
                f"The workspace is packed for the C++ step, which cannot run here ({made}): "
                "convert the checkpoint again without --device cpu."
            )
    if device.type == "cuda":
        from pagoda.models.executors.gpu import GpuExecutor

        return GpuExecutor(program, config, device, dtype, group)
    from pagoda.models.executors.eager import EagerExecutor

    return EagerExecutor(program, config, device, dtype, group, why_eager)
