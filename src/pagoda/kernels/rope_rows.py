"""Device functions of the rope kernels: rows of one head each, held as their lower and upper half of channels.

D head_dim, HP = D/2 padded to a power of two, PAIRS rotated pairs. `rotate_half`, `quantize`, `write_kv` are the
formulas.
"""

from pagoda.kernels.triton_env import jit, tl


@jit
def gains(q_gain, k_gain, is_k, at, ok):
    """[rows, len(at)] float32: the gain of each row's kind."""
    q = tl.load(q_gain + at, mask=ok, other=0.0).to(tl.float32)
    k = tl.load(k_gain + at, mask=ok, other=0.0).to(tl.float32)
    return tl.where(is_k[:, None], k[None, :], q[None, :])


@jit
def partner_turn(
    x, ok, cos, sin, angle, q_gain, k_gain, is_k, rstd, mine, d, inside, PAIRS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Channels d of a head that is rotated in part: the partner is read where it lies."""
    turned = inside & (d < 2 * PAIRS)
    other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
    y = tl.load(x[:, None] + other[None, :], mask=ok[:, None] & turned[None, :], other=0.0).to(tl.float32)
    if NORM:
        y = y * rstd * gains(q_gain, k_gain, is_k, other, turned)
    at = angle[:, None] * PAIRS + tl.where(d < PAIRS, d, d - PAIRS)[None, :]
    mask = ok[:, None] & turned[None, :]
    c = tl.load(cos + at, mask=mask, other=1.0)
    s = tl.load(sin + at, mask=mask, other=0.0)
    return mine * c + y * tl.where((d < PAIRS)[None, :], -s, s)


@jit
def rope_rows(
    x, ok, cos, sin, angle, q_gain, k_gain, is_k, eps, D: tl.constexpr, HP: tl.constexpr, PAIRS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Row pointers x -> (low, high) [rows, HP] float32 after norm and rope; padding and rows not `ok` are 0. `angle`:
    each row's row of cos and sin.
    """
    rd = tl.arange(0, HP)
    inside = rd < D // 2
    mask = ok[:, None] & inside[None, :]
    low = tl.load(x[:, None] + rd[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x[:, None] + (rd + D // 2)[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.full([1, 1], 1.0, tl.float32)
    if NORM:
        rstd = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
        low = low * rstd * gains(q_gain, k_gain, is_k, rd, inside)
        high = high * rstd * gains(q_gain, k_gain, is_k, rd + D // 2, inside)
    if PAIRS * 2 == D:
        at = angle[:, None] * PAIRS + rd[None, :]
        c = tl.load(cos + at, mask=mask, other=0.0)
        s = tl.load(sin + at, mask=mask, other=0.0)
        new_low = low * c - high * s
        high = high * c + low * s
        low = new_low
    elif PAIRS > 0:
        args = (x, ok, cos, sin, angle, q_gain, k_gain, is_k, rstd)
        low = partner_turn(*args, low, rd, inside, PAIRS, NORM)
        high = partner_turn(*args, high, rd + D // 2, inside, PAIRS, NORM)
    return low, high


@jit
def rotate_rows(low, high, rotation, D: tl.constexpr, HP: tl.constexpr):
    """Times the Hadamard matrix, built as [[A, A], [A, -A]]: two products with A, float32 split in two float16
    parts.
    """
    r = tl.arange(0, HP)
    inside = (r < D // 2)[:, None] & (r < D // 2)[None, :]
    a = tl.load(rotation + r[:, None] * D + r[None, :], mask=inside, other=0.0)
    plus, minus = low + high, low - high
    p0, m0 = plus.to(tl.float16), minus.to(tl.float16)
    new_low = tl.dot(p0, a) + tl.dot((plus - p0.to(tl.float32)).to(tl.float16), a)
    new_high = tl.dot(m0, a) + tl.dot((minus - m0.to(tl.float32)).to(tl.float16), a)
    norm: tl.constexpr = D**-0.5
    return new_low * norm, new_high * norm


@jit
def row_scale(low, high, D: tl.constexpr, HP: tl.constexpr, SCHEME: tl.constexpr):
    """Scale and zero [rows] float32 as the cache will hold them."""
    if SCHEME == "int4":
        inside = (tl.arange(0, HP) < D // 2)[None, :]
        floor = tl.minimum(tl.min(tl.where(inside, low, 1e30), 1), tl.min(tl.where(inside, high, 1e30), 1))
        top = tl.maximum(tl.max(tl.where(inside, low, -1e30), 1), tl.max(tl.where(inside, high, -1e30), 1))
        zero = floor.to(tl.float16).to(tl.float32)
        scale = tl.maximum((top - zero) * (1 / 15), 2.0**-24).to(tl.float16).to(tl.float32)
    else:
        limit: tl.constexpr = 448.0 if SCHEME == "fp8" else 127.0
        top = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        scale = tl.maximum(top * (1 / limit), 1e-30)
        zero = scale * 0.0
    return scale, zero


@jit
def codes_of(x, scale, zero, SCHEME: tl.constexpr, STATIC: tl.constexpr):
    """Codes of rows x as float32: whole numbers, or what e4m3 will round. NaN becomes 0: a code is never NaN."""
    if SCHEME == "int4":
        y = tl.floor((x - zero[:, None]) / scale[:, None] + 0.5)
        y = tl.minimum(tl.maximum(y, 0.0), 15.0)
    elif SCHEME == "int8":
        if STATIC:
            y = tl.floor((x - zero[:, None]) / scale[:, None] + 0.5)
            y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        else:
            y = tl.floor(x / scale[:, None] + 0.5)
            y = tl.minimum(tl.maximum(y, -127.0), 127.0)
    else:
        y = x / scale[:, None]
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    return tl.where(y == y, y, 0.0)


@jit
def store_row_codes(
    args,
    K: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    BL: tl.constexpr,
    SCHEME: tl.constexpr,
    STATIC: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Rows into the cache at places (slot, or < 0: nowhere) of kv head `head`. TURNED: values, which lie transposed
    unless 16 bit. -> the halves as a reader will see them, float32.
    """
    store, scales, zeros, place, head, low, high = args
    rd = tl.arange(0, HP)
    keep = (place >= 0)[:, None] & (rd < D // 2)[None, :]
    cell = (place // BL) * K + head
    t = place % BL
    if SCHEME == "none":
        at = store + (cell * BL + t)[:, None] * D + rd[None, :]
        low, high = low.to(store.dtype.element_ty), high.to(store.dtype.element_ty)
        tl.store(at, low, mask=keep)
        tl.store(at + D // 2, high, mask=keep)
        return low.to(tl.float32), high.to(tl.float32)
    else:
        if STATIC:
            scale = tl.load(scales + head + t * 0)
            zero = tl.load(zeros + head + t * 0)
        else:
            scale, zero = row_scale(low, high, D, HP, SCHEME)
            tl.store(scales + cell * BL + t, scale.to(scales.dtype.element_ty), mask=place >= 0)
            if SCHEME == "int4":
                tl.store(zeros + cell * BL + t, zero.to(zeros.dtype.element_ty), mask=place >= 0)
        low, high = codes_of(low, scale, zero, SCHEME, STATIC), codes_of(high, scale, zero, SCHEME, STATIC)
        W: tl.constexpr = D // 2 if SCHEME == "int4" else D
        if TURNED:
            at = store + (cell * (W * BL) + t)[:, None] + rd[None, :] * BL
        else:
            at = store + (cell * BL + t)[:, None] * W + rd[None, :]
        if SCHEME == "int4":
            tl.store(at, low.to(tl.uint8) | (high.to(tl.uint8) << 4), mask=keep)
        else:
            low, high = low.to(store.dtype.element_ty), high.to(store.dtype.element_ty)
            tl.store(at, low, mask=keep)
            tl.store(at + (D // 2) * (BL if TURNED else 1), high, mask=keep)
        low = low.to(tl.float32) * scale[:, None]
        high = high.to(tl.float32) * scale[:, None]
        if SCHEME == "int4" or STATIC:
            low += zero[:, None]
            high += zero[:, None]
        return low, high
