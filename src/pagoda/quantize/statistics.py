"""What calibration records of a layer: its matrices' inputs and outputs, its keys and values.

Legend: T tokens, K channels, H kv heads, D head size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ChannelStats:
    """Running min, max, mean, absmax and absmean of each channel; float32. `kept`: the first batch."""

    tokens: int = 0
    low: Tensor | None = None
    high: Tensor | None = None
    total: Tensor | None = None
    abs_total: Tensor | None = None
    kept: Tensor | None = None

    def add(self, x_TK: Tensor) -> None:
        """Count a batch. Channels are the last dimension, or the last two ([T, H, D])."""
        x = x_TK.float()
        low, high, total, abs_total = x.amin(0), x.amax(0), x.sum(0), x.abs().sum(0)
        if self.low is None:
            self.low, self.high, self.total, self.abs_total, self.kept = low, high, total, abs_total, x_TK
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self.total, self.abs_total = self.total + total, self.abs_total + abs_total
        self.tokens += len(x_TK)

    def rescale(self, s_K: Tensor) -> None:
        """As if the inputs had been x / s."""
        for name in ("low", "high", "total", "abs_total", "kept"):
            setattr(self, name, (getattr(self, name) / s_K).to(getattr(self, name).dtype))

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(self.high.abs(), self.low.abs())

    @property
    def absmean(self) -> Tensor:
        return self.abs_total / self.tokens

    def values(self) -> dict[str, Tensor]:
        """By the names that users know."""
        mean = self.total / self.tokens
        return {"min": self.low, "max": self.high, "mean": mean, "absmax": self.absmax, "absmean": self.absmean}


@dataclass
class LayerStats:
    """By role: inputs (`qkv`), outputs (`qkv.out`, if asked for), `k` and `v` [H, D] as the cache holds them."""

    outputs: bool = False
    by_name: dict[str, ChannelStats] = field(default_factory=dict)

    def watch(self, name: str, value: Tensor) -> None:
        """A `walk.Watch`."""
        if name.endswith(".out") and not self.outputs:
            return
        inputs = "." not in name and name not in ("k", "v")
        if name not in self.by_name:
            self.by_name[name] = ChannelStats()
        self.by_name[name].add(value)
        if not inputs:
            self.by_name[name].kept = None

    def __getitem__(self, role: str) -> ChannelStats:
        return self.by_name[role]
