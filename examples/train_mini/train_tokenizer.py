"""Train the tokenizer of Pagoda mini on its own world: `python examples/train_mini/train_tokenizer.py`.

Byte-level BPE: any text round-trips. Digits, Chinese characters and (after a hyphen) letters are tokens of their own.
"""

import argparse
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from documents import render
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pagoda.quantize import mini_world
from pagoda.quantize.mini_exchanges import TALK
from pagoda.quantize.mini_tasks import training_documents

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: a word with its space | a digit | a Chinese character | other signs with their space | white space one by one
PATTERN = r" ?[a-zA-Z\u00c0-\u024f]+|\p{N}|\p{Han}| ?[^\s\p{L}\p{N}]+|\p{L}|\s"
VOCABULARY = 6016


def _everything() -> Iterator[str]:
    """Every word of the tables often enough to become one token, with and without a space, small and capital."""
    cells = {cell for relation in mini_world.RELATIONS for row in relation.rows for cell in row}
    cells |= {
        *mini_world.WORDS,
        *mini_world.NAMES,
        *mini_world.NAMES_ZH,
        *mini_world.JOBS,
        *TALK["unknown"]["en"]["things"],
    }
    for cell in sorted(cells):
        for form in {cell, cell.lower(), cell.capitalize()}:
            yield from [f"{form} {form} {form}"] * 40
    yield from ["卡多比鲁塔姆尼佐罗克里贝萨丁格莫皮伦" + "assistant user system tool"] * 400


def train(num_documents: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=3,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = islice(training_documents(seed=1_000_003, shard=0), num_documents)
    texts = (render(document) if not isinstance(document, str) else document for document in documents)
    plain = (text.replace("<|im_start|>", "").replace("<|im_end|>", "") for text in texts)
    tokenizer.train_from_iterator((text for part in (_everything(), plain) for text in part), trainer)
    for character in string.digits + string.ascii_letters:
        assert tokenizer.encode(character).ids == [tokenizer.token_to_id(character)]
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/pagoda/mini"))
    parser.add_argument("--documents", type=int, default=120_000)
    args = parser.parse_args()
    tokenizer = train(args.documents)
    tokenizer.save(str(args.out / "tokenizer.json"))
    print(f"{tokenizer.get_vocab_size()} tokens written to {args.out / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
