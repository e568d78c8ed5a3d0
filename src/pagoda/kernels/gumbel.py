"""Noise that is a function of (seed, count, token id) alone: Gumbel's, in plain torch. The Triton form is in
`sample.py`; small amounts on a CPU come from Python's numbers and numpy, whose calls cost less.

Legend: R rows, N tokens.
"""

import numpy as np
import torch

MASK32 = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers (held in int64) that spreads every bit (the constants are Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def row_keys(seed_R: torch.Tensor, count_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit keys of a row (int64, 0 to 2^32-1)."""
    low_R, high_R = seed_R & MASK32, (seed_R >> 32) & MASK32
    first_R = _mix(_mix((low_R + 0x9E3779B9 * (count_R + 1)) & MASK32) ^ high_R)
    return first_R, _mix(first_R ^ low_R ^ 0x85EBCA6B)


def gumbel(first_R1: torch.Tensor, second_R1: torch.Tensor, token_RN: torch.Tensor) -> torch.Tensor:
    """Noise of tokens under row keys: float32, shaped as the broadcast of the arguments. int32 arithmetic wraps."""
    x = token_RN.to(torch.int32) * (0x9E3779B9 - 2**32) + first_R1.to(torch.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D ^ second_R1.to(torch.int32)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    x = x ^ ((x >> 16) & 0xFFFF)
    v = (((x >> 1) & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    series = v * (1 + v * (0.5 + v * (1 / 3)))  # -log(1 - v), whose small values float32 would lose
    return -torch.where(v < 0.01, series, -torch.log(1 - v.clamp(max=1 - 2.0**-24))).log()


def _mix_number(x: int) -> int:
    """`_mix` of one number."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def keys_of(seed: int, count: int) -> tuple[int, int]:
    """`row_keys` of one row."""
    low, high = seed & MASK32, (seed >> 32) & MASK32
    first = _mix_number(_mix_number((low + 0x9E3779B9 * (count + 1)) & MASK32) ^ high)
    return first, _mix_number(first ^ low ^ 0x85EBCA6B)


def gumbel_numpy(first_R1: np.ndarray, second_R1: np.ndarray, token_RN: np.ndarray) -> np.ndarray:
    """`gumbel` to the last bits, from keys as uint32."""
    x = token_RN.astype(np.uint32) * np.uint32(0x9E3779B9) + first_R1
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D) ^ second_R1
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    v = ((x >> np.uint32(1)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    return -np.log(-np.log1p(-np.minimum(v, np.float32(1 - 2.0**-24))))
