"""Which part of a model one tensor-parallel rank holds, for any number of ranks.

Column-parallel sizes that the ranks do not divide are padded with zeros; a padded head or feature adds nothing to any
result. Kv heads are repeated when there are more ranks than heads, and then their query heads are dealt out.
"""

from dataclasses import dataclass

ZERO = -1  # stands for a head made of zeros


@dataclass(frozen=True)
class LocalShape:
    """One rank's sizes, and which global rows they are. Query head h of a rank uses its kv head h // (H / K)."""

    rank: int
    size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_start: int
    vocab_rows: int  # rows of embedding and head on this rank, padding included; equal on every rank
    vocab_valid: int  # the first rows of them that are real; the rest are zero rows (their logits must be dropped)
    q_heads: tuple[int, ...]  # global index of each local query head, or ZERO
    kv_heads: tuple[int, ...]  # global index of each local kv head, or ZERO
    ffn_start: int  # first global ffn feature of this rank
    ffn_valid: int  # how many of `ffn_size` are real; the rest are zero


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def shard_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Global (query heads, kv heads) of one rank; both tuples have the same length on every rank, ZERO is padding.

    Each kv head is cut into `parts` equal ones that share its query heads; the number of parts is the one that leaves
    the fewest kv heads, then the fewest query heads, on a rank. Real query heads come first and are consecutive: rank r
    holds those from r * len(q_heads) on."""
    group = num_heads // num_kv_heads
    choices = []
    for parts in (n for n in range(1, group + 1) if group % n == 0):
        kv_local, per_part = _ceil(num_kv_heads * parts, size), group // parts
        choices.append((kv_local, kv_local * per_part, parts, per_part))
    kv_local, _, parts, per_part = min(choices)
    q_heads: list[int] = []
    kv_heads: list[int] = []
    for virtual in range(rank * kv_local, (rank + 1) * kv_local):
        kv, part = divmod(virtual, parts)
        real = kv < num_kv_heads
        kv_heads.append(kv if real else ZERO)
        for i in range(part * per_part, (part + 1) * per_part):
            q_heads.append(kv * group + i if real else ZERO)
    return tuple(q_heads), tuple(kv_heads)


def local_shape(
    num_heads: int, num_kv_heads: int, ffn_size: int, vocab_size: int, ffn_unit: int, rank: int, size: int
) -> LocalShape:
    """The part of rank `rank` of `size`. `ffn_unit`: the ffn is cut only at its multiples (quantization groups);
    on one rank nothing is padded."""
    assert 0 <= rank < size
    q_heads, kv_heads = shard_heads(num_heads, num_kv_heads, rank, size)
    even = ffn_size % size == 0 and (ffn_size // size) % ffn_unit == 0
    ffn_local = ffn_size // size if size == 1 or even else _ceil(_ceil(ffn_size, size), ffn_unit) * ffn_unit
    ffn_start = min(rank * ffn_local, ffn_size)
    rows = _ceil(vocab_size, size)
    vocab_start = min(rank * rows, vocab_size)
    return LocalShape(
        rank=rank,
        size=size,
        num_heads=len(q_heads),
        num_kv_heads=len(kv_heads),
        ffn_size=ffn_local,
        vocab_start=vocab_start,
        vocab_rows=rows,
        vocab_valid=min(rows, vocab_size - vocab_start),
        q_heads=q_heads,
        kv_heads=kv_heads,
        ffn_start=ffn_start,
        ffn_valid=min(ffn_local, ffn_size - ffn_start),
    )
