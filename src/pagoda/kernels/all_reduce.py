"""Sum over the GPUs of one host in one kernel, through peers' memory; residual sum and RMSNorm inside.

Contract. Every rank calls in the same order with tensors of equal shape and dtype: x [T, C], contiguous, bfloat16,
float16 or float32, of at most `max_bytes`. s = the ranks' x added up in the order of the ranks in float32, after the
residual (may be absent), rounded once: the same bits on every rank. With a norm (gain_C, eps) also
y = s * rsqrt(mean(s^2) + eps) * gain, as `rms_norm` has it. Device work only, on the current stream; may be captured
in a CUDA graph. early: launch before the kernel ahead has ended, and wait for it inside; the kernel behind may
ask for its weights meanwhile.

How. A message travels as packets of 8 bytes: 4 of the tensor, 4 that count the calls. A rank writes its packets into
every other's memory, then reads its own until each packet there bears the count of this call. A packet is written and
read whole, so there is no fence, no flag, no barrier: one way over the link is all that is waited for. Two slots take
turns. Nobody overwrites what is still read: whoever writes packets of call n has all packets of call n - 1, which
their senders wrote after they had ended call n - 2. The count lives on the device, so replays of a graph count on.
NVLink multicast is never used. `benchmarks/tensor_parallel.py` measures it against NCCL.
Shape letters: T rows, C columns, W words (4 bytes) of a row, N ranks.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pagoda.kernels.rms_norm import rms_norm_reference
from pagoda.kernels.triton_env import HAS_TRITON, INTERPRETED, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

MAX_BYTES = {2: 4 << 20, 3: 1 << 20, 4: 1 << 20}
MAX_BYTES_MORE = 1 << 18  # more ranks: each sends to all others
FEW_WORDS = 1 << 15  # up to here programs of one warp: none waits for another's look
MAX_NORM_WORDS = 8192  # one program holds a row in registers
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NO_LIMIT = 0
PATIENCE = 20_000_000  # looks of the first call: ten seconds and more, a peer may still compile its kernel
CALL = 1 << 20  # more than a call has programs


def all_reduce_reference(parts: list[Tensor], residual: Tensor | None = None, norm: Any = None):
    """What every rank gets: s, or (y, s) with a norm (gain, eps)."""
    total = torch.stack([p.float() for p in (parts if residual is None else [residual, *parts])]).sum(0)
    total = total.to(parts[0].dtype)
    return total if norm is None else (rms_norm_reference(total, *norm), total)


def takes_norm(gain_C: Tensor) -> bool:
    """Whether rows can be normalised on the way."""
    return gain_C.nbytes % 16 == 0 and gain_C.nbytes <= 4 * MAX_NORM_WORDS


@jit
def _opened(word, KIND: tl.constexpr):
    """The one or two numbers of a word, in float32: (first, second)."""
    if KIND == "fp32":
        first = word.to(tl.float32, bitcast=True)
        second = first
    elif KIND == "bf16":
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -65536).to(tl.float32, bitcast=True)
    else:
        first = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@jit
def _closed(first, second, KIND: tl.constexpr):
    """The reverse of `_opened`, rounded to nearest."""
    if KIND == "fp32":
        word = first.to(tl.int32, bitcast=True)
    elif KIND == "bf16":
        low = first.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        word = (second.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    else:
        low = first.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        word = (second.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    return word


@jit
def _send(address, packet, ok, NATIVE: tl.constexpr):
    """Each packet in a store of its own, whatever neighbours a thread has; they need not be seen in any order."""
    if NATIVE:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,l,r", [address.to(tl.int64), packet, ok.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(address, packet, mask=ok)


@jit
def _arrived(address, count, ok, patience):
    """The words of the packets there, once all bear `count`; what there is after `patience` looks."""
    packet = tl.load(address, mask=ok, other=0, volatile=True)
    missing = tl.sum((ok & ((packet >> 32).to(tl.int32) != count)).to(tl.int32), 0)
    looks = 0
    while (missing > 0) & ((looks < patience) | (patience == 0)):
        packet = tl.load(address, mask=ok, other=0, volatile=True)
        missing = tl.sum((ok & ((packet >> 32).to(tl.int32) != count)).to(tl.int32), 0)
        looks += 1
    return packet.to(tl.int32)


@jit
def _sum_kernel(
    x, res, gain, s, y, peers, arrivals, W, C, eps, slot_words, patience,
    RANK: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, CALL: tl.constexpr, BLOCK: tl.constexpr,
    RES: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (rows, parts of a row): words of x, res, gain, s, y. All programs of a call add CALL to `arrivals`, each
    after it has read there which call this is."""
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < W
    at = row.to(tl.int64) * W + col
    inbox = tl.load(peers + RANK).to(tl.pointer_type(tl.int64))
    if NORM:
        gain_a, gain_b = _opened(tl.load(gain + col, mask=ok, other=0), KIND)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    own = tl.load(x + at, mask=ok, other=0)
    count = (tl.load(arrivals) // CALL + 1).to(tl.int32)
    place = (count & 1).to(tl.int64) * SIZE * slot_words + at
    packet = (count.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(SIZE):
        if r != RANK:
            _send(tl.load(peers + r).to(tl.pointer_type(tl.int64)) + place + RANK * slot_words, packet, ok, NATIVE)
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    if RES:
        sum_a, sum_b = _opened(tl.load(res + at, mask=ok, other=0), KIND)
    for r in tl.static_range(SIZE):
        word = own
        if r != RANK:
            word = _arrived(inbox + place + r * slot_words, count, ok, patience)
        a, b = _opened(word, KIND)
        sum_a += a
        sum_b += b
    word = _closed(sum_a, sum_b, KIND)
    tl.store(s + at, word, mask=ok)
    if NORM:
        a, b = _opened(word, KIND)
        squares = a * a if KIND == "fp32" else a * a + b * b
        rstd = tl.rsqrt(tl.sum(squares, 0) / C + eps)
        tl.store(y + at, _closed(a * rstd * gain_a, b * rstd * gain_b, KIND), mask=ok)
    first = (row == 0) & (tl.program_id(1) == 0)
    rest = CALL - (tl.num_programs(0) * tl.num_programs(1) - 1)
    tl.atomic_add(arrivals, tl.where(first, rest, 1).to(tl.int64), sem="relaxed")


class OneShot:
    """Rank `rank`'s view of the buffers of all. `peer_N`: their addresses as this rank sees them, int64 on the device,
    each `buffer_words` zeroed words of 8 bytes. One stream at a time. keep: what must live as long."""

    def __init__(self, rank: int, peer_N: Tensor, max_bytes: int, keep: Any = None):
        self.rank, self.size, self.max_bytes, self._keep = rank, peer_N.numel(), max_bytes, keep
        self._peer_N = peer_N
        self._arrivals = torch.zeros(1, dtype=torch.int64, device=peer_N.device)

    @staticmethod
    def buffer_words(size: int, max_bytes: int) -> int:
        """Two slots with a message of each rank."""
        return 2 * size * (max_bytes // 4)

    @classmethod
    def open(cls, ranks: dist.ProcessGroup, device: torch.device) -> "OneShot":
        """Over torch's symmetric memory; a collective. `RuntimeError` where peers' memory cannot be written."""
        import torch.distributed._symmetric_memory as symmetric

        if not HAS_TRITON:
            raise RuntimeError("Triton is not installed")
        os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")  # a plain allocation, given back when it is dropped
        rank, size = ranks.rank(), ranks.size()
        max_bytes = MAX_BYTES.get(size, MAX_BYTES_MORE)
        buffer = symmetric.empty(cls.buffer_words(size, max_bytes), dtype=torch.int64, device=device)
        buffer.zero_()
        torch.cuda.synchronize(device)
        handle = symmetric.rendezvous(buffer, ranks.group_name)
        offset = buffer.data_ptr() - handle.buffer_ptrs[rank]
        peer_N = torch.tensor([start + offset for start in handle.buffer_ptrs], dtype=torch.int64, device=device)
        return cls(rank, peer_N, max_bytes, (buffer, handle))

    def works(self) -> bool:
        """Whether sums are right on this machine, in both slots, of odd lengths, short and as long as they may be; a
        collective."""
        for num_bytes in (4096, 4096, 16, 80, 4000, self.max_bytes):
            x = torch.full((num_bytes // 4,), self.rank + 1.0, device=self._peer_N.device)
            self.sum_(x, patience=PATIENCE)
            if not bool((x == self.size * (self.size + 1) / 2).all()):
                return False
        return True

    def takes(self, num_bytes: int, dtype: torch.dtype) -> bool:
        """Whether a contiguous tensor can be summed: small enough, whole pairs of packets."""
        return 0 < num_bytes <= self.max_bytes and num_bytes % 16 == 0 and dtype in DTYPES

    def sum_(
        self, x_TC: Tensor, residual: Tensor | None = None, norm: Any = None, early: bool = False,
        patience: int = NO_LIMIT,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(s, y): see the contract. s overwrites the residual, or x without one; y is new, None without a norm.
        patience: looks at a peer's packets before a wrong sum is returned (the test at the start)."""
        assert self.takes(x_TC.nbytes, x_TC.dtype) and x_TC.is_contiguous()
        s = x_TC if residual is None else residual
        assert s.is_contiguous() and s.shape == x_TC.shape and s.dtype == x_TC.dtype
        words = x_TC.nbytes // 4
        rows, width, block = 1, words, (128 if words <= FEW_WORDS else 2048)
        y, gain, eps = None, x_TC, 0.0
        if norm is not None:
            gain, eps = norm
            assert takes_norm(gain) and gain.dtype == x_TC.dtype
            y, rows, width = torch.empty_like(x_TC), words * 4 // gain.nbytes, gain.nbytes // 4
            block = next_power_of_2(width)
        word = torch.int32
        _sum_kernel[(rows, -(-width // block))](
            x_TC.view(word), s.view(word), gain.view(word), s.view(word), (x_TC if y is None else y).view(word),
            self._peer_N, self._arrivals, width, x_TC.shape[-1], eps, self.max_bytes // 4, patience,
            RANK=self.rank, SIZE=self.size, KIND=DTYPES[x_TC.dtype], CALL=CALL, BLOCK=block,
            RES=residual is not None, NORM=norm is not None, EARLY=early, NATIVE=not INTERPRETED,
            num_warps=max(1, min(16, block // 256)),
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
        return s, y
