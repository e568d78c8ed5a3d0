"""Fixtures of the text room: reference tokenizers, and a tokenizer of plain bytes."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from pagoda.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_at(shared_data: Path) -> Callable[[str], Tokenizer]:
    """`tokenizer_at("qwen3")`: the tokenizer of a folder below `tokenizers/`, loaded once."""
    return lru_cache(maxsize=None)(lambda name: load_tokenizer(shared_data / "tokenizers" / name))


class ByteTokenizer(Tokenizer):
    """Every byte is a token; 256 is the end, 257 a special `<|im_end|>`."""

    vocab_size = 258
    eos_ids = (256,)
    special_ids = frozenset({256, 257})

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        return list(text.encode())

    def _bytes_of(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else {256: b"</s>", 257: b"<|im_end|>"}[token_id]

    def id_of(self, token: str) -> int | None:
        return {"</s>": 256, "<|im_end|>": 257}.get(token)

    def token_str(self, token_id: int) -> str:
        return self._bytes_of(token_id).decode("latin-1")


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return ByteTokenizer()
