"""How the cache holds keys and values: 16 bit, int8, int4, fp8. One row of `KV_SCHEMES` a scheme; layouts in
`kernels/kv_pack.py`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.errors import ConfigError
from pagoda.kernels.kv_pack import MAX_COUNTERS, LayerCache, hadamard


@dataclass(frozen=True)
class StaticRanges:
    """One layer's ranges from calibration, per local kv head [K], float32: x = q * scale + zero with q in -128..127."""

    k_scale: Tensor
    k_zero: Tensor
    v_scale: Tensor
    v_zero: Tensor


@dataclass(frozen=True)
class KVScheme:
    """`bits` a value (0: the model's own dtype), the types of codes and of scale (and zero) of each token and head of K
    and of V. `rotated`: keys are turned by a Hadamard matrix, so that one large channel does not cost the others their
    bits. With two channels 30 times the rest it lowers the error of scores from 0.93 to 0.25 (int4) and from 0.085 to
    0.016 (int8); e4m3 keeps small values beside large ones by itself, and would go from 0.026 to 0.10.
    """

    name: str
    bits: int
    code_dtype: torch.dtype | None
    meta_dtype: torch.dtype | None
    has_zero: bool = False
    rotated: bool = False

    def bytes_per_block(self, num_kv_heads: int, head_dim: int, block_len: int, dtype: torch.dtype) -> int:
        """Of one layer, K and V, scales included."""
        bits = self.bits or dtype.itemsize * 8
        meta = 0 if self.meta_dtype is None else self.meta_dtype.itemsize * (2 if self.has_zero else 1)
        return 2 * num_kv_heads * block_len * (head_dim * bits // 8 + meta)

    def allocate(
        self,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        block_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        static: StaticRanges | None = None,
    ) -> LayerCache:
        """Zeroed blocks of one layer. `static` (int8 only) fixes scale and zero per head instead of per token."""
        n, k, w = num_blocks, num_kv_heads, head_dim
        counters = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
        if self.code_dtype is None:
            blocks = [torch.zeros(n, k, block_len, w, dtype=dtype, device=device) for _ in "kv"]
            return LayerCache(self.name, block_len, head_dim, *blocks, counters=counters)
        if static is not None and self.name != "int8":
            raise ConfigError(f"Static cache ranges belong to quant_policy 'int8', not '{self.name}'.")
        if self.bits == 4:
            assert w % 2 == 0, "two channels share a byte"
            w //= 2
        codes = [torch.zeros(n, k, *s, dtype=torch.uint8, device=device) for s in ((block_len, w), (w, block_len))]
        codes = [c.view(self.code_dtype) for c in codes]
        cache = LayerCache(self.name, block_len, head_dim, *codes, static=static is not None, counters=counters)
        for name in ("k", "v"):
            for part in ("scale", "zero"):
                if static is not None:
                    row = getattr(static, f"{name}_{part}").to(device=device, dtype=torch.float32)
                    setattr(cache, f"{name}_{part}", row[None, :, None].expand(n, k, block_len))
                elif part == "scale" or self.has_zero:
                    meta = torch.zeros(n, k, block_len, dtype=self.meta_dtype, device=device)
                    setattr(cache, f"{name}_{part}", meta)
        if self.rotated and static is None and math.log2(head_dim).is_integer():
            cache.rotation = hadamard(head_dim, device)
        return cache


KV_SCHEMES: dict[str, KVScheme] = {
    scheme.name: scheme
    for scheme in (
        KVScheme("none", 0, None, None),
        KVScheme("int8", 8, torch.int8, torch.float32, rotated=True),
        KVScheme("int4", 4, torch.uint8, torch.float16, has_zero=True, rotated=True),
        KVScheme("fp8", 8, torch.float8_e4m3fn, torch.float32),
    )
}


def get_kv_scheme(name: str) -> KVScheme:
    if name not in KV_SCHEMES:
        raise ConfigError(f"quant_policy '{name}' is unknown; choose one of {', '.join(KV_SCHEMES)}.")
    return KV_SCHEMES[name]
