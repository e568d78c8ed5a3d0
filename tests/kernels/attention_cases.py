"""Random caches and an oracle of attention that shares no code with the kernels: one query, one head at a time, in
float64.
"""

import torch

from pagoda.kernels.kv_pack import read_kv
from pagoda.layers.kv_schemes import get_kv_scheme

F32 = torch.float32


def random_cache(scheme, num_blocks, kv_heads, head_dim, block_len=64, dtype=F32, device="cpu", seed=0, **options):
    """A cache whose every block holds random codes."""
    gen = torch.Generator().manual_seed(seed)
    cache = get_kv_scheme(scheme).allocate(num_blocks, kv_heads, head_dim, block_len, dtype, device, **options)
    for name in ("k", "v"):
        store = getattr(cache, name)
        if scheme == "none":
            store.copy_(torch.randn(store.shape, generator=gen))
            continue
        if scheme == "fp8":
            store.copy_((torch.randn(store.shape, generator=gen) * 100).clamp(-448, 448).to(store.dtype))
        else:
            store.view(torch.uint8).copy_(torch.randint(0, 256, store.shape, generator=gen, dtype=torch.uint8))
        if not cache.static:
            unit = {"int8": 1 / 64, "fp8": 1 / 100, "int4": 1 / 4}[scheme]
            scale, zero = getattr(cache, f"{name}_scale"), getattr(cache, f"{name}_zero")
            scale.copy_((torch.rand(scale.shape, generator=gen) + 0.5) * unit)
            if zero is not None:
                zero.copy_(torch.randn(zero.shape, generator=gen) * 0.2 - 2)
    return cache


def random_tables(kv_lens, width, num_blocks, block_len=64, device="cpu", seed=0):
    """[R, width] int32: distinct blocks (never 0) for what each row holds; the rest points anywhere."""
    gen = torch.Generator().manual_seed(seed)
    order = (torch.randperm(num_blocks - 1, generator=gen) + 1).tolist()
    table = torch.randint(0, num_blocks, (len(kv_lens), width), generator=gen, dtype=torch.int32)
    for row, kv_len in enumerate(kv_lens):
        for i in range(-(-kv_len // block_len)):
            table[row, i] = order.pop()
    return table.to(device)


def poison(cache, kv_lens, table):
    """NaN into every place of the cache that no row holds (codes that are integers: the scales become NaN)."""
    held = torch.zeros(cache.num_blocks, cache.block_len, dtype=torch.bool)
    for row, kv_len in enumerate(kv_lens):
        for p in range(kv_len):
            held[table[row, p // cache.block_len], p % cache.block_len] = True
    for name in ("k", "v") if cache.scheme == "none" else ("k_scale", "v_scale", "k_zero", "v_zero"):
        x = getattr(cache, name)
        if x is None or cache.static:
            continue
        free = ~held.to(x.device)[:, None, :]
        x.masked_fill_(free[..., None] if x.dim() == 4 else free, float("nan"))
    return cache


def brute_force(q_nHD, positions, cache, table_B, scale, window=0, softcap=0.0):
    """Queries of one row at the given positions -> [n, H, D] float64."""
    k, v = read_kv(cache, table_B)
    k, v = (x.permute(1, 0, 2, 3).flatten(1, 2).double() for x in (k, v))
    out = torch.zeros(q_nHD.shape, dtype=torch.float64, device=q_nHD.device)
    group = q_nHD.shape[1] // cache.num_kv_heads
    for i, position in enumerate(positions):
        first = max(0, position + 1 - window) if window else 0
        for head in range(q_nHD.shape[1]):
            score = k[head // group, first : position + 1] @ q_nHD[i, head].double() * scale
            if softcap:
                score = torch.tanh(score / softcap) * softcap
            weight = torch.exp(score - score.max())
            out[i, head] = (weight / weight.sum()) @ v[head // group, first : position + 1]
    return out


def relative(out, want):
    """|out - want| / |want|; NaN anywhere gives NaN, which passes no comparison."""
    return ((out.double() - want).norm() / want.norm().clamp_min(1e-9)).item()
