"""Device functions that Triton's attention kernels share: codes of the cache to numbers, numbers to codes, one block of
the cache into a running softmax. Layouts and formulas are those of `kv_pack`.

Constants of a kernel: SCHEME, D head_dim, BL block_len, W stored width of a row (D, or D/2 bytes of int4), WP its
padding to a power of two, STATIC ranges per head, FAST: inline assembly (off in the interpreter). `cell` is block * K +
head.
"""

from pagoda.kernels.triton_env import jit, tl


@jit
def int8_to_f16(x):
    """Exact: 0x64uu is 1024 + u in float16, u = x + 128. (Triton's own conversion goes through I2F, at a fraction of
    the rate.)
    """
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 t, c; xor.b32 t, $2, 0x80808080; mov.b32 c, 0x64806480;
          prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
          sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; }""",
        "=r,=r,r",
        [x],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@jit
def nibbles_to_f16(x):
    """Exact: 0x640n is 1024 + n in float16. -> low nibbles, high nibbles."""
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 a, b, c; mov.b32 c, 0x64006400;
          prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;
          and.b32 $0, a, 0x000F000F; or.b32 $0, $0, c; sub.f16x2 $0, $0, c;
          and.b32 $1, b, 0x000F000F; or.b32 $1, $1, c; sub.f16x2 $1, $1, c;
          shr.b32 a, a, 4; shr.b32 b, b, 4;
          and.b32 $2, a, 0x000F000F; or.b32 $2, $2, c; sub.f16x2 $2, $2, c;
          and.b32 $3, b, 0x000F000F; or.b32 $3, $3, c; sub.f16x2 $3, $3, c; }""",
        "=&r,=&r,=&r,=&r,r",
        [x],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@jit
def decoded(x, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Codes of one value each as DTYPE, without scale."""
    if FAST and x.dtype == tl.int8 and tl.float16 == DTYPE:
        return int8_to_f16(x)
    else:
        return x.to(DTYPE)


@jit
def decoded_nibbles(x, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Bytes of two codes as DTYPE: channels of the lower half, channels of the upper half."""
    if FAST and tl.float16 == DTYPE:
        return nibbles_to_f16(x)
    else:
        return (x & 15).to(DTYPE), (x >> 4).to(DTYPE)


@jit
def load_meta(scale, zero, cell, head, t, ok, BL: tl.constexpr, SCHEME: tl.constexpr, STATIC: tl.constexpr):
    """Scale and zero of tokens t of a block, float32 [len(t)]; places that are not `ok` may hold anything and give
    0.
    """
    if SCHEME == "none":
        s = tl.zeros_like(t).to(tl.float32)
        z = s
    elif STATIC:
        s = tl.load(scale + head + t * 0, mask=ok, other=0.0)
        z = tl.load(zero + head + t * 0, mask=ok, other=0.0)
    else:
        s = tl.load(scale + cell * BL + t, mask=ok, other=0.0).to(tl.float32)
        if SCHEME == "int4":
            z = tl.load(zero + cell * BL + t, mask=ok, other=0.0).to(tl.float32)
        else:
            z = s
    return s, z


@jit
def load_codes(
    k, v, cell, t, ok, BL: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, SCHEME: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """K [len(t), WP], V [len(t), WP] (transposed codes are turned). Bytes may be read where nothing was written: they
    are finite whatever they are, and their scale is read as 0. 16-bit values there may be NaN and are not read
    (MASK).
    """
    rw = tl.arange(0, WP)
    at = (cell * BL + t)[:, None] * W + rw[None, :]
    if SCHEME == "none":
        if MASK or WP != W:
            seen = (rw < W)[None, :] & ok[:, None]
            kk = tl.load(k + at, mask=seen, other=0.0)
            vv = tl.load(v + at, mask=seen, other=0.0)
        else:
            kk = tl.load(k + at)
            vv = tl.load(v + at)
    else:
        av = cell * (W * BL) + rw[:, None] * BL + t[None, :]
        if WP != W:
            kk = tl.load(k + at, mask=(rw < W)[None, :], other=0.0)
            vv = tl.load(v + av, mask=(rw < W)[:, None], other=0.0)
        else:
            kk = tl.load(k + at)
            vv = tl.load(v + av)
        vv = vv.T
    return kk, vv


@jit
def empty_state(BH: tl.constexpr, WP: tl.constexpr, SCHEME: tl.constexpr):
    """Running maximum, sum, product and its upper half (int4; a stand-in otherwise) of BH queries."""
    m = tl.full([BH], -1.0e30, tl.float32)
    l = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, WP], tl.float32)
    return m, l, acc, tl.zeros([BH, WP if SCHEME == "int4" else 1], tl.float32)


@jit
def capped(s, score_scale, cap, SOFTCAP: tl.constexpr):
    """Scores in base 2: s * scale * log2(e), or softcap * tanh(s * scale / softcap) * log2(e) with score_scale = 2 *
    log2(e) * scale / softcap and cap = softcap * log2(e).
    """
    s *= score_scale
    if SOFTCAP:
        s = cap * (1.0 - 2.0 / (tl.exp2(s) + 1.0))
    return s


@jit
def softmax_step(
    queries, tile, state, score_scale, cap, SCHEME: tl.constexpr, STATIC: tl.constexpr, SOFTCAP: tl.constexpr,
    MASK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values (codes, scales and zeros, the mask of what is seen) into the running softmax of a
    tile of queries (rows, for int4 in two halves; their sums, which keys with zeros need). A quantised cache's products
    are 256 times too large, which keeps small ones out of float16's subnormal numbers (see `normalised`).
    """
    q, q_high, q_sum = queries
    kk, vv, ks, kz, vs, vz, seen = tile
    m, l, acc, acc_high = state
    if SCHEME == "int4":
        k_low, k_high = decoded_nibbles(kk, q.dtype, FAST)
        s = tl.dot(q, k_low.T, input_precision="tf32x3")
        s = tl.dot(q_high, k_high.T, s, input_precision="tf32x3")
    else:
        s = tl.dot(q, decoded(kk, q.dtype, FAST).T, input_precision="tf32x3")
    if SCHEME != "none":
        s *= ks[None, :]
    if SCHEME == "int4" or STATIC:
        s += q_sum[:, None] * kz[None, :]
    s = capped(s, score_scale, cap, SOFTCAP)
    if MASK:
        s = tl.where(seen, s, -1.0e30)
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    fade = tl.exp2(m - m_new)
    l = l * fade + tl.sum(p, 1)
    acc = acc * fade[:, None]
    if SCHEME == "int4" or STATIC:
        drift = tl.sum(p * (vz * 256.0)[None, :], 1)[:, None]
        acc += drift
    if SCHEME != "none":
        p *= (vs * 256.0)[None, :]
    p = p.to(q.dtype)
    if SCHEME == "int4":
        v_low, v_high = decoded_nibbles(vv, q.dtype, FAST)
        acc_high = tl.dot(p, v_high, acc_high * fade[:, None] + drift, input_precision="tf32x3")
        acc = tl.dot(p, v_low, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(p, decoded(vv, q.dtype, FAST), acc, input_precision="tf32x3")
    return m_new, l, acc, acc_high


@jit
def normalised(acc, l, SCHEME: tl.constexpr):
    """acc / l, and VALUE_GAIN (256) out of it again."""
    if SCHEME != "none":
        l = l * 256.0
    return acc / l[:, None]
