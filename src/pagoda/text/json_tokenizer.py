"""Tokenizers of the `tokenizers` library: `tokenizer.json`, or `vocab.json` with `merges.txt`."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pagoda.errors import TokenizerError
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.tokenizer_files import AddedToken, TokenizerFiles

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Qwen3 cut a text into words before merging (their tokenizer's published pattern)."""

LONG_TEXT = 4096
"""Characters. Longer texts go the library's way for batches, which lets go of Python's lock: else every stream of the
process would stand still meanwhile. It starts threads, of which it warns whoever forks later: short texts need none."""


def byte_letters() -> dict[str, int]:
    """How byte-level vocabularies write each byte: printable Latin-1 as itself, the rest as letters from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (b for b in range(256) if b not in set(plain))
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(rest)}


class JsonTokenizer(Tokenizer):
    """Wraps a `tokenizers.Tokenizer`. The bytes of a token are read off the vocabulary as the file's decoder says."""

    def __init__(self, backend: tokenizers.Tokenizer, files: TokenizerFiles):
        self._backend = backend
        self._add_tokens(files)
        vocab = backend.get_vocab(with_added_tokens=True)
        self._strings = [""] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            self._strings[token_id] = token
        self.vocab_size = len(self._strings)
        layout = json.loads(_skeleton(backend))
        self._byte_level, self._spaces, self.strips_space = _read_decoder(layout.get("decoder"))
        self._letters = byte_letters()
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        specials = {i for i, t in added.items() if t.special}
        unk = (layout.get("model") or {}).get("unk_token")
        if isinstance(unk, str) and self.id_of(unk) is not None:
            specials.add(vocab[unk])
        first = _first_token(layout.get("post_processor"))
        self._settle(
            files, specials, adds_bos=first is not None, default_bos=None if first is None else self.id_of(first)
        )

    @classmethod
    def from_file(cls, path: Path, files: TokenizerFiles) -> "JsonTokenizer":
        """Read a `tokenizer.json`; `TokenizerError` when it is damaged."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is damaged ({error}): take the file from the checkpoint anew.") from None
        if any(t.special and t.normalized for t in backend.get_added_tokens_decoder().values()):
            backend = tokenizers.Tokenizer.from_str(_unnormalized(path.read_text(encoding="utf-8")))
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, files)

    @classmethod
    def from_merges(cls, vocab: Path, merges: Path, files: TokenizerFiles) -> "JsonTokenizer":
        """Byte-level BPE from its two files: with Qwen's words for Qwen2 tokenizers, with GPT-2's for all others."""
        try:
            backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{vocab} and {merges.name} are damaged ({error}): take them anew.") from None
        if str(files.config.get("tokenizer_class", "")).startswith("Qwen2"):
            backend.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if backend.token_to_id("<|endoftext|>") is not None:
            backend.add_special_tokens(["<|endoftext|>"])
        return cls(backend, files)

    @classmethod
    def from_transformers(cls, files: TokenizerFiles) -> "JsonTokenizer":
        """What transformers builds from the folder without running its code."""
        sentence = (
            f"{files.folder} holds no tokenizer that can be read (tokenizer.json, tokenizer.model, *.tiktoken, or "
            "vocab.json with merges.txt): copy the tokenizer files of the original checkpoint into it."
        )
        if not any(files.folder.glob("*vocab*")):
            raise TokenizerError(sentence)
        from transformers import AutoTokenizer

        try:
            built = AutoTokenizer.from_pretrained(str(files.folder), trust_remote_code=False, local_files_only=True)
            return cls(built.backend_tokenizer, files)
        except TokenizerError:
            raise
        except Exception as error:  # transformers raises whatever the file made it stumble over
            raise TokenizerError(f"{sentence} ({type(error).__name__})") from None

    def _add_tokens(self, files: TokenizerFiles) -> None:
        """Add the tokens that the config knows and the vocabulary lacks; their ids must continue it."""
        known = self._backend.get_added_tokens_decoder()
        missing = [t for t in files.added.values() if self._backend.token_to_id(t.content) != t.id]
        special = [t for t in files.added.values() if t.special and not (t.id in known and known[t.id].special)]
        self._backend.add_tokens([_library_token(t) for t in missing])
        self._backend.add_special_tokens([_library_token(t) for t in special if t not in missing])
        for token in missing:
            if self._backend.token_to_id(token.content) != token.id:
                raise TokenizerError(
                    f"{files.folder}: token {token.content!r} should have id {token.id} but its vocabulary ends "
                    "elsewhere: take the tokenizer files from one checkpoint."
                )

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        backend = self._backend if parse_special else self._plain_backend
        if len(text) > LONG_TEXT:
            return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return backend.encode(text, add_special_tokens=False).ids

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._strings[token_id]
        if token_id in self._added_ids:
            return token.encode()
        if self._byte_level:
            return bytes(self._letters[c] for c in token) if all(c in self._letters for c in token) else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return (token.replace("▁", " ") if self._spaces else token).encode()

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_str(self, token_id: int) -> str:
        return self._strings[token_id] if 0 <= token_id < self.vocab_size else ""


def _unnormalized(text: str) -> str:
    """A `tokenizer.json` whose special tokens are found as they are written. Old Llama files look for them after a
    space has been put before each text, and so miss those that follow another character."""
    layout = json.loads(text)
    for token in layout["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    return json.dumps(layout, ensure_ascii=False)


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
    normalized = token.normalized and not token.special
    return tokenizers.AddedToken(token.content, normalized=normalized, special=token.special, **flags)


def _skeleton(backend: tokenizers.Tokenizer) -> str:
    """The tokenizer's settings as JSON, without its vocabulary."""
    model = backend.model
    parts = {"decoder": backend.decoder, "post_processor": backend.post_processor}
    settings: dict[str, Any] = {k: None if v is None else json.loads(v.__getstate__()) for k, v in parts.items()}
    return json.dumps(settings | {"model": {"unk_token": getattr(model, "unk_token", None)}})


def _read_decoder(decoder: dict[str, Any] | None) -> tuple[bool, bool, bool]:
    """(bytes are written as letters, `▁` is a space, the first space is dropped), from the file's decoder."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    byte_level = spaces = strips = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "Metaspace":
            spaces, strips = True, step.get("prepend_scheme", "always") != "never"
        elif kind == "Replace" and step.get("pattern") == {"String": "▁"} and step.get("content") == " ":
            spaces = True
        elif kind == "Strip" and step.get("content") == " " and step.get("stop") == 0:
            strips = step.get("start", 0) > 0
        elif kind not in ("ByteFallback", "Fuse"):
            raise TokenizerError(
                f"The tokenizer's decoder step {kind} is unknown: use a byte-level or SentencePiece one."
            )
    return byte_level, spaces, strips


def _first_token(post: dict[str, Any] | None) -> str | None:
    """The special token that the file's post-processor puts before a text, if any."""
    steps = [] if post is None else post.get("processors", [post])
    for step in steps:
        first = (step.get("single") or [{}])[0]
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    return None
