"""Attention over the paged cache: one JSON line a result, correctness first. Needs a CUDA GPU.

    python benchmarks/attention.py                 # everything, in about a minute
    python benchmarks/attention.py decode fused rope prefill check
    python benchmarks/attention.py --sweep         # settings of the kernels instead of the shipped ones

`fraction` is of the limit: bytes that must be read / 4.62 TB/s (decode, fused), read and written / 4.26 TB/s (rope),
or floating-point operations (causal pairs only) / 686 TFLOP/s (prefill), the ceilings of one H200. Times are medians of
CUDA graph replays over enough caches that L2 serves nothing. Shape: 32 query heads, 8 kv heads, head_dim 128, blocks of
64, bfloat16.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pagoda.kernels.decode_attention import decode_attention_launch, decode_attention_reference
from pagoda.kernels.decode_attention_fused import decode_attention_fused_launch
from pagoda.kernels.prefill_attention import (
    PrefillTile,
    prefill_attention_launch,
    prefill_attention_reference,
    tile_for,
)
from pagoda.kernels.rope_cache import rope_and_write_launch
from pagoda.layers.kv_schemes import KV_SCHEMES

READ, COPY, FLOPS = 4.62e12, 4.26e12, 686e12
H, K, D, BL = 32, 8, 128, 64
BF16 = torch.bfloat16
SCHEMES = ("none", "int8", "fp8", "int4")
BATCHES, CONTEXTS = (1, 16, 64, 256), (512, 2048, 8192)


def filled_cache(scheme: str, num_blocks: int):
    """A cache of random codes whose values are about normal."""
    cache = KV_SCHEMES[scheme].allocate(num_blocks, K, D, BL, BF16, "cuda")
    for store in (cache.k, cache.v):
        if scheme == "none":
            store.normal_()
        elif scheme == "fp8":  # random signs and codes below NaN
            raw = store.view(torch.uint8)
            raw.random_(0, 256).bitwise_and_(0xF7)
        else:
            store.view(torch.uint8).random_(0, 256)
    unit = {"int8": 1 / 64, "fp8": 1 / 100, "int4": 1 / 4}.get(scheme, 0)
    for x, low, high in (
        (cache.k_scale, unit / 2, unit * 1.5),
        (cache.v_scale, unit / 2, unit * 1.5),
        (cache.k_zero, -2.2, -1.8),
        (cache.v_zero, -2.2, -1.8),
    ):
        if x is not None:
            x.uniform_(low, high)
    return cache


def graph_us(launch, num: int, repeats: int = 7) -> float:
    """launch(i) for i < num in one graph; median microseconds of one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(num, 2)):
            launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(num):
            launch(i)
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    graph.replay()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) * 1e3 / num for begin, end in events)
    return times[repeats // 2]


class Rig:
    """Tables, lengths and queries of one decode case, rotated over `copies` disjoint sets of blocks."""

    def __init__(self, scheme: str, batch: int, context: int, warm: bool):
        self.scheme, self.batch, self.context = scheme, batch, context
        per_row = 1 if warm else context // BL
        self.bytes = batch * per_row * KV_SCHEMES[scheme].bytes_per_block(K, D, BL, BF16)
        self.copies = 1 if warm else max(2, min(64, int(400e6 // self.bytes) + 1))
        self.cache = filled_cache(scheme, self.copies * batch * per_row + 1)
        order = torch.randperm(self.copies * batch * per_row, device="cuda", dtype=torch.int32) + 1
        self.tables = torch.zeros(self.copies, batch, context // BL, dtype=torch.int32, device="cuda")
        self.tables[:, :, :per_row] = order.view(self.copies, batch, per_row)
        self.lens = torch.full((batch,), per_row * BL - 3, dtype=torch.int32, device="cuda")
        self.q = torch.randn(batch, H, D, device="cuda").to(BF16)
        self.qkv = torch.randn(batch, (H + 2 * K) * D, device="cuda").to(BF16)
        angle = torch.rand(batch, D // 2, device="cuda") * 6
        self.angles = angle.cos(), angle.sin()
        self.gain = torch.ones(D, device="cuda", dtype=BF16)
        block = self.tables[:, :, per_row - 1].long()
        self.slots = block * BL + BL - 4

    def decode(self, i: int, **options):
        table = self.tables[i % self.copies]
        return decode_attention_launch(self.q, self.cache, self.lens, table, D**-0.5, **options)

    def fused(self, i: int, **options):
        i %= self.copies
        tensors = (self.qkv, *self.angles, self.slots[i], self.cache, self.lens, self.tables[i])
        norms = {"q_norm_D": self.gain, "k_norm_D": self.gain, "norm_eps": 1e-6}
        return decode_attention_fused_launch(*tensors, D**-0.5, **norms, **options)

    def pair(self, i: int, **options):
        i %= self.copies
        norms = (self.gain, self.gain, 1e-6)
        q = rope_and_write_launch(self.qkv, *self.angles, self.slots[i], self.cache, H, K, D, *norms)
        return decode_attention_launch(q, self.cache, self.lens, self.tables[i], D**-0.5, **options)


def say(**line):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def relative(out, want) -> float:
    return ((out.double() - want.double()).norm() / want.double().norm()).item()


def check(_options):
    """Every kernel against its reference at the measured shapes; leaves with status 1 where one is wrong."""
    worst = 0.0
    for scheme in SCHEMES:
        for batch, context in ((1, 2048), (16, 512), (64, 512)):
            rig = Rig(scheme, batch, context, False)
            want = decode_attention_reference(rig.q.float(), rig.cache, rig.lens, rig.tables[0], D**-0.5)
            error = relative(rig.decode(0), want)
            twin = relative(rig.fused(0), rig.pair(0).flatten(1))
            say(op="check", kernel="decode", scheme=scheme, batch=batch, context=context, error=error, fused=twin)
            worst = max(worst, error, twin) if error == error and twin == twin else float("nan")
        inputs = prefill_inputs(scheme, 2, 1000, 300)
        error = relative(prefill_run(inputs), prefill_attention_reference(*inputs, 1000, D**-0.5))
        say(op="check", kernel="prefill", scheme=scheme, error=error)
        worst = max(worst, error) if error == error else float("nan")
    if not worst < 0.015:
        sys.exit(f"a kernel is wrong: error {worst}")


DECODE_SWEEP = [
    {"target": 512, "num_stages": 3, "merge": 4, "num_warps": 4} | change
    for change in (
        *({}, {"target": 256}, {"target": 1024}, {"num_stages": 4}, {"num_stages": 5}, {"merge": 1}, {"merge": 8}),
        *({"num_warps": 2}, {"num_warps": 8}, {"target": 1024, "num_warps": 2}, {"num_stages": 4, "num_warps": 2}),
    )
]


def decode(options, warm=False):
    for scheme in SCHEMES:
        for batch in BATCHES:
            for context in CONTEXTS if not warm else CONTEXTS[:1]:
                rig = Rig(scheme, batch, context, warm)
                for how in DECODE_SWEEP if options.sweep else [{}]:
                    yield "decode", rig, rig.decode, how


def fused(options, warm=False):
    for scheme in SCHEMES:
        for batch in (1, 4, 16):
            for context in (256, 2048) if not warm else (256,):
                rig = Rig(scheme, batch, context, warm)
                yield "rope+decode", rig, rig.pair, {}
                for how in DECODE_SWEEP if options.sweep else [{}]:
                    for early in (0, 1, 2, 3) if options.sweep and not how else (0, 2):
                        yield "fused", rig, rig.fused, {**how, "early_launch": early}


def run_decode(cases):
    for name, rig, launch, how in cases:
        num = min(64, max(rig.copies, 2 if rig.bytes > 400e6 else 8))
        us = graph_us(lambda i, launch=launch, how=how: launch(i, **how), num)
        fraction = rig.bytes / READ * 1e6 / us
        say(op=name, scheme=rig.scheme, batch=rig.batch, context=rig.context, us=us, fraction=fraction, **how)


def rope(_options):
    for scheme in SCHEMES:
        for tokens in (1, 16, 256, 8192):
            cache = filled_cache(scheme, 2 * tokens // BL + 2)
            num = max(2, min(64, int(400e6 // (tokens * (H + 2 * K) * D * 4)) + 1))
            qkv = torch.randn(num, tokens, (H + 2 * K) * D, device="cuda", dtype=BF16)
            angle = torch.rand(tokens, D // 2, device="cuda")
            slot = torch.arange(tokens, device="cuda") + BL
            args = (angle.cos(), angle.sin(), slot, cache, H, K, D)
            us = graph_us(lambda i, qkv=qkv, args=args: rope_and_write_launch(qkv[i], *args), num)
            written = tokens * (H * D * 2 + KV_SCHEMES[scheme].bytes_per_block(K, D, BL, BF16) / BL)
            moved = qkv[0].nbytes + written + 2 * angle.nbytes
            say(op="rope", scheme=scheme, tokens=tokens, us=us, fraction=moved / COPY * 1e6 / us)


def prefill_inputs(scheme: str, rows: int, queries: int, cached: int = 0):
    """`rows` chunks of `queries` tokens behind `cached` ones."""
    length = queries + cached
    width = -(-length // BL)
    cache = filled_cache(scheme, rows * width + 1)
    table = (torch.randperm(rows * width, device="cuda", dtype=torch.int32) + 1).view(rows, width)
    start = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * queries
    lens = torch.full((rows,), length, device="cuda", dtype=torch.int32)
    return torch.randn(rows * queries, H, D, device="cuda", dtype=BF16), cache, start, lens, table


def prefill_run(inputs, tile=None):
    return prefill_attention_launch(*inputs, D**-0.5, tile=tile)


PREFILL_CASES = ((4, 4096, 0), (1, 2048, 14336), (16, 1024, 0))
PREFILL_SWEEP = [
    *(PrefillTile(128, 1, 8, stages) for stages in (2, 3, 4)),
    *(PrefillTile(64, 1, 4, stages) for stages in (2, 3, 4)),
    *(PrefillTile(128, 2, 8, 2), PrefillTile(64, 2, 4, 2), PrefillTile(128, 1, 4, 3), PrefillTile(256, 1, 8, 2)),
]


def causal_flops(rows: int, queries: int, cached: int) -> float:
    return rows * 4.0 * D * H * (queries * cached + queries * (queries + 1) / 2)


def prefill(options):
    for rows, queries, cached in PREFILL_CASES:
        flops = causal_flops(rows, queries, cached)
        for scheme in SCHEMES:
            inputs = prefill_inputs(scheme, rows, queries, cached)
            tiles = PREFILL_SWEEP if options.sweep else [tile_for(inputs[0], inputs[1])]
            for tile in tiles:
                if scheme != "none" and tile.key_blocks > 1:
                    continue
                with suppress_unfit(tile):
                    us = graph_us(lambda i, inputs=inputs, tile=tile: prefill_run(inputs, tile), 2, 5)
                    how = asdict(tile) if options.sweep else {}
                    shape = {"rows": rows, "queries": queries, "cached": cached}
                    say(op="prefill", scheme=scheme, **shape, us=us, fraction=flops / us * 1e6 / FLOPS, **how)
        if not cached:
            torch_prefill(rows, queries, flops)


class suppress_unfit(suppress):
    """A tile that does not fit the multiprocessor is reported, not fatal."""

    def __init__(self, tile):
        super().__init__(Exception)
        self.tile = tile

    def __exit__(self, kind, error, trace):
        if error is not None:
            say(op="prefill", unfit=str(self.tile), why=str(error)[:100])
        return super().__exit__(kind, error, trace)


def torch_prefill(rows: int, queries: int, flops: float):
    """What torch itself has for a first chunk in 16 bit: one padded batch by backend, and variable lengths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = (torch.randn(rows, queries, heads, D, device="cuda", dtype=BF16) for heads in (H, K, K))
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    start = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * queries
    flat = [x.flatten(0, 1) for x in (q, k, v)]

    def by_backend(backend):
        def launch(_):
            with sdpa_kernel(backend):
                sdpa(*swapped, is_causal=True, enable_gqa=True)

        return launch

    def varlen(_):
        from torch.nn.attention.varlen import varlen_attn

        wide = [flat[0], *(x.repeat_interleave(H // K, 1) for x in flat[1:])] if not takes_gqa else flat
        options = {"enable_gqa": True} if takes_gqa else {}
        with suppress(TypeError):
            varlen_attn(*wide, start, start, queries, queries, is_causal=True, **options)
            return
        varlen_attn(*wide, start, start, queries, queries, window_size=(-1, 0), **options)

    takes_gqa = False
    with suppress(ImportError):
        import inspect

        from torch.nn.attention.varlen import varlen_attn

        takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    ways = {
        "torch-flash": by_backend(SDPBackend.FLASH_ATTENTION),
        "torch-cudnn": by_backend(SDPBackend.CUDNN_ATTENTION),
        "torch-varlen": varlen,
    }
    for name, launch in ways.items():
        try:
            us = graph_us(launch, 2, 5)
            say(op=name, rows=rows, queries=queries, us=us, fraction=flops / us * 1e6 / FLOPS)
        except Exception as error:
            torch.cuda.synchronize()
            say(op=name, rows=rows, queries=queries, why=str(error)[:120])


def warm_share(share: tuple[int, int, argparse.Namespace]):
    """Compile every n-th decode kernel into Triton's cache on disk."""
    index, num, options = share
    torch.manual_seed(index)
    for maker in (decode, fused):
        for i, (_, _, launch, how) in enumerate(maker(options, warm=True)):
            if i % num == index:
                with suppress(Exception):  # what does not compile says so when it is measured
                    launch(0, **how)
    if index < len(SCHEMES):
        inputs = prefill_inputs(SCHEMES[index], 2, 256)
        for tile in PREFILL_SWEEP if options.sweep else [tile_for(inputs[0], inputs[1])]:
            if SCHEMES[index] == "none" or tile.key_blocks == 1:
                with suppress(Exception):
                    prefill_run(inputs, tile)
    torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["check", "decode", "fused", "rope", "prefill", []])
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    parts = options.parts or ["check", "decode", "fused", "rope", "prefill"]
    begin = time.time()
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(warm_share, [(i, workers, options) for i in range(workers)], chunksize=1)
    say(op="setup", seconds=time.time() - begin, device=torch.cuda.get_device_name(), torch=torch.__version__)
    torch.manual_seed(0)
    for part in parts:
        if part in ("decode", "fused"):
            run_decode({"decode": decode, "fused": fused}[part](options))
        else:
            {"check": check, "rope": rope, "prefill": prefill}[part](options)
    say(op="total", seconds=time.time() - begin)


if __name__ == "__main__":
    main()
