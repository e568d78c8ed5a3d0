"""The quantization tutorial as one script: on the bundled model, offline, on a CPU, in a few minutes.

`python examples/quantization_tutorial.py [--dir DIR] [--questions 200]`

It runs the commands that a user would type (they are printed), chats with each result, and ends with a table of
memory, speed, perplexity and accuracy: 16 bit, KV int8, int4 weights, both, and transformers.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from pagoda.config import EngineConfig
from pagoda.models.find import resolve_model
from pagoda.quantize.evaluate import REPLY_TOKENS, Evaluator
from pagoda.quantize.mini_tasks import held_out_dialogues, overall, questions, score
from pagoda.text.template import load_template
from pagoda.text.tokenizer import load_tokenizer

SESSIONS, LENGTH, DIALOGUES = 8, 2048, 60
TYPED = "12+35\n\nWhat is the capital of France?\n\nexit\n\n"


class Row(NamedTuple):
    name: str
    weights_mib: float
    cache_kib: float  # of one token
    tokens_per_second: float
    perplexity: float
    accuracy: float

    def line(self) -> str:
        total = self.weights_mib + self.cache_kib * SESSIONS * LENGTH / 1024
        return (
            f"{self.name:<22}{self.weights_mib:>9.1f}{self.cache_kib:>10.2f}{total:>10.1f}"
            f"{self.tokens_per_second:>9.0f}{self.perplexity:>12.4f}{self.accuracy:>10.1%}"
        )


HEADER = (
    f"{'':<22}{'weights':>9}{'cache':>10}{'memory':>10}{'speed':>9}{'perplexity':>12}{'accuracy':>10}\n"
    f"{'':<22}{'MiB':>9}{'KiB/token':>10}{'MiB':>10}{'tokens/s':>9}{'dialogues':>12}{'mini':>10}"
)


def pagoda(*words: str, typed: str | None = None) -> None:
    """Run one command as a user does."""
    print(f"\n$ lmdeploy {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "pagoda.cli.main", *words], input=typed, text=True, check=True)


def set_policy(workspace: Path, policy: str) -> None:
    """Edit `engine.toml`, as with an editor."""
    file = workspace / "engine.toml"
    print(f'\n$ edit {file}: quant_policy = "{policy}"')
    file.write_text(re.sub(r"(?m)^#?\s*quant_policy\s*=.*$", f'quant_policy = "{policy}"', file.read_text()))


def walk(folder: Path) -> None:
    """The tutorial's commands."""
    stats, awq, w16, w4 = (str(folder / name) for name in ("stats", "awq", "workspace", "workspace-w4"))
    calib = ("--calib_samples", "32", "--calib_seqlen", "512", "--device", "cpu")
    pagoda("convert", "mini", "--dst_path", w16)
    pagoda("chat", "turbomind", w16, typed=TYPED)
    pagoda("lite", "calibrate", "--model", "mini", *calib, "--work_dir", stats)
    pagoda("lite", "kv_qparams", "--work_dir", stats, "--turbomind_dir", w16, "--kv_sym", "False", "--num_tp", "1")
    set_policy(Path(w16), "int8")
    pagoda("chat", "turbomind", w16, typed=TYPED)
    pagoda("lite", "auto_awq", "--model", "mini", "--w_bits", "4", "--w_group_size", "128", *calib, "--work_dir", awq)
    pagoda("convert", awq, "--model-format", "awq", "--group-size", "128", "--dst_path", w4)
    pagoda("chat", "turbomind", w4, typed=TYPED)
    set_policy(Path(w4), "int8")
    pagoda("chat", "turbomind", w4, typed=TYPED)


def measure(name: str, model: Path | str, policy: str, num_questions: int) -> Row:
    """One setting through the engine; the argument wins over `engine.toml`, where it says something."""
    folder = resolve_model(str(model))
    weights = sum(p.stat().st_size for p in folder.rglob("*.safetensors") if "kv-ranges" not in p.name)
    if (folder / "engine.toml").exists():
        set_policy(folder, policy)
    with Evaluator(model, EngineConfig(device="cpu", quant_policy=policy, max_batch_size=32)) as evaluator:
        answers = evaluator.answer(num_questions)
        perplexity, speed = evaluator.dialogues(DIALOGUES).perplexity, evaluator.speed()
        return Row(name, weights / 2**20, evaluator.cache_bytes() / 1024, speed, perplexity, answers.accuracy)


@torch.no_grad()
def measure_transformers(num_questions: int) -> Row:
    """The same questions and texts on transformers."""
    folder = resolve_model("mini")
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, None, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    end = tokenizer.eos_ids[-1]

    def generate(prompts: list[list[int]], **how) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(ids, attention_mask=mask, do_sample=False, top_k=None, top_p=None, temperature=None, **how)
        return out[:, width:].tolist()

    def answer(asked: list) -> list[str]:
        prompts = [tokenizer.encode(template.render(messages)) for messages in asked]
        order, replies = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
        for start in range(0, len(order), 32):
            some = order[start : start + 32]
            outs = generate([prompts[i] for i in some], max_new_tokens=REPLY_TOKENS)
            for i, ids in zip(some, outs):
                stops = [ids.index(e) for e in tokenizer.eos_ids if e in ids]
                replies[i] = tokenizer.decode(ids[: min(stops, default=len(ids))])
        return replies

    asked = questions(0, num_questions)
    accuracy = overall(score(asked, answer([q.messages for q in asked]))).accuracy
    nll = tokens = 0
    for messages in held_out_dialogues(0, DIALOGUES):
        ids = torch.tensor([[end, *tokenizer.encode(template.render(messages, add_generation_prompt=False))]])[
            :, :LENGTH
        ]
        logprob = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
        nll, tokens = nll - float(logprob.sum()), tokens + logprob.numel()
    started = time.monotonic()
    generate([[(7 * i + 11 * r) % 6144 for i in range(64)] for r in range(8)], max_new_tokens=64, min_new_tokens=64)
    speed = 8 * 64 / (time.monotonic() - started)
    c = model.config
    cache = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim / 1024
    weights = (folder / "model.safetensors").stat().st_size / 2**20
    return Row("transformers", weights, cache, speed, float(torch.tensor(nll / tokens).exp()), accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="where results stay; default: a temporary folder")
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        walk(folder)
        rows = [
            measure("16 bit", "mini", "none", args.questions),
            measure("KV int8 (calibrated)", folder / "workspace", "int8", args.questions),
            measure("int4 weights", folder / "workspace-w4", "none", args.questions),
            measure("int4 weights, KV int8", folder / "workspace-w4", "int8", args.questions),
            measure_transformers(args.questions),
        ]
    print(f"\nmini on a CPU; memory: weights and the cache of {SESSIONS} sessions of {LENGTH} tokens\n\n{HEADER}")
    print("\n".join(row.line() for row in rows))
    print(f"\n{args.questions} questions, {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
