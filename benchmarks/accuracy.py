"""What every setting costs mini: exact match on paired questions, beside bf16. One JSON line a setting, as it is done.

    python benchmarks/accuracy.py [--questions 10000] [--workers 6] [--settings awq-128 kv-int4 ...]

A setting is quantized and asked in a process of its own, `--workers` of them at once. `lost`: points of exact match
against bf16 on the same questions, with half the width of the 95% interval; `limit`: what may be lost.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from pagoda.cli.bench_record import device_name
from pagoda.config import EngineConfig
from pagoda.quantize.evaluate import Evaluator, paired_loss
from pagoda.quantize.produce import Calibration, Source, quantize_model
from pagoda.quantize.recipe import Recipe

BLOCKS = 4096  # of every process's cache


class Setting(NamedTuple):
    recipe: Recipe | None = None
    policy: str = "none"
    limit: float | None = None


SETTINGS = {
    "bf16": Setting(),
    "awq-128": Setting(Recipe("awq", 128), limit=1.0),
    "awq-32": Setting(Recipe("awq", 32), limit=0.5),
    "rtn-128": Setting(Recipe("rtn", 128)),
    "rtn-32": Setting(Recipe("rtn", 32)),
    "gptq-128": Setting(Recipe("gptq", 128)),
    "awq-gptq-128": Setting(Recipe("awq-gptq", 128)),
    "smooth-w8a8": Setting(Recipe("smooth"), limit=0.3),
    "fp8": Setting(Recipe("fp8"), limit=0.3),
    "kv-int8": Setting(policy="int8", limit=0.2),
    "kv-int4": Setting(policy="int4", limit=1.5),
    "kv-fp8": Setting(policy="fp8"),
}


def ask(name: str, num: int, seed: int, scored: int, device: str, threads: int | None) -> dict[str, Any]:
    """One setting's answers, and perplexities."""
    started, setting, model = time.monotonic(), SETTINGS[name], "mini"
    with tempfile.TemporaryDirectory() as folder:
        if setting.recipe is not None:
            model = str(Path(folder) / "out")
            quantize_model(Source("mini", Calibration(device=device)), Path(model), setting.recipe)
        made = time.monotonic() - started
        config = EngineConfig(
            device=device, quant_policy=setting.policy, max_batch_size=256, cache_max_entry_count=BLOCKS,
            cuda_graph=False, num_threads=threads,
        )  # fmt: skip
        with Evaluator(model, config) as evaluator:
            answers = evaluator.answer(num, seed)
            return {
                "right": answers.right,
                "answer_perplexity": round(evaluator.right_answers(min(num, scored), seed).perplexity, 6),
                "quantize_s": round(made, 1),
                "answer_s": round(answers.seconds, 1),
                "seconds": round(time.monotonic() - started, 1),
            }


def line(name: str, found: dict[str, Any], reference: list[bool], args: argparse.Namespace) -> dict[str, Any]:
    right, limit = found.pop("right"), SETTINGS[name].limit
    lost, half = paired_loss(reference, right)
    return {
        "benchmark": "accuracy", "device": args.name, "setting": name, "questions": len(right), "seed": args.seed,
        "exact_match": 100 * sum(right) / len(right), "lost": round(lost, 3), "half_width": round(half, 3),
        "limit": limit, "holds": limit is None or lost <= limit, **found,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scored", type=int, default=4000, help="questions for the perplexity of right answers")
    parser.add_argument("--settings", nargs="+", choices=[s for s in SETTINGS if s != "bf16"], default=None)
    parser.add_argument("--workers", type=int, default=6, help="settings at once")
    parser.add_argument("--threads", type=int, help="CPU threads of each engine")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.name = device_name(args.device)
    names = ["bf16", *(args.settings or [s for s in SETTINGS if s != "bf16"])]
    holds, waiting, reference = True, [], None
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(ask, n, args.questions, args.seed, args.scored, args.device, args.threads): n for n in names
        }
        for job in as_completed(jobs):
            waiting.append((jobs[job], job.result()))
            if jobs[job] == "bf16":
                reference = waiting[-1][1]["right"]
            while reference is not None and waiting:
                row = line(*waiting.pop(0), reference, args)
                holds &= row["holds"]
                print(json.dumps(row), flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
