"""What is done to one layer: the methods, each in terms of scales, rounding and statistics.

| method | weights | activations | scales | written as |
|---|---|---|---|---|
| rtn | int4 groups, to nearest | | | awq |
| awq | int4 groups, to nearest in searched ranges | | AWQ | awq |
| gptq | int4 groups, error feedback | | | gptq |
| awq-gptq | int4 groups, error feedback | | AWQ | awq (gptq with activation order) |
| smooth | int8 a row | int8 a token | SmoothQuant | compressed-tensors |
| fp8 | e4m3 a row | e4m3 a token, or static | | compressed-tensors |

awq, gptq and awq-gptq round each matrix towards what makes good the errors before it (`moments`).
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pagoda.errors import ModelError, UsageError
from pagoda.layers.schemes import SCHEMES, Tensors
from pagoda.models.local_weights import LAYER_ROLES
from pagoda.models.spec import ModelSpec
from pagoda.quantize.gptq import gptq
from pagoda.quantize.moments import Moments
from pagoda.quantize.rounding import round_groups, rounded, search_ranges
from pagoda.quantize.scales import BEFORE, ScaleSearch, awq_scales, smooth_scales
from pagoda.quantize.statistics import LayerStats
from pagoda.quantize.walk import Layer, Matrix, Streams, Walk

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

    @property
    def fitted(self) -> bool:
        """Whether matrices are rounded by their outputs on the text."""
        return self.int4 and self.method != "rtn"

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


def quantize_layer(recipe: Recipe, walk: Walk, layer: Layer, streams: Streams) -> tuple[Layer, dict[str, float]]:
    """The layer in its quantized form, and of each matrix the squared error of its output on the first batch, as a
    share of what the original model has there. `streams`: what stands before the layer."""
    stats = LayerStats()
    if recipe.method not in ("rtn", "gptq"):
        walk.advance(layer, streams.ours, stats.watch)
    search = ScaleSearch(walk, layer, stats, lambda w: _trial(recipe, w))
    if "awq" in recipe.method:
        for role in ("qkv", "o", "gate_up", "down"):
            search.fold(role, awq_scales(stats[role].absmean))
    elif recipe.method == "smooth":
        for role in BEFORE:
            search.fold(role, smooth_scales(stats[role].absmax, search.layer.weight(role)))
    whole = done = search.layer
    errors = {}
    for role in LAYER_ROLES.values():
        weight = whole.weight(role)
        pairs = zip(walk.inputs(whole, role, streams.original), walk.inputs(done, role, streams.ours))
        if recipe.fitted:
            moments = Moments.of(pairs)
            first = moments.first
            del pairs  # they hold the layers ready to run
            tensors = _fit(recipe, weight, moments)
            del moments
        else:
            first = next(pairs)
            tensors = _round(recipe, weight, stats, role)
        done = done.with_matrix(role, SCHEME_OF[recipe.method], tensors)
        errors[role] = _error(walk, role, whole.matrices[role], done.matrices[role], *first)
    return done, errors


SCHEME_OF = {"smooth": "int8", "fp8": "fp8"} | {m: "int4" for m in METHODS if m not in ("smooth", "fp8")}


def _trial(recipe: Recipe, weight_NK: Tensor) -> tuple[str, Tensors]:
    """A quick form of the result, for comparing scales."""
    if recipe.method == "smooth":
        return "int8", SCHEMES["int8"]().quantize(weight_NK)
    return "dense", {"weight": rounded(weight_NK, recipe.group)}


def _fit(recipe: Recipe, weight_NK: Tensor, moments: Moments) -> Tensors:
    target_NK = moments.target(weight_NK)
    if recipe.method == "awq":
        return search_ranges(target_NK, moments.second, recipe.group).canonical()
    return gptq(target_NK, moments.second, recipe.group, bool(recipe.act_order))


def _round(recipe: Recipe, weight_NK: Tensor, stats: LayerStats, role: str) -> Tensors:
    if recipe.int4:
        return round_groups(weight_NK, recipe.group).canonical()
    canonical = SCHEMES[SCHEME_OF[recipe.method]]().quantize(weight_NK)
    if recipe.static:
        canonical["input_scale"] = stats[role].absmax.amax() / STATIC_TOP
    return canonical


def _error(walk: Walk, role: str, before: Matrix, after: Matrix, y_TK: Tensor, x_TK: Tensor) -> float:
    """`before` sees y, `after` sees x."""
    right = walk.linear(role, before, y_TK.shape[1])(y_TK).float()
    ours = walk.linear(role, after, x_TK.shape[1])(x_TK).float()
    return float((ours - right).square().sum() / right.square().sum().clamp(min=1e-20))
