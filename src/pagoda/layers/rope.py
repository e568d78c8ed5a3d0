"""Rotary position embedding: the angles of a step's tokens, for every scaling that checkpoints name.

Legend: T tokens of a step, P rotated pairs (half of the rotary dims), M positions of the table, W variants.
"""

import math
from typing import Any

import torch
from torch import Tensor

# A row whose request has just ended may run one step (or one guess) past the session's end; its result is thrown away.
SPARE_POSITIONS = 64


def inverse_frequencies(rope: Any, long: bool = False) -> Tensor:
    """Radians per position of each rotated pair, float32 [P], for a `RopeSpec`; `long`: longrope beyond the original
    length.

    Formulas: Su et al. 2021 (default), llama3 scaling as Meta published it with Llama 3.1, YaRN (Peng et al. 2023),
    LongRoPE (Ding et al. 2024). Dynamic scaling depends on the prompt: here its unscaled frequencies.
    """
    exponent_P = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    plain_P = 1.0 / rope.theta**exponent_P
    if rope.kind == "linear":
        return plain_P / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain_P)
    if rope.kind == "yarn":
        return _yarn(rope, plain_P)
    if rope.kind == "longrope":
        factor_P = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32)
        return 1.0 / (factor_P * rope.theta**exponent_P)
    assert rope.kind in ("default", "dynamic"), rope.kind
    return plain_P


def _llama3(rope: Any, plain_P: Tensor) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended linearly in their frequency."""
    turns_P = rope.original_max_position * plain_P / (2 * math.pi)
    keep_P = (turns_P - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep_P = keep_P.clamp(0.0, 1.0)
    return (1 - keep_P) * plain_P / rope.factor + keep_P * plain_P


def _yarn(rope: Any, plain_P: Tensor) -> Tensor:
    """Pairs that turn more than `beta_fast` times over the original length are kept, fewer than `beta_slow` slowed."""

    def pair_that_turns(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    slow_P = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain_P / rope.factor * slow_P + plain_P * (1 - slow_P)


class Rope:
    """Cosines and sines on the device. All kinds but dynamic are one lookup in a table made at start."""

    def __init__(self, spec: Any, session_len: int, device: torch.device):
        self.spec = spec
        self.max_positions = session_len + SPARE_POSITIONS
        self._plain_P = inverse_frequencies(spec).to(device)
        if spec.kind != "dynamic":
            variants = [False, True] if spec.kind == "longrope" else [False]
            position_M = torch.arange(self.max_positions, dtype=torch.float32)
            angle_WMP = torch.stack([position_M[:, None] * inverse_frequencies(spec, long) for long in variants])
            both = torch.stack([angle_WMP.cos(), angle_WMP.sin()]).flatten(1, 2)
            self._table = (both * spec.attention_factor).to(device)  # [cos and sin, W * M, P]: one look-up for both

    @property
    def table(self) -> Tensor | None:
        """Cosines and sines [2, M, P] of every position, where nothing but the position decides; else None."""
        return None if self.spec.kind in ("dynamic", "longrope") else self._table

    def angles(self, position_T: Tensor, rope_len_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [T, P], the attention factor multiplied in.

        `rope_len_T`: prompt length at admission of each token's request; it fixes the variant of dynamic and longrope
        for the request's whole life, so that cached keys stay valid. None: the short one. No host synchronisation.
        """
        if self.spec.kind == "dynamic":
            angle_TP = position_T[:, None].float() * self._dynamic(rope_len_T)
            return angle_TP.cos() * self.spec.attention_factor, angle_TP.sin() * self.spec.attention_factor
        row_T = position_T
        if self.spec.kind == "longrope" and rope_len_T is not None:
            row_T = position_T + (rope_len_T > self.spec.original_max_position) * self.max_positions
        cos_TP, sin_TP = self._table.index_select(1, row_T)
        return cos_TP, sin_TP

    def _dynamic(self, rope_len_T: Tensor | None) -> Tensor:
        """NTK-aware frequencies: the base grows with the prompt beyond the original length -> [T, P] or [P].
        `stepped` (Qwen 1): with the next of 1, 3, 7, 15, ... times the original length instead of the prompt's."""
        if rope_len_T is None:
            return self._plain_P
        spec = self.spec
        times_T = rope_len_T.float() / spec.original_max_position
        if spec.stepped:
            times_T = torch.exp2(torch.ceil(torch.log2(times_T.clamp(min=1.0)) + 1)) - 1
        growth_T = spec.factor * times_T - (spec.factor - 1)
        theta_T = spec.theta * growth_T.clamp(min=1.0) ** (spec.dim / (spec.dim - 2))
        exponent_P = torch.arange(0, spec.dim, 2, device=rope_len_T.device).float() / spec.dim
        return 1.0 / theta_T[:, None] ** exponent_P


def logn_scale(position_T: Tensor, trained_len: int) -> Tensor:
    """Factor on queries, float32 [T]: log base `trained_len` of the number of keys seen, 1 up to that length."""
    return (torch.log((position_T + 1).float()) / math.log(trained_len)).clamp(min=1.0)
