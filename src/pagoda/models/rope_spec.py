"""Rotary position embedding as data: what `config.json` says of it, in its old and new spellings, resolved to numbers.

Formulas of the attention factors: YaRN (arXiv 2309.00071, section 3.4) and LongRoPE (arXiv 2402.13753).
"""

import math
from dataclasses import dataclass
from typing import Any

from pagoda.errors import ModelError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding. `dim` counts the rotated features of a head (the first ones, half-split order)."""

    kind: str
    theta: float
    dim: int
    factor: float = 1.0
    original_max_position: int = 0  # trained length; 0 where the kind does not use it
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cos and sin
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    stepped: bool = False  # dynamic only (Qwen 1): the effective length grows in powers of two

    def variant(self, prompt_len: int) -> int:
        """Which rotation a prompt of this length gets; equal variants share cached keys. 0: the plain one; `dynamic`:
        the length in theta * (factor * length / original - (factor - 1)) ^ (dim / (dim - 2)); `longrope`: 1."""
        if self.kind not in ("dynamic", "longrope") or prompt_len <= self.original_max_position:
            return 0
        if self.kind == "longrope":
            return 1
        if self.stepped:  # alpha = 2 ^ ceil(log2(len / original) + 1) - 1, with factor 1: len = alpha * original
            steps = math.ceil(math.log2(prompt_len / self.original_max_position) + 1)
            return (2**steps - 1) * self.original_max_position
        return prompt_len


def parse_rope(config: dict[str, Any], head_dim: int, max_position: int, su_is_longrope: bool = False) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta` (older). `su_is_longrope`: Phi-3 wrote
    "su" and "yarn" for what is longrope today. Raises ModelError for kinds or values that are not known."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ModelError(f"config.json says rope_scaling = {given!r}, but it must be an object or null.")
    if any(isinstance(v, dict) for v in given.values()):
        raise ModelError("config.json gives each layer type its own rope_parameters, which Pagoda does not implement.")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "su" or (su_is_longrope and kind == "yarn"):
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise ModelError(f"Rotary embedding of type {kind!r} is not implemented: Pagoda knows {', '.join(ROPE_KINDS)}.")
    read = _Numbers(given, kind)
    theta = _Numbers({"rope_theta": given.get("rope_theta", config.get("rope_theta"))}, kind).get("rope_theta", 10000.0)
    partial = read.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    dim = int(head_dim * partial)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise ModelError(
            f"partial_rotary_factor {partial} of head_dim {head_dim} leaves {dim} rotary features, which must be even."
        )
    if kind == "default":
        return RopeSpec("default", theta, dim)
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = original if kind != "dynamic" and original else max_position
    factor = read.get("factor", None if kind in ("linear", "dynamic", "llama3") else max_position / original)
    common = {"kind": kind, "theta": theta, "dim": dim, "factor": factor, "original_max_position": int(original)}
    if kind == "llama3":
        return RopeSpec(**common, **{k: read.get(k, None) for k in ("low_freq_factor", "high_freq_factor")})
    if kind == "yarn":
        return RopeSpec(**common, **_yarn(read, factor), truncate=bool(given.get("truncate", True)))
    if kind == "longrope":
        return RopeSpec(**common, **_longrope(read, given, dim, factor, original))
    return RopeSpec(**common)


class _Numbers:
    """Positive finite numbers out of a dict, with the rope kind in the message."""

    def __init__(self, values: dict[str, Any], kind: str):
        self.values, self.kind = values, kind

    def get(self, key: str, default: float | None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not good:
            raise ModelError(f"Rotary embedding of type {self.kind} needs {key} to be a number above 0, not {value!r}.")
        return float(value)


def _yarn(read: _Numbers, factor: float) -> dict[str, float]:
    """Cos and sin are multiplied by 0.1 ln(factor) + 1, or by the ratio of two such terms (DeepSeek's mscale)."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    top, bottom = read.values.get("mscale"), read.values.get("mscale_all_dim")
    computed = mscale(top) / mscale(bottom) if top and bottom else mscale(1.0)
    return {
        "attention_factor": read.get("attention_factor", computed),
        "beta_fast": read.get("beta_fast", 32.0),
        "beta_slow": read.get("beta_slow", 1.0),
    }


def _longrope(read: _Numbers, given: dict[str, Any], dim: int, factor: float, original: int) -> dict[str, Any]:
    """Factors per frequency for prompts within and beyond the trained length; sqrt(1 + ln factor / ln original)."""
    lists = {}
    for key in ("short_factor", "long_factor"):
        values = given.get(key)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise ModelError(f"Rotary embedding of type longrope needs {key} to be a list of {dim // 2} numbers.")
        lists[key] = tuple(_Numbers({key: v}, "longrope").get(key, None) for v in values)
    computed = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {"attention_factor": read.get("attention_factor", computed), **lists}
