"""Row-wise operations on matrices that are larger than the caches of a CPU."""

from collections.abc import Callable

from torch import Tensor

BLOCK_ELEMENTS = 1 << 19  # 2 MB of float32: stays in cache, and is still work for several threads


def in_row_blocks(rounds: Callable[[Tensor], tuple[Tensor, ...]], weight_NK: Tensor) -> tuple[Tensor, ...]:
    """What `rounds` (tensors with a row for each row it is given) makes of the matrix. On a CPU it is called with some
    rows at a time, so that its intermediate results do not travel through memory: ten times faster."""
    rows = max(1, BLOCK_ELEMENTS // weight_NK.shape[1])
    if weight_NK.device.type != "cpu" or rows >= weight_NK.shape[0]:
        return rounds(weight_NK)
    whole: tuple[Tensor, ...] = ()
    for start in range(0, weight_NK.shape[0], rows):
        parts = rounds(weight_NK[start : start + rows])
        whole = whole or tuple(p.new_empty(weight_NK.shape[0], *p.shape[1:]) for p in parts)
        for all_rows, part in zip(whole, parts, strict=True):
            all_rows[start : start + rows] = part
    return whole
