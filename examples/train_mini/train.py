"""Train Pagoda mini from nothing (on one GPU; on a CPU as a tiny trial).

`python examples/train_mini/train.py --out DIR --minutes 7`

The clock is the schedule: rates rise, hold and fall to zero within --minutes, start-up and evaluation included.
A usable model folder stands in --out from the first checkpoint on; --resume continues from the state in --state.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from evaluate import answerer, load_weights, table
from model import Model, export
from optimizer import Optimizer
from rows import SHARD_ROWS, Rows

from pagoda.quantize.mini_tasks import overall, questions, score

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
WARM_UP, FALL = 0.02, 0.7  # shares of the schedule: rise at its start, linear fall to zero at its end
SYNC_STEPS = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0, help="wall clock of the whole command")
    parser.add_argument("--reserve", type=float, default=40.0, help="seconds of it kept for the last evaluation")
    parser.add_argument(
        "--folder", type=Path, default=Path("src/pagoda/mini"), help="tokenizer, template and configuration"
    )
    parser.add_argument("--state", type=Path, default=Path("build/train_mini/state.pt"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=48, help="rows a step")
    parser.add_argument("--row_len", type=int, default=2048)
    parser.add_argument("--shard_rows", type=int, default=SHARD_ROWS)
    parser.add_argument("--shards", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--lr_matrix", type=float, default=0.02)
    parser.add_argument("--lr_rest", type=float, default=0.003)
    parser.add_argument("--checkpoint", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument("--questions", type=int, default=5100)
    parser.add_argument("--quick", type=int, default=170, help="questions at each checkpoint")
    parser.add_argument("--eval_batch", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="do not try torch.compile")
    return parser.parse_args()


def rate(progress: float) -> float:
    """Share of the learning rate at `progress` (0..1) of the schedule."""
    return max(0.0, min(progress / WARM_UP, 1.0, (1.0 - progress) / FALL))


def compiled_loss(model: Model, rows: Rows, args: argparse.Namespace):
    """The loss as a compiled function, tried once forward and backward; eager, said aloud, where that fails."""
    batch = rows.batch(args.batch)
    if not args.eager:
        try:
            started = time.monotonic()
            loss = torch.compile(model.loss, dynamic=False)
            loss(*batch)[0].backward()
            model.zero_grad(set_to_none=True)
            print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
            return loss
        except Exception as error:
            print(
                f"!!! torch.compile FAILED, training runs EAGER: {type(error).__name__}: {str(error)[:600]}", flush=True
            )
            model.zero_grad(set_to_none=True)
    model.loss(*batch)[0].backward()
    model.zero_grad(set_to_none=True)
    return model.loss


def save(model: Model, args: argparse.Namespace, optimizer: Optimizer, log: dict) -> None:
    """Weights and log to --out, what a resumed run needs to --state; each file appears whole or not at all."""
    args.state.parent.mkdir(parents=True, exist_ok=True)
    part = args.out / "model.safetensors.part"
    save_file(export(model), part, metadata={"format": "pt"})
    os.replace(part, args.out / "model.safetensors")
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    part = args.state.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}, part)
    os.replace(part, args.state)


def measure(model: Model, tokenizer: Tokenizer, num: int, batch: int, seed: int):
    asked = questions(seed, num)
    return score(asked, answerer(model, tokenizer, batch)([q.messages for q in asked]))


def train(
    model: Model,
    optimizer: Optimizer,
    rows: Rows,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    log: dict,
    deadline: float,
) -> None:
    """Step until `deadline` (monotonic seconds); the rates follow the clock, read whenever the device is waited for."""
    loss_of = compiled_loss(model, rows, args)
    begun = last_save = time.monotonic()
    step, tokens, spent = log.get("steps", 0), log.get("tokens", 0), log.get("seconds", 0.0)
    first = tokens
    while time.monotonic() < deadline:
        scale = rate((time.monotonic() - begun) / (deadline - begun))
        for _ in range(SYNC_STEPS):
            loss, said = loss_of(*rows.batch(args.batch))
            loss.backward()
            optimizer.step(scale)
        step, tokens = step + SYNC_STEPS, tokens + SYNC_STEPS * args.batch * args.row_len
        value = float(said)  # waits for the device
        now = time.monotonic()
        rows.take_ready()
        if step % (10 * SYNC_STEPS) == 0 or step == SYNC_STEPS:
            speed = (tokens - first) / (now - begun)
            print(
                f"step {step} {now - begun:.0f} s loss {value:.4f} rate {scale:.3f} {speed / 1e6:.2f} M tokens/s",
                flush=True,
            )
            log["curve"].append([step, round(now - begun, 1), round(value, 4)])
        if now - last_save > args.checkpoint:
            log |= {"steps": step, "tokens": tokens, "seconds": spent + now - begun}
            save(model, args, optimizer, log)
            quick = overall(measure(model, tokenizer, args.quick, args.eval_batch, seed=99))
            print(
                f"checkpoint at step {step}: {quick.num_right} of {quick.num_asked} quick questions right", flush=True
            )
            last_save = time.monotonic()
    seconds = spent + time.monotonic() - begun
    log |= {
        "steps": step,
        "tokens": tokens,
        "seconds": seconds,
        "loss": value,
        "distinct_rows": rows.used,
        "repeated_rows": rows.repeated,
    }


def main() -> None:
    started = time.monotonic()
    args = arguments()
    rows = Rows(
        args.folder,
        args.seed,
        args.row_len,
        args.shards,
        args.workers,
        first_shard=10**6 * args.resume,
        shard_rows=args.shard_rows,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    model = Model(
        json.loads((args.folder / "config.json").read_text()),
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    model.to(device)
    optimizer = Optimizer(model, args.lr_matrix, args.lr_rest)
    log = {
        "curve": [],
        "command": " ".join(["python", *sys.argv]).replace(str(args.out), "DIR"),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    log["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log["torch"] = str(torch.__version__)
    if args.resume:
        state = torch.load(args.state, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = {**state["log"], "resumed": True}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        shutil.copyfile(args.folder / name, args.out / name)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    rows.allocate(device)
    rows.take_ready(wait=True)
    waited = time.monotonic() - started
    print(f"{log['parameters']} parameters on {log['device']}, {rows.filled} rows after {waited:.0f} s", flush=True)
    try:
        train(model, optimizer, rows, tokenizer, args, log, started + 60 * args.minutes - args.reserve)
    finally:
        rows.close()
    save(model, args, optimizer, log)
    load_weights(model, args.out)
    scores = measure(model, tokenizer, args.questions, args.eval_batch, seed=0)
    print(table(scores))
    log["accuracy"] = {s.task: [s.num_right, s.num_asked] for s in scores}
    log["total_seconds"] = round(time.monotonic() - started, 1)
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(
        f"{log['tokens'] / 1e6:.0f} M tokens in {log['steps']} steps, {log['total_seconds']:.0f} s in all", flush=True
    )


if __name__ == "__main__":
    main()
