"""Tokenizers kept as a tiktoken rank file: Llama 3's original `tokenizer.model`, Qwen's `qwen.tiktoken`."""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from pagoda.errors import TokenizerError
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.tokenizer_files import TokenizerFiles

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class RankFamily:
    """What a rank file leaves unsaid: how words are cut, and the special tokens that follow the ranks."""

    words: str
    specials: tuple[str, ...]
    bos: str | None
    eos: tuple[str, ...]
    adds_bos: bool


def _llama3() -> RankFamily:
    named = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    named += ["finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"]
    named += ["eom_id", "eot_id", "python_tag"]
    named += [f"reserved_special_token_{n}" for n in range(3, 256 - len(named) + 3)]
    specials = tuple(f"<|{n}|>" for n in named)
    ends = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    return RankFamily(_WORDS.format(digits="{1,3}"), specials, "<|begin_of_text|>", ends, True)


def _qwen() -> RankFamily:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
    return RankFamily(_WORDS.format(digits=""), specials, None, ("<|im_end|>", "<|endoftext|>"), False)


FAMILIES = {"tokenizer.model": _llama3(), "qwen.tiktoken": _qwen()}
"""By file name."""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, from lines `base64 rank`; `TokenizerError` when a line is something else."""
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise TokenizerError(f"{path} is damaged: take the file from the checkpoint anew.") from None


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by ranks; the special tokens follow the last rank."""

    def __init__(self, path: Path, files: TokenizerFiles):
        family = FAMILIES.get(path.name)
        if family is None:
            raise TokenizerError(f"{path} is a rank file of unknown family: known are {', '.join(FAMILIES)}.")
        ranks = read_ranks(path)
        self._specials = {t: len(ranks) + n for n, t in enumerate(family.specials)}
        self._specials |= {t.content: t.id for t in files.added.values()}
        self._bytes = {i: t for t, i in ranks.items()} | {i: t.encode() for t, i in self._specials.items()}
        self._ranks = ranks
        self.vocab_size = max(self._bytes) + 1
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=family.words, mergeable_ranks=ranks, special_tokens=self._specials
        )
        own_bos = None if family.bos is None else self._specials[family.bos]
        self._settle(files, self._specials.values(), adds_bos=family.adds_bos, default_bos=own_bos)
        if not self.eos_ids:
            self.eos_ids = tuple(self._specials[t] for t in family.eos)

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        return self._encoding.encode(text, allowed_special="all" if parse_special else set(), disallowed_special=())

    def _bytes_of(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def id_of(self, token: str) -> int | None:
        found = self._specials.get(token)
        return self._ranks.get(token.encode("utf-8", "surrogatepass")) if found is None else found

    def token_str(self, token_id: int) -> str:
        return self._bytes_of(token_id).decode("utf-8", "replace")
