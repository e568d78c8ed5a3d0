"""Text to calibrate with, as token sequences of one length: built in, or any local txt, json, jsonl or parquet file.

The built-in text is conversations and stories of mini's world, in the model's own chat template where it has one, and
sentences of many kinds (`calibration.txt`). Its seeds are neither those of training nor those of evaluation.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from pagoda.errors import MissingExtraError, TemplateError, UsageError
from pagoda.quantize.mini_tasks import dialogue, story
from pagoda.text.template import ChatTemplate, load_template
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

BUILT_IN = "builtin"
TEXT_FIELDS = ("text", "content", "prompt", "instruction", "input", "question", "output", "response", "answer")
TALK_FIELDS = ("messages", "conversations", "conversation")


def calibration_ids(text_folder: Path, source: str, num: int, length: int) -> Tensor:
    """int64 [S, L]: at most `num` sequences of `length` tokens, each behind the begin-of-sequence token where the model
    has one. `source`: `builtin`, or a file's path. Short texts give fewer sequences; `UsageError` for none."""
    tokenizer = load_tokenizer(text_folder)
    try:
        template = load_template(text_folder, None, tokenizer)
    except TemplateError:
        template = None
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = length - len(begin)
    ids: list[int] = []
    for text in _texts(source, template):
        ids += [*tokenizer.encode(text), *_end(tokenizer)]
        if source == BUILT_IN and len(ids) >= num * room:
            break
    count = min(num, len(ids) // room)
    if count == 0:
        raise UsageError(f"{source} has {len(ids)} tokens, less than one sequence of {room}: lower the length.")
    step = (len(ids) - room) // max(count - 1, 1) if count > 1 else 0  # spread over the whole text
    starts = [i * step for i in range(count)]
    Random("order").shuffle(starts)
    return torch.tensor([begin + ids[start : start + room] for start in starts])


def _end(tokenizer: Tokenizer) -> list[int]:
    """What stands between documents: the last end-of-sequence token (`<|endoftext|>` in most models)."""
    return list(tokenizer.eos_ids[-1:])


def _texts(source: str, template: ChatTemplate | None) -> Iterator[str]:
    if source == BUILT_IN:
        yield from _built_in(template)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UsageError(f"{source} is not a file: give a local txt, json, jsonl or parquet file, or {BUILT_IN}.")
    try:
        if path.suffix == ".parquet":
            rows = _parquet_rows(path)
        elif path.suffix in (".jsonl", ".json"):
            content = path.read_text(encoding="utf-8")
            rows = json.loads(content) if path.suffix == ".json" else map(json.loads, content.splitlines())
        else:
            yield path.read_text(encoding="utf-8")
            return
        yield from filter(None, (_row_text(row, template) for row in rows))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): give a UTF-8 txt, json, jsonl or parquet file.") from None


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("Reading parquet files needs pyarrow: pip install pyarrow, or give jsonl.") from None
    return pyarrow.parquet.read_table(path).to_pylist()


def _row_text(row: Any, template: ChatTemplate | None) -> str:
    """One document of a row: its conversation, or its text fields one below the other."""
    if not isinstance(row, dict):
        return row if isinstance(row, str) else ""
    for field in TALK_FIELDS:
        if isinstance(row.get(field), list):
            turns = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in row[field]]
            roles = {"human": "user", "gpt": "assistant"}
            return _conversation([{"role": roles.get(r, r), "content": str(c)} for r, c in turns], template)
    return "\n".join(str(row[field]) for field in TEXT_FIELDS if isinstance(row.get(field), str))


def _conversation(messages: list[dict[str, Any]], template: ChatTemplate | None) -> str:
    if template is not None:
        try:
            return template.render(messages, add_generation_prompt=False)
        except TemplateError:
            pass  # a template without system or tool turns
    return "\n\n".join(str(m["content"]) for m in messages)


def _built_in(template: ChatTemplate | None) -> Iterator[str]:
    """Endless: conversations, a story in eight, a paragraph of the sentences in six."""
    sentences = Path(__file__).with_name("calibration.txt").read_text(encoding="utf-8").splitlines()
    rng = Random("calibrate")
    while True:
        dice = rng.random()
        if dice < 0.12:
            yield story(rng)
        elif dice < 0.28:
            yield "\n".join(rng.sample(sentences, 6))
        else:
            yield _conversation(dialogue(rng), template)
