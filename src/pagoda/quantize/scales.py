"""Per-channel scales that move difficulty between activations and weights, folded into what stands before.

(x / s) @ (W * s)' is x @ W'. The division by s goes into the norm before a matrix, or into the rows of v (before o) and
of up (before down). AWQ (arXiv 2306.00978) takes s = mean|x|^a, SmoothQuant (arXiv 2211.10438) s = max|x|^a /
max|w|^(1-a); a is searched on a grid, the objective being the squared error of the block's output.
Legend: T tokens, N out features, K in features.
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pagoda.models import decoder as ops
from pagoda.models.spec import ModelSpec
from pagoda.quantize.statistics import LayerStats
from pagoda.quantize.walk import Layer, Matrix, Walk

RATIOS = tuple(i / 20 for i in range(20))
BEFORE = {"qkv": "attention_norm", "gate_up": "ffn_norm"}  # the gains that take a matrix's scale
Make = Callable[[Tensor], Matrix]  # a float32 matrix -> (scheme, canonical tensors) as it will be stored


def awq_scales(absmean_K: Tensor) -> Iterable[Tensor]:
    """The candidates of AWQ; the first is 1."""
    for ratio in RATIOS:
        s = absmean_K.clamp(min=1e-4) ** ratio
        yield s / (s.amax() * s.amin()).sqrt()


def smooth_scales(absmax_K: Tensor, weight_NK: Tensor) -> Iterable[Tensor]:
    """1, and the candidates of SmoothQuant."""
    yield torch.ones_like(absmax_K)
    w = weight_NK.abs().amax(0).clamp(min=1e-5)
    for ratio in RATIOS[6:17]:
        s = absmax_K.clamp(min=1e-5) ** ratio / w ** (1 - ratio)
        yield s / (s.amax() * s.amin()).sqrt()


class ScaleSearch:
    """Finds and folds the scales of one layer. `stats` are rescaled along."""

    def __init__(self, walk: Walk, layer: Layer, stats: LayerStats, make: Make):
        self.walk, self.layer, self.stats, self.make = walk, dataclasses.replace(layer), stats, make

    def fold(self, role: str, candidates: Iterable[Tensor]) -> None:
        """The best candidate for the matrix of `role`, into the layer and the statistics."""
        s_K = self._best(role, candidates)
        if role in BEFORE:
            s_K = self._fold_norm(BEFORE[role], s_K)
        else:
            self._fold_rows("qkv" if role == "o" else "gate_up", s_K)
        self.layer = self.layer.with_matrix(role, "dense", {"weight": self.layer.weight(role) * s_K})
        self.stats[role].rescale(s_K)

    def _best(self, role: str, candidates: Iterable[Tensor]) -> Tensor:
        weight, x = self.layer.weight(role), self.stats[role].kept
        assert x is not None
        target = self._output(role, ("dense", {"weight": weight}), x)
        best, least = torch.ones_like(weight[0]), float("inf")
        for s_K in candidates:
            s_K = tie_heads(s_K, self.walk.spec) if role == "o" else s_K
            out = self._output(role, self.make(weight * s_K), (x / s_K).to(x.dtype))
            loss = (out - target).float().square().mean().item()
            if loss < least:
                best, least = s_K, loss
        return best

    def _output(self, role: str, matrix: Matrix, x_TK: Tensor) -> Tensor:
        """Of the block that begins with the matrix: attention up to o, the ffn up to down; o and down alone."""
        if role not in BEFORE:
            return self.walk.linear(role, matrix, x_TK.shape[1])(x_TK)
        trial = Layer(self.layer.index, self.layer.gains, self.layer.matrices | {role: matrix}, self.layer.biases)
        program = self.walk.program(trial)
        start = next(i for i, op in enumerate(program) if isinstance(op, ops.Project) and op.linear.role == role)
        end = next(i for i in range(start + 1, len(program)) if isinstance(program[i], ops.Project))
        frame = self.walk.frame(len(x_TK) // self.walk.length, x_TK)
        return self.walk.run(program[start : end + 1], frame).x

    def _fold_norm(self, name: str, s_K: Tensor) -> Tensor:
        """Divide a norm's gain. Returns the scale that the rounded gain stands for, so that nothing is lost."""
        gain = self.layer.gains[name]
        offset = 1.0 if self.walk.spec.row.gemma else 0.0
        stored = (gain / s_K - offset).to(getattr(torch, self.walk.spec.dtype)).float() + offset
        usable = (stored != 0) & (gain != 0)
        stored = torch.where(usable, stored, gain)
        self.layer.gains = self.layer.gains | {name: stored}
        return torch.where(usable, gain / stored, torch.ones_like(gain))

    def _fold_rows(self, role: str, s_K: Tensor) -> None:
        """Divide the rows of v (one for each kv head's channel) or of up."""
        spec, weight, bias = self.walk.spec, self.layer.weight(role), self.layer.biases.get(role)
        if role == "qkv":
            s_K = s_K.view(spec.num_kv_heads, -1, spec.head_dim)[:, 0].flatten()
        factor = torch.ones(len(weight), device=weight.device)
        factor[-len(s_K) :] = 1 / s_K
        self.layer = self.layer.with_matrix(role, "dense", {"weight": weight * factor[:, None]})
        if bias is not None:
            self.layer.biases = self.layer.biases | {role: (bias.float() * factor).to(bias.dtype)}


def tie_heads(s_K: Tensor, spec: ModelSpec) -> Tensor:
    """One scale for the query heads that share a value head: their geometric mean."""
    s = s_K.view(spec.num_kv_heads, -1, spec.head_dim).log().mean(1, keepdim=True).exp()
    return s.expand(-1, spec.num_heads // spec.num_kv_heads, -1).reshape(-1)
