"""What a matrix should become when all before it is quantized already, and how an error of it counts.

Matrices are quantized one after the other. V stands where W stood and sees x, the input in the quantized model, where
W saw y, the input in the original. Over the calibration text sum |V x - W y|^2 is least, if V could be any matrix, at
W (sum y x') (sum x x')^-1. This, damped towards W, is what gets rounded, so each matrix makes good what it can of the
errors before it; rounding then adds d (sum x x') d' for each row d of its error.
Legend: T tokens, N out features, K in features.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pagoda.errors import UsageError

STAY = 0.1  # of the mean of second's diagonal: how strongly a matrix is held to the original


@dataclass
class Moments:
    """second = sum x x' and drift = sum (y - x) x', float32 [K, K]; first: (y, x) [T, K] of the first batch."""

    second: Tensor
    drift: Tensor
    first: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> "Moments":
        """Of batches of (y, x): the same tokens in the original model and in the quantized one."""
        rest = iter(pairs)
        first = next(rest)
        k = first[0].shape[1]
        second, cross = (torch.zeros(k, k, device=first[0].device) for _ in range(2))
        with exact_tf32(first[0].dtype):
            for y_TK, x_TK in chain([first], rest):
                x = x_TK.float()
                second.addmm_(x.t(), x)
                cross.addmm_(y_TK.float().t(), x)
        return cls(second, cross.sub_(second), first)

    def target(self, weight_NK: Tensor) -> Tensor:
        """The matrix to round, float32 [N, K]: argmin over V of sum |V x - W y|^2 + STAY mean(second) |V - W|^2."""
        shift_NK = weight_NK.float() @ self.drift
        lower_KK = damped_cholesky(self.second.clone(), (STAY, 10 * STAY))
        return weight_NK.float() + torch.cholesky_solve(shift_NK.t(), lower_KK).t()


def damped_cholesky(second_KK: Tensor, damping: Iterable[float]) -> Tensor:
    """Lower Cholesky factor of second moments with a share of their mean on the diagonal: the first of `damping` that
    lets them be factored. Inputs that were always 0 count 1. The argument is changed: it is large."""
    diagonal = second_KK.diagonal()
    diagonal[diagonal == 0] = 1.0
    base, before = float(diagonal.mean()), 0.0
    for share in damping:
        diagonal.add_((share - before) * base)
        before = share
        lower, failed = torch.linalg.cholesky_ex(second_KK)
        if int(failed) == 0:
            return lower
    raise UsageError("The second moments of a matrix's inputs cannot be factored: calibrate with more text.")


@contextmanager
def exact_tf32(dtype: torch.dtype) -> Iterator[None]:
    """Lets a GPU multiply float32 copies of 16-bit numbers on its tensor cores: TF32 holds them exactly, and sums are
    float32."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = dtype != torch.float32
    try:
        yield
    finally:
        flags.allow_tf32 = before
