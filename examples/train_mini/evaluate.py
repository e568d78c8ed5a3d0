"""Exact match of a trained folder by task, in plain PyTorch.

`python examples/train_mini/evaluate.py FOLDER --questions 1000`

`pagoda eval mini --task mini` asks the same questions of Pagoda's own engine.
"""

import argparse
import json
from pathlib import Path

import torch
from documents import END, TURN_END, render
from model import Cache, Model
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pagoda.quantize.mini_tasks import TaskScore, overall, questions, score

MAX_NEW = 160


def load_weights(model: Model, folder: Path) -> None:
    """Fill a model from exported tensors (bf16 values)."""
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        model.embed_VC.copy_(tensors["model.embed_tokens.weight"])
        model.norm.copy_(tensors["model.norm.weight"])
        for i in range(model.config["num_hidden_layers"]):
            at = f"model.layers.{i}."
            model.attention_norm[i] = tensors[at + "input_layernorm.weight"]
            model.ffn_norm[i] = tensors[at + "post_attention_layernorm.weight"]
            model.w_qkv[i] = torch.cat([tensors[f"{at}self_attn.{p}_proj.weight"] for p in "qkv"])
            model.w_o[i] = tensors[at + "self_attn.o_proj.weight"]
            model.w_gate_up[i] = torch.cat([tensors[f"{at}mlp.{p}_proj.weight"] for p in ("gate", "up")])
            model.w_down[i] = tensors[at + "mlp.down_proj.weight"]


@torch.no_grad()
def generate(model: Model, prompts: list[list[int]], max_new: int = MAX_NEW) -> list[list[int]]:
    """Greedy replies to left-padded prompts; a reply ends before <|im_end|>."""
    device, dtype, config = model.embed_VC.device, model.compute, model.config
    longest, b = max(map(len, prompts)), len(prompts)
    token = torch.full((b, longest), END)
    for row, ids in enumerate(prompts):
        token[row, longest - len(ids) :] = torch.tensor(ids)
    pad = torch.tensor([longest - len(ids) for ids in prompts], device=device)[:, None]
    size = longest + max_new
    shape = (config["num_hidden_layers"], b, config["num_key_value_heads"], size, config["head_dim"])
    place = torch.arange(size, device=device)[None]
    cache = Cache(
        torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device), place >= pad
    )
    position = (place - pad).clamp(0, config["max_position_embeddings"] - 1)
    token, done, out = token.to(device), torch.zeros(b, dtype=torch.bool, device=device), []
    past = 0
    for step in range(max_new):
        x = model.hidden(token, position[:, past : past + token.size(1)], cache, past)
        past += token.size(1)
        token = (x[:, -1].float() @ model.embed_VC.T).argmax(-1, keepdim=True)
        done |= (token[:, 0] == TURN_END) | (token[:, 0] == END)
        out.append(torch.where(done, TURN_END, token[:, 0]))
        if step % 8 == 7 and bool(done.all()):
            break
    rows = torch.stack(out, 1).tolist()
    return [row[: row.index(TURN_END)] if TURN_END in row else row for row in rows]


def answerer(model: Model, tokenizer: Tokenizer, batch: int):
    """The callable that `score` wants: replies to message lists, similar lengths batched together."""

    def answer(asked: list) -> list[str]:
        limit = model.config["max_position_embeddings"] - MAX_NEW
        prompts = [e.ids[-limit:] for e in tokenizer.encode_batch_fast([render(messages, True) for messages in asked])]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies = [""] * len(prompts)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for i, ids in zip(chosen, generate(model, [prompts[i] for i in chosen])):
                replies[i] = tokenizer.decode(ids)
        return replies

    return answer


def table(scores: list[TaskScore]) -> str:
    lines = [f"{'task':<12} {'asked':>6} {'right':>6} {'accuracy':>9}   95% interval"]
    for s in [*scores, overall(scores)]:
        low, high = s.interval
        lines.append(f"{s.task:<12} {s.num_asked:>6} {s.num_right:>6} {s.accuracy:>8.2%}   {low:.2%} .. {high:.2%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--ask", help="ask this instead, and print the reply")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    model = Model(json.loads((args.folder / "config.json").read_text()), compute).to(device)
    load_weights(model, args.folder)
    answer = answerer(model, Tokenizer.from_file(str(args.folder / "tokenizer.json")), args.batch)
    if args.ask:
        print(answer([[{"role": "user", "content": args.ask}]])[0])
        return
    asked = questions(args.seed, args.questions)
    print(table(score(asked, answer([q.messages for q in asked]))))


if __name__ == "__main__":
    main()
