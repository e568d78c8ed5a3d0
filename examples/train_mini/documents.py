"""Training documents as text and as packed rows of token ids."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pagoda.quantize.mini_exchanges import Message
from pagoda.quantize.mini_tasks import training_documents

END, TURN_START, TURN_END = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>
TRAINED = 8192  # bit that marks a token whose prediction counts in full; ids stay below it


def render(messages: list[Message], add_generation_prompt: bool = False) -> str:
    """What chat_template.jinja renders (tests hold the two together)."""
    text = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        text.append(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return "".join(text) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _mark(ids: np.ndarray, assistant: int) -> np.ndarray:
    """int16 ids with the TRAINED bit on what the assistant says (up to its <|im_end|>), or on all of a plain text."""
    starts = np.flatnonzero(ids == TURN_START)
    if len(starts) == 0:
        return (ids | TRAINED).astype(np.int16)
    turn = np.cumsum(ids == TURN_START) - 1
    inside = (ids[starts + 1] == assistant)[turn]
    place = np.arange(len(ids))
    inside &= place >= starts[turn] + 3
    ends = np.flatnonzero(ids == TURN_END)
    inside &= place <= ends[turn]
    return np.where(inside, ids | TRAINED, ids).astype(np.int16)


def make_shard(folder: str, seed: int, num_rows: int, row_len: int, shard: int) -> np.ndarray:
    """int16 [num_rows, row_len + 1]: rows begin with a document; each ends with <|endoftext|>, the last is cut."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    assistant = tokenizer.token_to_id("assistant")
    documents = training_documents(seed, shard)
    rows = np.zeros((num_rows, row_len + 1), np.int16)
    row, place = 0, 0
    while True:
        batch = [next(documents) for _ in range(200)]
        texts = [document if isinstance(document, str) else render(document) for document in batch]
        for encoding in tokenizer.encode_batch_fast(texts):
            ids = _mark(np.array([*encoding.ids, END], np.int32), assistant)
            room = row_len + 1 - place
            rows[row, place : place + len(ids)] = ids[:room]
            place += len(ids)
            if place > row_len:
                row, place = row + 1, 0
            if row == num_rows:
                return rows
