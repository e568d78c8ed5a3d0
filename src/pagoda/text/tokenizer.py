"""Strings become ids here, and ids become bytes; nowhere lower in the house.

A text is the UTF-8 reading of its tokens' bytes, joined (invalid bytes read as U+FFFD), without the one space that
SentencePiece puts before a text. That single rule makes whole and streamed decoding equal.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from pagoda.errors import TokenizerError
from pagoda.text.tokenizer_files import AddedToken, TokenizerFiles, read_tokenizer_files


class Tokenizer(ABC):
    """The face of every tokenizer. Ids beyond the vocabulary (padded embeddings) have no text."""

    vocab_size: int
    """Largest id + 1, added tokens included."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()
    """Tokens that are marks, not text: `skip_special` leaves them out."""
    adds_bos: bool = False
    """Whether a raw prompt of this model begins with `bos_id` (templates write it themselves)."""
    strips_space: bool = False
    """Whether the first space of a decoded text was put there by the tokenizer."""

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]: ...

    @abstractmethod
    def _bytes_of(self, token_id: int) -> bytes: ...

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """Id of the token that is written `token` in the vocabulary, or None."""

    @abstractmethod
    def token_str(self, token_id: int) -> str:
        """How the vocabulary writes the token; empty beyond the vocabulary."""

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of `text`. `add_bos`: behind the begin-of-sequence token, for models whose raw prompts begin with one
        (`adds_bos`). `parse_special=False` reads the names of special tokens as plain text. Lone surrogates
        become U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._encode(text, parse_special)
        return [self.bos_id, *ids] if add_bos and self.adds_bos and self.bos_id is not None else ids

    def encode_continuation(self, text: str, parse_special: bool = True) -> list[int]:
        """Ids of a text that goes on from another one: without the space that SentencePiece puts before a text."""
        if not self.strips_space:
            return self.encode(text, parse_special=parse_special)
        lead = self.encode("\n")
        ids = self.encode("\n" + text, parse_special=parse_special)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self.encode(text, parse_special=parse_special)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return [self._bytes_of(token_id) for token_id in range(self.vocab_size)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty beyond the vocabulary."""
        return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; never raises."""
        kept = (i for i in ids if not (skip_special and i in self.special_ids))
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    @property
    def bos_token(self) -> str:
        return "" if self.bos_id is None else self.token_str(self.bos_id)

    @property
    def eos_token(self) -> str:
        return self.token_str(self.eos_ids[0]) if self.eos_ids else ""

    def _settle(
        self, files: TokenizerFiles, specials: Iterable[int], adds_bos: bool, default_bos: int | None = None
    ) -> None:
        """Fix begin, end and special ids. A name in the tokenizer's files goes before what the vocabulary implies."""
        self.bos_id = default_bos if files.bos is None else self.id_of(files.bos)
        eos = None if files.eos is None else self.id_of(files.eos)
        self.eos_ids = tuple(dict.fromkeys([*(() if eos is None else (eos,)), *files.eos_ids]))
        marks = {t.id for t in files.added.values() if t.special} | set(specials) | set(self.eos_ids)
        self.special_ids = frozenset(marks if self.bos_id is None else marks | {self.bos_id})
        self.adds_bos = bool(files.config.get("add_bos_token", adds_bos)) and self.bos_id is not None


class SpecialSplitter:
    """Cuts a text at the names of tokens that the trained vocabulary does not parse by itself; longer names first."""

    def __init__(self, tokens: Mapping[str, AddedToken]):
        self.tokens = dict(tokens)
        names = sorted(self.tokens, key=len, reverse=True)
        alternatives = [
            (r"\s*" if self.tokens[n].lstrip else "") + f"({re.escape(n)})" + (r"\s*" if self.tokens[n].rstrip else "")
            for n in names
        ]
        self._names = names
        self._pattern = re.compile("|".join(alternatives)) if names else None

    def split(self, text: str) -> Iterable[str | int]:
        """Pieces in order: plain text (never empty) as str, a token as its id."""
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > start:
                yield text[start : match.start()]
            assert match.lastindex is not None
            yield self.tokens[self._names[match.lastindex - 1]].id
            start = match.end()
        if start < len(text):
            yield text[start:]


def is_tiktoken_file(path: Path) -> bool:
    """Whether a vocabulary file holds lines `base64 rank` (tiktoken) and not a SentencePiece protobuf."""
    with path.open("rb") as file:
        head = file.read(256).split(b"\n")[0].split(b" ")
    return len(head) == 2 and head[1].strip().isdigit() and re.fullmatch(rb"[A-Za-z0-9+/]+=*", head[0]) is not None


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json`, else a SentencePiece or tiktoken file, else
    `vocab.json` with `merges.txt`, else what transformers builds from the folder. Never runs code of the checkpoint.
    `TokenizerError` when nothing fits."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is no folder: give the checkpoint's folder, which holds its tokenizer files.")
    files = read_tokenizer_files(folder)
    if (folder / "tokenizer.json").exists():
        from pagoda.text.json_tokenizer import JsonTokenizer

        return JsonTokenizer.from_file(folder / "tokenizer.json", files)
    for path in (*sorted(folder.glob("tokenizer.model*")), *sorted(folder.glob("*.tiktoken"))):
        if is_tiktoken_file(path):
            from pagoda.text.tiktoken_bpe import TiktokenTokenizer

            return TiktokenTokenizer(path, files)
        from pagoda.text.spm import SentencePieceTokenizer

        return SentencePieceTokenizer(path, files)
    from pagoda.text.json_tokenizer import JsonTokenizer

    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return JsonTokenizer.from_merges(folder / "vocab.json", folder / "merges.txt", files)
    return JsonTokenizer.from_transformers(files)
