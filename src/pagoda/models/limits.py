"""The physical limit of a step: bytes over the read rate, operations over the matmul rate.

Decode step = max(weight bytes / read, matmul operations / flops) + KV bytes / read. Prefill = operations / flops,
causal attention counted once, the head only for each prompt's last token. Nothing is measured but `CEILINGS`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pagoda.config import EngineConfig
from pagoda.models.spec import ModelSpec


class Ceiling(NamedTuple):
    """What one device reaches at best: bytes read a second, 16-bit and fp8 matmul operations a second."""

    read: float
    flops: float
    fp8_flops: float


# By a part of the device's name; measured (docs/performance.md). A device that is not here has no known limit.
CEILINGS = {"H200": Ceiling(4.62e12, 686e12, 1257e12)}


def ceiling_of(device: str) -> Ceiling | None:
    """The rates of a device by its name."""
    return next((rates for name, rates in CEILINGS.items() if name in device), None)


class Limits:
    """Of one model under one configuration, split over `config.tp` devices of the same kind."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, ceiling: Ceiling):
        self.scheme = scheme = spec.quant.scheme if spec.quant is not None else config.weight_format
        heads, width = spec.num_heads + 2 * spec.num_kv_heads, spec.num_heads * spec.head_dim
        layer = spec.hidden_size * (heads * spec.head_dim + width + 3 * spec.ffn_size)
        self.body = layer * spec.num_layers  # parameters that every token is multiplied with
        self.head = spec.vocab_size * spec.hidden_size
        self.wide = 4 if (config.dtype if config.dtype != "auto" else spec.dtype) == "float32" else 2
        group = spec.quant.group_size if spec.quant is not None and spec.quant.group_size else 128
        narrow = {"int4": 0.5 + 2.5 / group, "int8": 1.0, "fp8": 1.0}.get(scheme, float(self.wide))
        self.weight_bytes = self.body * narrow + self.head * self.wide
        numbers = {"int8": 1.0, "fp8": 1.0, "int4": 0.5}.get(config.quant_policy, float(self.wide))
        scales = 0 if config.quant_policy == "none" else 4
        self._kv_layer = 2 * spec.num_kv_heads * (spec.head_dim * numbers + scales)  # bytes of a token in one layer
        self._windows = spec.windows or (0,) * spec.num_layers
        self._width = width
        self.read = ceiling.read * config.tp
        self.flops = (ceiling.fp8_flops if scheme == "fp8" else ceiling.flops) * config.tp

    def decode(self, batch: int, context: float) -> float:
        """Seconds of a decode step over `batch` rows of `context` tokens each."""
        seen = sum(min(context, window or context) for window in self._windows)
        compute = 2 * (self.body + self.head) * batch / self.flops
        return max(self.weight_bytes / self.read, compute) + batch * seen * self._kv_layer / self.read

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds to compute prompts from nothing."""
        operations = 0.0
        for n in lengths:
            pairs = sum(n * n / 2 if not w or w >= n else w * n - w * w / 2 for w in self._windows)
            operations += 2 * self.body * n + 2 * self.head + 4 * self._width * pairs
        return operations / self.flops

    def run(self, jobs: Sequence[tuple[int, int]]) -> float:
        """Seconds for jobs (prompt length, tokens to generate) that all arrive at once: all prefill, then all live
        requests decoding with no scheduling loss."""
        seconds = self.prefill([prompt for prompt, _ in jobs])
        for step in range(1, max(wanted for _, wanted in jobs)):
            live = [prompt + step for prompt, wanted in jobs if wanted > step]
            seconds += self.decode(len(live), sum(live) / len(live))
        return seconds
