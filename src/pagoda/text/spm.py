"""Tokenizers kept as a SentencePiece `tokenizer.model`: Llama 1/2, Mistral, Yi, InternLM, InternLM2, Baichuan."""

from functools import cached_property
from pathlib import Path

import sentencepiece

from pagoda.errors import TokenizerError
from pagoda.text.tokenizer import SpecialSplitter, Tokenizer
from pagoda.text.tokenizer_files import AddedToken, TokenizerFiles


class SentencePieceTokenizer(Tokenizer):
    """The trained pieces, then the added tokens that the folder's files name. A text between two special tokens is
    encoded on its own, with SentencePiece's leading space unless the config says `legacy: false`."""

    def __init__(self, path: Path, files: TokenizerFiles):
        self._path = path
        sentencepiece.set_min_log_level(2)  # it warns about pieces of InternLM's vocabulary that need no attention
        try:
            self._spm = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # the library raises RuntimeError or OSError by version
            raise TokenizerError(f"{path} is no SentencePiece model ({error}): take it from the checkpoint.") from None
        self._pieces = [self._spm.id_to_piece(i) for i in range(self._spm.vocab_size())]
        pieces = dict(enumerate(self._pieces))
        self._added = {i: t.content for i, t in files.added.items() if pieces.get(i) != t.content}
        self._ids = {piece: i for i, piece in enumerate(self._pieces)} | {t: i for i, t in self._added.items()}
        self.vocab_size = max([len(self._pieces), *(i + 1 for i in self._added)])
        self._prefixed = self._spm.encode("a") != self._bare.encode("a")
        self.strips_space = self._prefixed
        self._legacy = files.config.get("legacy", True) is not False
        marks = [i for i in range(len(self._pieces)) if self._spm.is_control(i) or self._spm.is_unknown(i)]
        own_bos = self._spm.bos_id()
        self._settle(files, marks, adds_bos=True, default_bos=own_bos if own_bos >= 0 else None)
        if not self.eos_ids and self._spm.eos_id() >= 0:
            self.eos_ids = (self._spm.eos_id(),)
        parsed = {self._pieces[i]: AddedToken(self._pieces[i], i) for i in marks if not self._spm.is_unknown(i)}
        self._splitter = SpecialSplitter(parsed | {t.content: t for t in files.added.values()})

    @cached_property
    def _bare(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the leading space: protobuf messages merge when their bytes are joined, and these
        say `normalizer_spec { add_dummy_prefix: false }` (fields 3 and 3)."""
        return sentencepiece.SentencePieceProcessor(model_proto=self._path.read_bytes() + b"\x1a\x02\x18\x00")

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return list(self._spm.encode(text))
        ids: list[int] = []
        for piece in self._splitter.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += (self._spm if self._legacy or not ids else self._bare).encode(piece)
        return ids

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id >= len(self._pieces) or self._spm.is_unknown(token_id) or self._spm.is_unused(token_id):
            return self.token_str(token_id).encode()
        if self._spm.is_byte(token_id):
            return bytes([int(self._pieces[token_id][3:5], 16)])
        return self._pieces[token_id].replace("▁", " ").encode()

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_str(self, token_id: int) -> str:
        if token_id in self._added:
            return self._added[token_id]
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else ""
