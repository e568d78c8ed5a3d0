"""What is done to one layer: the methods, each in terms of scales, rounding and statistics.

| method | weights | activations | scales | written as |
|---|---|---|---|---|
| rtn | int4 groups, to nearest | | | awq |
| awq | int4 groups, clipped | | AWQ | awq |
| gptq | int4 groups, error feedback | | | gptq |
| awq-gptq | int4 groups, error feedback | | AWQ | awq (gptq with activation order) |
| smooth | int8 a row | int8 a token | SmoothQuant | compressed-tensors |
| fp8 | e4m3 a row | e4m3 a token, or static | | compressed-tensors |
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pagoda.errors import ModelError, UsageError
from pagoda.layers.schemes import SCHEMES, Tensors
from pagoda.models.spec import ModelSpec
from pagoda.quantize.gptq import gptq
from pagoda.quantize.rounding import round_groups, rounded, search_clip
from pagoda.quantize.scales import BEFORE, ScaleSearch, awq_scales, smooth_scales
from pagoda.quantize.statistics import LayerStats
from pagoda.quantize.walk import ROLES, Layer, Walk

METHODS = ("rtn", "awq", "gptq", "awq-gptq", "smooth", "fp8")
GROUPS = (32, 64, 128)
STATIC_TOP = 448.0


@dataclass(frozen=True)
class Recipe:
    """How to quantize. `group`, `act_order`: of 4-bit methods; `static`: fp8 activations with one calibrated scale."""

    method: str = "awq"
    group: int = 128
    act_order: bool | None = None  # None: with gptq alone
    static: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method is {self.method!r}: it must be one of {', '.join(METHODS)}.")
        if self.group not in GROUPS:
            raise UsageError(f"The group size is {self.group}: it must be one of 32, 64, 128.")
        if self.act_order is None:
            object.__setattr__(self, "act_order", self.method == "gptq")
        if self.static and self.method != "fp8":
            raise UsageError("Static activations belong to the method fp8.")

    @property
    def int4(self) -> bool:
        return self.method not in ("smooth", "fp8")

    @property
    def format(self) -> str:
        if not self.int4:
            return "compressed-tensors"
        return "gptq" if self.method == "gptq" or self.act_order else "awq"

    @property
    def calibrated(self) -> bool:
        """Whether the result depends on text."""
        return self.method != "rtn" and (self.method != "fp8" or self.static)

    def new_stats(self) -> LayerStats:
        """A recorder of what the method needs."""
        return LayerStats(0 if "gptq" in self.method else self.group if self.method == "awq" else None)

    def check(self, spec: ModelSpec) -> None:
        """ModelError for a model whose sizes the method's checkpoint format cannot hold."""
        if not self.int4:
            return
        sizes = {"hidden size": spec.hidden_size, "ffn size": spec.ffn_size, "heads": spec.num_heads * spec.head_dim}
        for name, size in sizes.items():
            if size % self.group:
                fits = [g for g in GROUPS if all(s % g == 0 for s in sizes.values())]
                advice = f"use --group-size {fits[-1]}" if fits else "use --method smooth or fp8, or run it with "
                advice += "" if fits else "--weight-format int4, which pads in memory"
                raise ModelError(
                    f"The {name} of {size} is not a multiple of the group of {self.group}, so a 4-bit checkpoint "
                    f"cannot hold it: {advice}."
                )
        if spec.num_kv_heads * spec.head_dim % 8:
            raise ModelError("4-bit checkpoints hold eight outputs a word, and the kv heads are no multiple of 8.")

    def settings(self) -> dict[str, Any]:
        return asdict(self)


def quantize_layer(recipe: Recipe, walk: Walk, layer: Layer, stats: LayerStats) -> tuple[Layer, dict[str, float]]:
    """The layer in its quantized form, and the relative squared error of each matrix's output on the kept batch."""
    search = ScaleSearch(walk, layer, stats, lambda w: _trial(recipe, w))
    if "awq" in recipe.method:
        for role in ("qkv", "o", "gate_up", "down"):
            search.fold(role, awq_scales(stats[role].absmean))
    elif recipe.method == "smooth":
        for role in BEFORE:
            search.fold(role, smooth_scales(stats[role].absmax, search.layer.weight(role)))
    done, errors = dict(search.layer.matrices), {}
    for role in ROLES.values():
        weight = search.layer.weight(role)
        done[role] = SCHEME_OF[recipe.method], _encode(recipe, walk.spec, role, weight, stats)
        errors[role] = _error(walk, role, weight, done[role], stats)
    return Layer(layer.index, search.layer.gains, done, search.layer.biases), errors


SCHEME_OF = {"smooth": "int8", "fp8": "fp8"} | {m: "int4" for m in METHODS if m not in ("smooth", "fp8")}


def _trial(recipe: Recipe, weight_NK: Tensor) -> tuple[str, Tensors]:
    """A quick form of the result, for comparing scales."""
    if recipe.method == "smooth":
        return "int8", SCHEMES["int8"]().quantize(weight_NK)
    return "dense", {"weight": rounded(weight_NK, recipe.group)}


def _encode(recipe: Recipe, spec: ModelSpec, role: str, weight_NK: Tensor, stats: LayerStats) -> Tensors:
    if not recipe.int4:
        canonical = SCHEMES[SCHEME_OF[recipe.method]]().quantize(weight_NK)
        if recipe.static:
            canonical["input_scale"] = stats[role].absmax.amax() / STATIC_TOP
        return canonical
    if "gptq" in recipe.method:
        second = stats[role].second
        assert second is not None
        return gptq(weight_NK, second, recipe.group, bool(recipe.act_order))
    shrink: Tensor | float = 1.0
    if recipe.method == "awq":
        second = stats[role].second
        assert second is not None
        # queries and keys meet in a product whose error a matrix's own output does not show: they keep their range
        first = (spec.num_heads + spec.num_kv_heads) * spec.head_dim if role == "qkv" else 0
        shrink = search_clip(weight_NK, second, first)
    return round_groups(weight_NK, recipe.group, shrink).canonical()


def _error(walk: Walk, role: str, weight_NK: Tensor, matrix: tuple[str, Tensors], stats: LayerStats) -> float:
    x = stats[role].kept
    if x is None:
        return float("nan")
    right = walk.linear(role, ("dense", {"weight": weight_NK}), x.shape[1])(x).float()
    ours = walk.linear(role, matrix, x.shape[1])(x).float()
    return float((ours - right).square().sum() / right.square().sum().clamp(min=1e-20))
