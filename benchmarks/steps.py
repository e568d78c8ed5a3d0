"""Single steps of a model shape with random weights, as the engine launches them: device time, and of which kernels.

    python benchmarks/steps.py --shape A --decode 1x256 64x576 256x576 --prefill 1x128 4x4096 [--profile]

`RxC`: R rows that each have C tokens in the cache (decode), or R whole prompts of C tokens (prefill). Prints one JSON
line a step: milliseconds (median of repeated replays of its CUDA graph; a prefill is launched kernel by kernel where
the engine would do so) and the limit by arithmetic. With --profile the kernels follow, microseconds a step and how
many; kernels that start early overlap, so that their sum may exceed the step.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pagoda.cli.bench_record import Record, device_name
from pagoda.config import EngineConfig
from pagoda.engine.batch import DeviceBatch
from pagoda.engine.request import SamplingParams
from pagoda.engine.runner import DecodeKey, Runner
from pagoda.engine.sampler import SampleFlags
from pagoda.engine.schedule import Row, Schedule, SlotInit
from pagoda.layers.parallel import Group
from pagoda.models.limits import CEILINGS, Limits, ceiling_of
from pagoda.models.loader import resolve_spec

HERE = Path(__file__).parent
SHAPES = {"A": "llama-3.1-8b", "B": "qwen3-0.6b", "C": "llama-3.1-70b"}
Step = Callable[[], None]


def make_runner(shape: str, **config) -> Runner:
    folder = HERE / "shapes" / SHAPES[shape]
    wanted = EngineConfig(session_len=4352, max_batch_size=256, load_format="dummy", device="cuda", **config)
    spec, wanted = resolve_spec(folder, wanted)
    runner = Runner(folder, spec, wanted, Group.single())
    runner.start()
    return runner


def give_blocks(batch: DeviceBatch, rows: int, tokens: int) -> int:
    """Blocks of their own for the first slots; how many each has."""
    num = -(-tokens // batch.block_len)
    blocks = torch.arange(1, 1 + rows * num, device=batch.device, dtype=torch.int32)
    batch.block_table_SB[:rows, :num] = blocks.view(rows, num)
    return num


def decode_step(runner: Runner, rows: int, context: int) -> Step:
    """A greedy step of `rows` rows as a graph. Lengths grow by one a step and are set back at every call."""
    batch = runner.batch
    num = give_blocks(batch, rows, context + 64)
    width = min(batch.block_table_SB.shape[1], max(8, 1 << (num - 1).bit_length()))
    slot_R = torch.arange(rows, device=batch.device)
    key = DecodeKey(rows, width, SampleFlags())
    batch.kv_len_S[:rows] = context
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(2):
            runner._decode(slot_R, key)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        runner._decode(slot_R, key)
    batch.kv_len_S[:rows] = context
    return graph.replay


def prefill_step(runner: Runner, rows: int, tokens: int) -> Step:
    """Whole prompts, launched and collected as the engine does it."""
    num = -(-tokens // runner.batch.block_len)
    ids = np.random.default_rng(0).integers(0, 10000, (rows, tokens)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1)
    inits = [SlotInit(slot, f"{slot}", params, 0, ids[slot], tokens, tokens) for slot in range(rows)]
    updates = [(slot, i, 1 + slot * num + i) for slot in range(rows) for i in range(num)]
    runner.batch.apply(Schedule(0, [], inits, updates))
    runner._inits.update((init.slot, init) for init in inits)
    runner.state.set_slots(inits)

    def step() -> None:
        runner.launch(Schedule(0, [Row(slot, 0, tokens, ids[slot]) for slot in range(rows)]))
        runner.collect()

    return step


def milliseconds(step: Step, warm: int, turns: int, many: int) -> float:
    for _ in range(warm):
        step()
    times = []
    for _ in range(turns):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(many):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / many)
    return statistics.median(times)


def print_kernels(step: Step, many: int, most: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(many):
            step()
        torch.cuda.synchronize()
    rows = sorted(
        ((k.self_device_time_total / many, k.count / many, k.key) for k in profiler.key_averages()), reverse=True
    )
    for us, count, name in rows[:most]:
        print(f"{us:10.1f} us {count:7.1f} x {us / max(count, 1e-9):8.2f} us  {name[:100]}", flush=True)


def shape_of(text: str) -> tuple[int, int]:
    rows, tokens = text.split("x")
    return int(rows), int(tokens)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--decode", nargs="*", type=shape_of, default=[(1, 256), (64, 576), (256, 576)])
    parser.add_argument("--prefill", nargs="*", type=shape_of, default=[])
    parser.add_argument("--weight-format", default="auto")
    parser.add_argument("--quant-policy", default="none")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    runner = make_runner(args.shape, weight_format=args.weight_format, quant_policy=args.quant_policy)
    device = device_name("cuda")
    limits = Limits(runner.spec, runner.config, ceiling_of(device) or CEILINGS["H200"])
    record = Record({"shape": args.shape, "weights": args.weight_format, "cache": args.quant_policy, "device": device})
    for rows, context in args.decode:
        step = decode_step(runner, rows, context)
        limit = limits.decode(rows, context) * 1e3
        ms = milliseconds(step, 3, 3, 15)
        record.say("decode step", ms, "ms", limit, rows=rows, context=context)
        if args.profile:
            print_kernels(step, 5, 16)
    for rows, tokens in args.prefill:
        step = prefill_step(runner, rows, tokens)
        limit = limits.prefill([tokens] * rows) * 1e3
        record.say("prefill step", milliseconds(step, 3, 3, 3), "ms", limit, rows=rows, context=tokens)
        if args.profile:
            print_kernels(step, 2, 16)
    runner.close()


if __name__ == "__main__":
    main()
