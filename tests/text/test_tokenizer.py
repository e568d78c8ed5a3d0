"""Tokenizers against reference ids (`gguf-vocab/*.out`), the libraries' own decoding, and hostile folders."""

import base64
import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.errors import TokenizerError
from pagoda.text.json_tokenizer import LONG_TEXT
from pagoda.text.tokenizer import is_tiktoken_file, load_tokenizer

REFERENCE = [
    ("llama-spm", "llama-2-7b-chat"),
    ("llama-bpe", "llama-3.2-3b-instruct"),
    ("llama-bpe", "llama-3.2-3b-instruct/original"),
    ("qwen2", "qwen2.5-7b-instruct"),
    ("qwen2", "qwen3"),
    ("gpt-2", "gpt2"),
]
FOLDERS = ["llama-2-7b-chat", "llama-3.2-3b-instruct", "llama-3.2-3b-instruct/original", "qwen3", "internlm-7b",
           "internlm2-chat", "yi-6b-chat", "mistral-spm", "gpt2"]  # fmt: skip


MARKS = [("qwen3", "<|im_end|>"), ("llama-2-7b-chat", "</s>"), ("internlm2-chat", "</s>"), ("yi-6b-chat", "<|im_end|>"),
         ("llama-3.2-3b-instruct", "<|eot_id|>"), ("llama-3.2-3b-instruct/original", "<|eot_id|>")]  # fmt: skip


def reference_cases(shared_data: Path, vocab: str) -> list[tuple[str, list[int]]]:
    stem = shared_data / "tokenizers" / "gguf-vocab" / f"ggml-vocab-{vocab}.gguf"
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in Path(f"{stem}.out").read_text().split("\n")]
    assert len(texts) == len(ids) == 47
    return list(zip(texts, ids))


@pytest.mark.parametrize(("vocab", "folder"), REFERENCE)
def test_reference_ids(shared_data, tokenizer_at, vocab, folder):
    tokenizer = tokenizer_at(folder)
    for text, ids in reference_cases(shared_data, vocab):
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


def test_reference_ids_of_the_sentencepiece_file(shared_data, tmp_path):
    shutil.copy(shared_data / "tokenizers" / "llama-2-7b-chat" / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text, ids in reference_cases(shared_data, "llama-spm"):
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("folder", ["qwen3", "llama-2-7b-chat", "gpt2", "llama-3.2-3b-instruct"])
def test_long_texts_have_the_same_ids(shared_data, tokenizer_at, folder):
    tokenizer = tokenizer_at(folder)
    for mark in ("", "<|im_end|>", "</s>"):
        text = "".join(text + mark for text, _ in reference_cases(shared_data, "qwen2")) * 8
        assert len(text) > LONG_TEXT
        assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids
        plain = tokenizer.encode(text, parse_special=False)
        assert plain == tokenizer._plain_backend.encode(text, add_special_tokens=False).ids


def test_other_threads_run_while_a_long_text_is_tokenized(tokenizer_at):
    """A million characters take half a second: another thread turns hundreds of times, not once."""
    tokenizer, turns, over = tokenizer_at("qwen3"), [0], threading.Event()

    def turn():
        while not over.wait(0.001):
            turns[0] += 1

    thread = threading.Thread(target=turn)
    thread.start()
    before = turns[0]
    tokenizer.encode("Once upon a time there was a king. " * 30_000)
    during = turns[0] - before
    over.set()
    thread.join()
    assert during > 20


def gguf_folder(shared_data: Path, vocab: str, words: list, folder: Path) -> Path:
    """A tokenizer.json of a vocabulary-only GGUF file, its words cut by the pre-tokenizers `words`."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(shared_data / "tokenizers" / "gguf-vocab" / f"ggml-vocab-{vocab}.gguf")
    tokens, merges, kinds = (
        reader.fields[f"tokenizer.ggml.{n}"].contents() for n in ("tokens", "merges", "token_type")
    )
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(words)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == 4])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def split(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def test_reference_ids_of_falcon(shared_data, tmp_path):
    pre = tokenizers.pre_tokenizers
    words = [pre.Punctuation("contiguous"), pre.ByteLevel(add_prefix_space=False), pre.Digits(individual_digits=False),
             split("[0-9][0-9][0-9]")]  # fmt: skip
    tokenizer = load_tokenizer(gguf_folder(shared_data, "falcon", words, tmp_path))
    for text, ids in reference_cases(shared_data, "falcon"):
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


def test_reference_ids_of_deepseek_coder(shared_data, tmp_path):
    pre = tokenizers.pre_tokenizers
    words = [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
             pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=False)]  # fmt: skip
    tokenizer = load_tokenizer(gguf_folder(shared_data, "deepseek-coder", words, tmp_path))
    for text, ids in reference_cases(shared_data, "deepseek-coder"):
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("folder", FOLDERS)
def test_round_trip_and_token_bytes(tokenizer_at, folder):
    tokenizer = tokenizer_at(folder)
    for text in ("Hello world", " two  spaces", "你好，世界\n\t1234 🙂👩‍👩‍👧", "é\u0301", "a\u00a0b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined == (" " if tokenizer.strips_space else "") + text
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b"" and tokenizer.token_bytes(-1) == b""
    assert all(tokenizer.token_bytes(i) for i in tokenizer.eos_ids)


@pytest.mark.parametrize("folder", ["llama-2-7b-chat", "llama-3.2-3b-instruct", "mistral-7b-instruct-v0.2"])
@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_the_library(shared_data, tokenizer_at, folder, skip):
    ours, library = tokenizer_at(folder), tokenizers.Tokenizer.from_file(
        str(shared_data / "tokenizers" / folder / "tokenizer.json")
    )  # fmt: skip
    rng = random.Random(1)
    words = ["Ada ", " x", "你", "\n", "1", "é", " ", "" if folder.startswith("llama-2") else "</s>"]
    for _ in range(200):
        text = "".join(rng.choice(words) for _ in range(rng.randint(0, 12)))
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("folder", ["internlm-7b", "internlm2-chat", "yi-6b-chat", "mistral-spm"])
def test_decode_equals_sentencepiece(shared_data, tokenizer_at, folder):
    ours = tokenizer_at(folder)
    file = next((shared_data / "tokenizers" / folder).glob("tokenizer.model*"))
    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in ("Hello  world", "  lead", "书生·浦语 1234\n", "", "tab\tend "):
        assert ours.encode(text, parse_special=False) == library.encode(text)
        assert ours.decode(library.encode(text)) == library.decode(library.encode(text))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("folder", ["llama-2-7b-chat", "llama-3.2-3b-instruct/original", "internlm2-chat"])
def test_any_text_survives(tokenizer_at, folder, text):
    tokenizer = tokenizer_at(folder)
    if folder == "internlm2-chat":
        text = text.replace("\0", "")  # its vocabulary has an unused piece there
    if "▁" not in text:
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special=False) == text


def test_special_tokens_are_parsed_or_read_as_text(tokenizer_at):
    for folder, mark in MARKS:
        tokenizer = tokenizer_at(folder)
        ids = tokenizer.encode(f"a{mark}b")
        assert tokenizer.id_of(mark) in ids and tokenizer.id_of(mark) in tokenizer.special_ids, folder
        assert tokenizer.decode(ids).replace(" ", "") == "ab"  # Llama 2 puts a space before each text
        assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == f"a{mark}b"
        if folder != "yi-6b-chat":  # there it is a piece of the trained vocabulary
            plain = tokenizer.encode(f"a{mark}b", parse_special=False)
            assert tokenizer.id_of(mark) not in plain
            assert tokenizer.decode(plain) == f"a{mark}b"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_continuation_has_no_space_of_its_own(tokenizer_at, folder):
    """The bytes of a text and its continuation are those of the whole text."""
    tokenizer = tokenizer_at(folder)
    for first, then in (("Hello", " world"), ("Hello", "world"), ("a", "\nb"), ("你", "好"), ("x ", "</s>y")):
        ids = tokenizer.encode(first) + tokenizer.encode_continuation(then, parse_special=False)
        assert tokenizer.decode(ids, skip_special=False) == first + then


def test_begin_and_end(tokenizer_at):
    llama = tokenizer_at("llama-2-7b-chat")
    assert (llama.bos_id, llama.eos_ids, llama.adds_bos) == (1, (2,), True)
    assert llama.encode("hi", add_bos=True) == [1, *llama.encode("hi")]
    qwen = tokenizer_at("qwen2.5-7b-instruct")
    assert (qwen.bos_id, qwen.eos_ids, qwen.adds_bos, qwen.bos_token) == (None, (151645, 151643), False, "")
    yi = tokenizer_at("yi-6b-chat")
    assert yi.eos_ids == (2, 7) and yi.bos_id == 1 and yi.encode("hi", add_bos=True) == yi.encode("hi")


def test_checkpoint_code_is_not_run(shared_data, tmp_path):
    """A config that points at its own code loads from the SentencePiece file; the code stays unread."""
    source = shared_data / "tokenizers" / "internlm2-chat"
    shutil.copy(source / "tokenizer.model", tmp_path)
    config = json.loads((source / "tokenizer_config.original.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_evil.py").write_text("raise SystemExit('ran')")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 92544 and tokenizer.encode("<|im_end|>") == [92542]
    assert tokenizer.encode("<|im_start|>user\n")[0] == 92543 and tokenizer.bos_id == 1


def test_qwen1_rank_file(tmp_path, shared_data):
    ranks = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell"]
    lines = b"\n".join(base64.b64encode(t) + b" " + str(i).encode() for i, t in enumerate(ranks))
    (tmp_path / "qwen.tiktoken").write_bytes(lines)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_qwen.X", null]}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello<|im_end|>") == [258, ord("o"), len(ranks) + 2]
    assert tokenizer.vocab_size == len(ranks) + 208 and tokenizer.eos_ids[0] == len(ranks) + 2
    assert is_tiktoken_file(tmp_path / "qwen.tiktoken")


def test_lone_surrogates_do_not_raise(tokenizer_at):
    for folder in FOLDERS:
        assert "b" in tokenizer_at(folder).decode(tokenizer_at(folder).encode("a\ud800b"))


def test_refusals(tmp_path):
    with pytest.raises(TokenizerError, match="no folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(TokenizerError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00garbage")
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="JSON object"):
        load_tokenizer(tmp_path)


def test_no_torch_no_transformers(shared_data):
    code = (
        "import sys, pagoda.text.tokenizer, pagoda.text.template, pagoda.text.stream\n"
        f"pagoda.text.tokenizer.load_tokenizer({str(shared_data / 'models' / 'stories260k-llama')!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
