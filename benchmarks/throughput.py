"""The race on one GPU: workloads W1 to W4 and W6 of a model shape with random weights, through the whole engine.

    python benchmarks/throughput.py --shape A --workloads W1,W2,W3,W4,W6 [--weight-format int4] [--quant-policy int8]

Prints one JSON line a result: figure, unit, the physical limit by arithmetic (of an H200 where the device's own rates
are not known) and the share of it that is reached.
Token ids in and out, greedy, end of sequence ignored, medians of repeated runs after a warm-up.
"""

import argparse
import gc
import random
import statistics
import time
from pathlib import Path

from pagoda.cli.bench_record import Record, device_name
from pagoda.config import EngineConfig
from pagoda.engine.client import EngineClient, start_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.models.limits import CEILINGS, Limits, ceiling_of
from pagoda.models.spec import read_spec

HERE = Path(__file__).parent
SHAPES = {"A": "llama-3.1-8b", "B": "qwen3-0.6b", "C": "llama-3.1-70b"}


def ask(engine: EngineClient, jobs: list[tuple[list[int], int]]) -> tuple[float, list[list[float]]]:
    """Run all jobs (prompt ids, tokens to generate) at once. Wall time, and each job's token arrival times."""
    engine.call("ping")
    started = time.monotonic()
    tickets = [
        engine.submit(
            EngineRequest(
                f"{started}-{i}", ids, SamplingParams(temperature=0.0, max_tokens=n), arrival=time.monotonic()
            )
        )
        for i, (ids, n) in enumerate(jobs)
    ]
    times = []
    for ticket, (_, n) in zip(tickets, jobs, strict=True):
        arrivals = []
        for output in ticket:
            arrivals += [output.time - started] * len(output.token_ids)
            assert output.error is None, output.error
        assert len(arrivals) == n
        times.append(arrivals)
    return max(at[-1] for at in times), times


def fresh(rng: random.Random, n: int) -> list[int]:
    return [rng.randint(0, 10000) for _ in range(n)]


class Race:
    def __init__(self, engine: EngineClient, limits: Limits, record: Record):
        self.engine, self.limits, self.say, self.rng = engine, limits, record.say, random.Random(1)

    def w1(self) -> None:
        rates, firsts = [], []
        for _ in range(4):
            _, [at] = ask(self.engine, [(fresh(self.rng, 128), 256)])
            rates.append(255 / (at[-1] - at[0]))
            firsts.append(at[0] * 1e3)
        self.say("W1", statistics.median(rates[1:]), "tok/s", 1 / self.limits.decode(1, 256))
        self.say("W1 first token", statistics.median(firsts[1:]), "ms")

    def w2(self) -> None:
        rng = random.Random(0)
        prompts = []
        for _ in range(256):
            n = rng.randint(100, 1024)
            prompts.append([rng.randint(0, 10000) for _ in range(n)])
        outs = [rng.randint(100, 1024) for _ in range(256)]
        limit = self.limits.run([(len(p), n) for p, n in zip(prompts, outs, strict=True)])
        rates = []
        for turn in range(2):
            shifted = [[(t + 7919 * turn) % 10001 for t in p] for p in prompts]
            wall, _ = ask(self.engine, list(zip(shifted, outs, strict=True)))
            rates.append(sum(outs) / wall)
        self.say("W2", rates[-1], "tok/s", sum(outs) / limit, first_run=round(rates[0], 1))

    def w3(self) -> None:
        rates = []
        for _ in range(3):
            wall, _ = ask(self.engine, [(fresh(self.rng, 4096), 1) for _ in range(16)])
            rates.append(16 * 4096 / wall)
        self.say("W3", statistics.median(rates[1:]), "tok/s", 16 * 4096 / self.limits.prefill([4096] * 16))

    def w4(self, batch: int) -> None:
        rates = []
        for _ in range(3):
            _, times = ask(self.engine, [(fresh(self.rng, 512), 128) for _ in range(batch)])
            begin = max(at[0] for at in times)
            tokens = sum(sum(t > begin for t in at) for at in times)
            rates.append(tokens / (max(at[-1] for at in times) - begin))
        self.say(f"W4 batch {batch}", statistics.median(rates[1:]), "tok/s", batch / self.limits.decode(batch, 576))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W6")
    parser.add_argument("--weight-format", default="auto")
    parser.add_argument("--quant-policy", default="none")
    parser.add_argument("--workspace", type=Path, help="take the weights from this workspace of the shape (W6)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--prefill-tokens", type=int, default=8192)
    parser.add_argument("--no-graph", action="store_true")
    args = parser.parse_args()
    config = EngineConfig(
        session_len=4352,
        max_batch_size=256,
        load_format="safetensors" if args.workspace else "dummy",
        weight_format=args.weight_format,
        quant_policy=args.quant_policy,
        tp=args.tp,
        max_prefill_token_num=args.prefill_tokens,
        cuda_graph=not args.no_graph,
    )
    folder = HERE / "shapes" / SHAPES[args.shape]
    device = device_name(config.device)
    limits = Limits(read_spec(folder, config), config, ceiling_of(device) or CEILINGS["H200"])
    record = Record({"shape": args.shape, "weights": args.weight_format, "cache": args.quant_policy, "device": device})
    started = time.perf_counter()
    with start_engine(args.workspace or folder, config) as engine:
        ready = time.perf_counter() - started
        gc.collect()
        gc.freeze()  # as an engine in a process of its own does
        print("\n".join(engine.info.report), flush=True)
        race = Race(engine, limits, record)
        for workload in args.workloads.split(","):
            if workload == "W1":
                race.w1()
            elif workload == "W2":
                race.w2()
            elif workload == "W3":
                race.w3()
            elif workload == "W4":
                race.w4(64)
                race.w4(256)
            elif workload == "W6":
                race.say(f"W6 {'workspace' if args.workspace else 'dummy weights'}, construct to ready", ready, "s")


if __name__ == "__main__":
    main()
