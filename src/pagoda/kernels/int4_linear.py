"""Products with a 4-bit matrix in groups of 32, 64 or 128 inputs: W4A16.

Contract. y = act(rms_norm(x) @ W.T + bias) + residual as in `small_linear`, where W = (nibble - zero) * scale lies in
`q` and `meta` as `int4_layout` says. x_TK bfloat16 or float16, contiguous, of the dtype that the matrix was packed for;
y in x's dtype or float32. act "" with a gate_up matrix gives gate columns, then up columns.
  gemv    1 row: weights scaled and rounded to 16 bit, sums in float32
  linear  2 to 16 rows: weights unscaled (exact), each group's float32 sum is multiplied by the scale
  wide    17 to 256 rows: the same with groups of 128, else weights scaled and rounded to 16 bit
  more    `dequantize_int4` to a 16-bit [N, K], then the library's product
Opening the nibbles is inline assembly from sm_90 on, plain shifts elsewhere (`ASM` empty): the same numbers.
Early launch: the trigger stands after the main loop (before the wait it lets programs pile up: 1.95 -> 2.2 ms a step).
Shape letters: T rows, K in features, N out features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pagoda.kernels.int4_layout import CHUNK, TILE, unpack_asm, unpack_tiles
from pagoda.kernels.small_linear import Extras, finish_tile, meet, tile_rows, with_extras
from pagoda.kernels.triton_env import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

NARROW_ROWS = 8
MAX_ROWS = 256  # past that, opening the matrix once and the library's product win (H200)


def int4_linear_reference(x_TK: Tensor, q: Tensor, meta: Tensor, n: int, glu: bool, extras: Extras) -> Tensor:
    """See the contract; float32."""
    w_NK = unpack_tiles(q, meta, n, x_TK.shape[1], glu, x_TK.dtype)
    return with_extras(lambda x: x @ w_NK.T, x_TK, extras)


@jit
def _half_as_float(bits, LIKE: tl.constexpr):
    """The low 16 bits as a number of type LIKE, in float32."""
    return (bits & 0xFFFF).to(tl.uint16).to(LIKE, bitcast=True).to(tl.float32)


@jit
def _scale_of(m, LIKE: tl.constexpr):
    """The scale in a meta, in float32."""
    if tl.bfloat16 == LIKE:
        scale = (m & -65536).to(tl.float32, bitcast=True)
    else:
        scale = _half_as_float(m >> 16, LIKE)
    return scale


@jit
def _plain_tile(q0, q1, rc, m, J: tl.constexpr, SCALED: tl.constexpr, LIKE: tl.constexpr):
    """Nibble tile J by shifts; q0, q1: the even and the odd word of each column's pair, m: the meta of its group."""
    OFFSET: tl.constexpr = 128.0 if tl.bfloat16 == LIKE else 1024.0
    word = q0 if J < 4 else q1
    nibble = (word >> (4 * (J % 4) + 16 * (rc & 1))[None, :]) & 15
    v = nibble.to(tl.float32) - (_half_as_float(m, LIKE) - OFFSET)[:, None]
    if SCALED:
        v = v * _half_as_float(m >> 16, LIKE)[:, None]
    return v.to(LIKE)


@jit
def _open(
    like, qp, m0, m1, m2, m3, rq, rc,
    SUB: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr, REGS: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """The eight [rows, 16] nibble tiles of one chunk at qp, in type LIKE, to which `like` points. rq: where each row's
    words start; m0..m3: the metas of the chunk's SUB groups."""
    if ASM != "":
        q = tl.load(qp + rq[:, None] + rc[None, :])
        b0 = tl.broadcast_to(m0[:, None], q.shape)
        if SUB == 1:
            t = tl.inline_asm_elementwise(ASM, REGS, [q, b0], dtype=(like.dtype.element_ty,) * 8, is_pure=True, pack=2)
        else:
            b1 = tl.broadcast_to(m1[:, None], q.shape)
            if SUB == 2:
                t = tl.inline_asm_elementwise(
                    ASM, REGS, [q, b0, b1], dtype=(like.dtype.element_ty,) * 8, is_pure=True, pack=2
                )
            else:
                b2 = tl.broadcast_to(m2[:, None], q.shape)
                b3 = tl.broadcast_to(m3[:, None], q.shape)
                t = tl.inline_asm_elementwise(
                    ASM, REGS, [q, b0, b1, b2, b3], dtype=(like.dtype.element_ty,) * 8, is_pure=True, pack=2
                )
    else:
        q0 = tl.load(qp + rq[:, None] + (rc & 14)[None, :])
        q1 = tl.load(qp + rq[:, None] + (rc & 14)[None, :] + 1)
        m = (m0, m1, m2, m3)
        t = (
            _plain_tile(q0, q1, rc, m[0], 0, SCALED, LIKE),
            _plain_tile(q0, q1, rc, m[0], 1, SCALED, LIKE),
            _plain_tile(q0, q1, rc, m[SUB // 4], 2, SCALED, LIKE),
            _plain_tile(q0, q1, rc, m[SUB // 4], 3, SCALED, LIKE),
            _plain_tile(q0, q1, rc, m[SUB // 2], 4, SCALED, LIKE),
            _plain_tile(q0, q1, rc, m[SUB // 2], 5, SCALED, LIKE),
            _plain_tile(q0, q1, rc, m[SUB // 2 + SUB // 4], 6, SCALED, LIKE),
            _plain_tile(q0, q1, rc, m[SUB // 2 + SUB // 4], 7, SCALED, LIKE),
        )
    return t


@jit
def _metas(mp, SUB: tl.constexpr, TILE: tl.constexpr):
    """The metas of one chunk's SUB groups (repeated where SUB < 4: never read)."""
    m0 = tl.load(mp)
    m1 = m0
    m2 = m0
    m3 = m0
    if SUB > 1:
        m1 = tl.load(mp + TILE)
    if SUB > 2:
        m2 = tl.load(mp + 2 * TILE)
        m3 = tl.load(mp + 3 * TILE)
    return m0, m1, m2, m3


@jit(do_not_specialize=["M"])
def _linear_kernel(
    x, q, meta, y, bias, res, part, count, M, N, K, C,
    BM: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    GLU: tl.constexpr, ACT: tl.constexpr, RES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr, ASM: tl.constexpr, REGS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, SPLIT), all rows in one program. Eight 16-deep products a chunk of C = K / 128 chunks."""
    pid = tl.program_id(0)
    ps = tl.program_id(1)
    per = tl.cdiv(C, SPLIT)
    rn = tl.arange(0, TILE)
    rc = tl.arange(0, 16)
    rm = tl.arange(0, BM)
    qp = q + pid.to(tl.int64) * C * (TILE * 16)
    mp = meta + pid * C * (SUB * TILE) + rn
    xp = x + rm.to(tl.int64)[:, None] * K + rc[None, :]
    xmask = (rm < M)[:, None]
    acc = tl.zeros([TILE, BM], tl.float32)
    LIKE: tl.constexpr = x.dtype.element_ty
    D: tl.constexpr = 8 // SUB
    if PDL:
        gdc_wait()
    for c in tl.range(ps * per, tl.minimum(ps * per + per, C), num_stages=STAGES):
        m = _metas(mp + c * (SUB * TILE), SUB, TILE)
        t = _open(x, qp + c * (TILE * 16), m[0], m[1], m[2], m[3], rn * 16, rc, SUB, False, ASM, REGS, LIKE)
        for s in tl.static_range(SUB):
            p = tl.zeros([TILE, BM], tl.float32)
            for j in tl.static_range(D):
                k = c * 128 + (s * D + j) * 16
                mask = xmask if EVEN else xmask & (k + rc < K)[None, :]
                p = tl.dot(t[s * D + j], tl.load(xp + k, mask=mask, other=0.0).T, p)
            if tl.bfloat16 == LIKE:
                scale = (m[s] & -65536).to(tl.float32, bitcast=True)
            else:
                scale = _half_as_float(m[s] >> 16, LIKE)
            acc += p * scale[:, None]
    if PDL:
        gdc_launch_dependents()
    last = True
    if SPLIT > 1:
        acc, last = meet(acc, part, count, pid, ps, TILE, BM, SPLIT)
    if last:
        finish_tile(acc, y, bias, res, rm, M, pid, N, TILE, TILE, BM, GLU, ACT, RES, BIAS)


@jit(do_not_specialize=["M"])
def _wide_kernel(
    x, q, meta, y, bias, res, part, count, M, N, K, C, tiles,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, GLU: tl.constexpr, ACT: tl.constexpr, RES: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr, REGS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, groups of BN / TILE tiles, SPLIT). The eight nibble tiles side by side are already the left
    operand of one 128-deep product, in registers: eight wgmma in a row and one wait a chunk. Each chunk's product
    starts from zero: a sum carried over makes the assembler wait after every instruction."""
    pm = tl.program_id(0)
    pid = tl.program_id(1)
    ps = tl.program_id(2)
    per = tl.cdiv(C, SPLIT)
    rn = tl.arange(0, BN)
    rk = tl.arange(0, 128)
    rm = pm * BM + tl.arange(0, BM)
    tile = tl.minimum(pid * (BN // TILE) + rn // TILE, tiles - 1) * C  # past the end: any tile, its rows are not stored
    rq = tile * (TILE * 16) + rn % TILE * 16
    mp = meta + tile * (SUB * TILE) + rn % TILE
    xp = x + rm.to(tl.int64)[:, None] * K + rk[None, :]
    xmask = (rm < M)[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    one = tl.where(M > 0, 1.0, 0.0)  # unknown to the compiler, which would carry the sum over
    LIKE: tl.constexpr = x.dtype.element_ty
    if PDL:
        gdc_wait()
    for c in tl.range(ps * per, tl.minimum(ps * per + per, C), num_stages=STAGES):
        m = _metas(mp + c * (SUB * TILE), SUB, TILE)
        t = _open(x, q + c * (TILE * 16), m[0], m[1], m[2], m[3], rq, tl.arange(0, 16), SUB, SUB > 1, ASM, REGS, LIKE)
        low = tl.join(tl.join(t[0], t[1]), tl.join(t[2], t[3]))
        high = tl.join(tl.join(t[4], t[5]), tl.join(t[6], t[7]))
        w = tl.reshape(tl.permute(tl.join(low, high), (0, 4, 3, 2, 1)), [BN, 128])
        mask = xmask if EVEN else xmask & (c * 128 + rk < K)[None, :]
        p = tl.dot(w, tl.load(xp + c * 128, mask=mask, other=0.0).T)
        if SUB == 1:
            acc += p * _scale_of(m[0], LIKE)[:, None]
        else:
            acc += p * one
    if PDL:
        gdc_launch_dependents()
    last = True
    if SPLIT > 1:
        acc, last = meet(acc, part, count, pm * tl.num_programs(1) + pid, ps, BN, BM, SPLIT)
    if last:
        finish_tile(acc, y, bias, res, rm, M, pid, N, BN, TILE, BM, GLU, ACT, RES, BIAS)


@jit
def _gemv_kernel(
    x, q, meta, y, gain, bias, res, part, count, N, K, C, eps,
    TILE: tl.constexpr, SUB: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, KP: tl.constexpr,
    NORM: tl.constexpr, GLU: tl.constexpr, ACT: tl.constexpr, RES: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr, REGS: tl.constexpr,
):  # fmt: skip
    """One row; grid (tiles, SPLIT). The eight columns of the matrix instruction hold the eight 16-long slices of the
    chunk's x (one load), nibble tile j multiplies all of them and only column j of its sum counts: eight independent
    chains and no sums by group. KP >= K, a power of two, for the norm."""
    pid = tl.program_id(0)
    ps = tl.program_id(1)
    per = tl.cdiv(C, SPLIT)
    rn = tl.arange(0, TILE)
    rc = tl.arange(0, 16)
    rj = tl.arange(0, 8)
    qp = q + pid.to(tl.int64) * C * (TILE * 16)
    mp = meta + pid * C * (SUB * TILE) + rn
    rx = rj[:, None] * 16 + rc[None, :]
    LIKE: tl.constexpr = x.dtype.element_ty
    if PDL:
        gdc_wait()
    a0 = tl.zeros([TILE, 8], tl.float32)
    a1 = a0
    a2 = a0
    a3 = a0
    a4 = a0
    a5 = a0
    a6 = a0
    a7 = a0
    for c in tl.range(ps * per, tl.minimum(ps * per + per, C), num_stages=STAGES):
        m = _metas(mp + c * (SUB * TILE), SUB, TILE)
        t = _open(x, qp + c * (TILE * 16), m[0], m[1], m[2], m[3], rn * 16, rc, SUB, True, ASM, REGS, LIKE)
        xv = tl.load(x + c * 128 + rx) if EVEN else tl.load(x + c * 128 + rx, mask=c * 128 + rx < K, other=0.0)
        if NORM:
            gv = (
                tl.load(gain + c * 128 + rx) if EVEN else tl.load(gain + c * 128 + rx, mask=c * 128 + rx < K, other=0.0)
            )
            xv = (xv.to(tl.float32) * gv.to(tl.float32)).to(LIKE)
        xv = xv.T
        a0 = tl.dot(t[0], xv, a0)
        a1 = tl.dot(t[1], xv, a1)
        a2 = tl.dot(t[2], xv, a2)
        a3 = tl.dot(t[3], xv, a3)
        a4 = tl.dot(t[4], xv, a4)
        a5 = tl.dot(t[5], xv, a5)
        a6 = tl.dot(t[6], xv, a6)
        a7 = tl.dot(t[7], xv, a7)
    if PDL:
        gdc_launch_dependents()
    j = rj[None, :]
    d = tl.where(j == 0, a0, 0.0) + tl.where(j == 1, a1, 0.0) + tl.where(j == 2, a2, 0.0) + tl.where(j == 3, a3, 0.0)
    d += tl.where(j == 4, a4, 0.0) + tl.where(j == 5, a5, 0.0) + tl.where(j == 6, a6, 0.0) + tl.where(j == 7, a7, 0.0)
    acc = tl.sum(d, 1)[:, None]
    last = True
    if SPLIT > 1:
        acc, last = meet(acc, part, count, pid, ps, TILE, 1, SPLIT)
    if last:
        if NORM:
            rk = tl.arange(0, KP)
            xn = tl.load(x + rk, mask=rk < K, other=0.0).to(tl.float32)
            acc *= tl.rsqrt(tl.sum(xn * xn, 0) / K + eps)
        finish_tile(acc, y, bias, res, tl.arange(0, 1), 1, pid, N, TILE, TILE, 1, GLU, ACT, RES, BIAS)


@jit
def _dequantize_kernel(
    q, meta, out, N, K, C,
    TILE: tl.constexpr, SUB: tl.constexpr, GLU: tl.constexpr, ASM: tl.constexpr, REGS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, C): one chunk of one tile to 16 bit, rows in the matrix's own order."""
    pid = tl.program_id(0)
    c = tl.program_id(1)
    rn = tl.arange(0, TILE)
    rc = tl.arange(0, 16)
    m = _metas(meta + (pid * C + c) * (SUB * TILE) + rn, SUB, TILE)
    qp = q + (pid.to(tl.int64) * C + c) * (TILE * 16)
    t = _open(out, qp, m[0], m[1], m[2], m[3], rn * 16, rc, SUB, True, ASM, REGS, out.dtype.element_ty)
    rows, ok = tile_rows(pid, N, TILE, TILE, GLU)
    for j in tl.static_range(8):
        col = c * 128 + j * 16 + rc
        tl.store(out + rows.to(tl.int64)[:, None] * K + col[None, :], t[j], mask=ok[:, None] & (col < K)[None, :])


def asm_for(meta_per_chunk: int, dtype: torch.dtype, scaled: bool, device: torch.device) -> dict[str, str]:
    """The kernel's ASM and REGS: assembly where the device has it."""
    if INTERPRETED or torch.cuda.get_device_capability(device)[0] < 9:
        return {"ASM": "", "REGS": ""}
    asm, regs = unpack_asm(dtype, meta_per_chunk, scaled)
    return {"ASM": asm, "REGS": regs}


class Plan(NamedTuple):
    """How a product is cut: rows of x and of the matrix a program, programs that share a tile, warps, stages."""

    BM: int
    BN: int
    split: int
    warps: int
    stages: int


def plan(rows: int, tiles: int, chunks: int) -> Plan:
    """Programs are wanted up to about four a multiprocessor (wide: three) on a grid of 132."""
    if rows > NARROW_ROWS:
        BM = min(64, next_power_of_2(rows))
        tiles_m = -(-rows // BM)
        BN = 2 * TILE if tiles * tiles_m >= 264 else TILE
        programs, most, warps, stages = tiles * TILE // BN * tiles_m, 400, BN // 16, 3
    else:
        BM, BN = (1 if rows == 1 else max(8, next_power_of_2(rows))), TILE
        programs, most, warps, stages = tiles, 512, 2, 4
    split = 1
    while split < 8 and programs * split * 2 <= most and split * 4 <= chunks:
        split *= 2
    return Plan(BM, BN, split, warps, stages)


def supports(rows: int, dtype: torch.dtype, norm: bool) -> bool:
    """Whether one kernel does it and wins. The norm goes inside at one row of bfloat16 (x * gain may leave float16)."""
    return 1 <= rows <= MAX_ROWS and (not norm or (rows == 1 and dtype == torch.bfloat16))


def int4_linear_launch(
    x_TK: Tensor, q: Tensor, meta: Tensor, n: int, glu: bool, extras: Extras, y: Tensor, counters: Tensor
) -> None:
    """One launch: gemv, linear or wide by the number of rows. See the contract."""
    (T, K), (tiles, chunks), e = x_TK.shape, q.shape[:2], extras
    sub = meta.shape[1] // chunks
    BM, BN, split, warps, stages = plan(T, tiles, chunks)
    tiles_n, tiles_m = -(-tiles * TILE // BN), -(-T // BM)
    part = x_TK.new_empty(tiles_n * tiles_m * split * BN * BM if split > 1 else 1, dtype=torch.float32)
    assert split == 1 or tiles_n * tiles_m <= counters.numel()
    wide = T > NARROW_ROWS
    flags = dict(
        TILE=TILE, SUB=sub, STAGES=stages, SPLIT=split, GLU=glu, ACT=e.act, RES=e.residual is not None,
        BIAS=e.bias_N is not None, EVEN=K % CHUNK == 0, PDL=e.pdl, num_warps=warps,
        **asm_for(sub, x_TK.dtype, T == 1 or (wide and sub > 1), x_TK.device),
        **({"launch_pdl": True} if e.pdl else {}),
    )  # fmt: skip
    gain, bias, res = (x_TK if t is None else t for t in (e.gain_K, e.bias_N, e.residual))
    if T == 1:
        _gemv_kernel[(tiles, split)](
            x_TK, q, meta, y, gain, bias, res, part, counters, n, K, chunks, e.eps,
            KP=next_power_of_2(K), NORM=e.gain_K is not None, **flags,
        )  # fmt: skip
        return
    assert e.gain_K is None
    operands = (x_TK, q, meta, y, bias, res, part, counters, T, n, K, chunks)
    if wide:
        room = {"maxnreg": 128} if warps == 8 else {}  # two programs a multiprocessor, without spills
        _wide_kernel[(tiles_m, tiles_n, split)](*operands, tiles, BM=BM, BN=BN, **flags, **room)
    else:
        _linear_kernel[(tiles, split)](*operands, BM=BM, **flags)


def dequantize_int4(q: Tensor, meta: Tensor, n: int, k: int, glu: bool, dtype: torch.dtype) -> Tensor:
    """The matrix in 16 bit, [n, k] (scaled values rounded); CUDA, or under the interpreter."""
    out = torch.empty(n, k, dtype=dtype, device=q.device)
    sub = meta.shape[1] // q.shape[1]
    _dequantize_kernel[(q.shape[0], q.shape[1])](
        q, meta, out, n, k, q.shape[1],
        TILE=TILE, SUB=sub, GLU=glu, num_warps=4, **asm_for(sub, dtype, True, q.device),
    )  # fmt: skip
    return out
