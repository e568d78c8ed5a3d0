"""What the engine's own loop costs a step: plan, digest and report over a device that answers at once.

    python benchmarks/host.py [--rows 256] [--steps 400]

Prints one JSON line: milliseconds of one core a decode step, as the median, the 99th percentile and the longest. The
device's step must be longer than that, or it waits for the host. Not in it: packing and launching a step's kernels.
"""

import argparse
import statistics
import time
from collections import deque

from pagoda.cli.bench_record import Record, device_name
from pagoda.engine import wire
from pagoda.engine.kv_cache import MemoryPlan
from pagoda.engine.process import EngineLoop, Grammars
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.engine.schedule import Schedule, StepResult
from pagoda.engine.scheduler import Scheduler
from pagoda.engine.scheduler_config import SchedulerConfig
from pagoda.models.find import resolve_model

SESSION_LEN, BLOCK_LEN = 4352, 64


class InstantDevice:
    """`Workers` without a model: every token is 5."""

    plan: MemoryPlan
    run_ahead = 1

    def __init__(self) -> None:
        self._flights: deque[int] = deque()

    def launch(self, schedule: Schedule, mask_LW=None) -> None:
        self._flights.append(sum(row.samples for row in schedule.rows))

    def collect(self) -> StepResult:
        return StepResult([5] * self._flights.popleft())

    def describe(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def measure(rows: int, steps: int) -> list[float]:
    """Seconds of each step of `rows` rows, from when all decode."""
    blocks = rows * (SESSION_LEN // BLOCK_LEN) + 1
    scheduler = Scheduler(SchedulerConfig(rows, 8192, BLOCK_LEN, blocks, SESSION_LEN, max_queued=rows))
    info = wire.EngineInfo("none", "none", SESSION_LEN, rows, BLOCK_LEN, blocks, 32000, [], rows, [])
    loop = EngineLoop(scheduler, InstantDevice(), info, Grammars(resolve_model("mini"), 32000))
    seconds: list[float] = []
    last, warm = 0.0, steps // 10

    def poll(timeout: float | None) -> list:
        nonlocal last
        now = time.perf_counter()
        if scheduler.num_running == rows:
            seconds.append(now - last)
            if len(seconds) > steps + warm:
                loop.stop()
        last = now
        if timeout == 0:
            return []
        params = SamplingParams(temperature=0.0, max_tokens=SESSION_LEN)
        return [(b"client", wire.Submit(EngineRequest(str(i), [i + 1] * 100, params))) for i in range(rows)]

    loop.connect(poll, lambda _sender, message: wire.encode(message))
    loop.run()
    return seconds[warm:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    ms = sorted(second * 1e3 for second in measure(args.rows, args.steps))
    more = {"p99": round(ms[int(len(ms) * 0.99)], 2), "longest": round(ms[-1], 2), "rows": args.rows}
    Record({"device": device_name("cpu", 1)}).say("host of a decode step", statistics.median(ms), "ms", **more)


if __name__ == "__main__":
    main()
