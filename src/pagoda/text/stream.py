"""Token ids become text piece by piece, and stop strings end it.

The joined pieces equal `tokenizer.decode` of all ids, however the ids are cut into pushes, up to a stop string.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from pagoda.text.tokenizer import Tokenizer


def beginning_len(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that may grow into one of `marks`."""
    longest = max(map(len, marks), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(len(mark) > length and mark.startswith(tail) for mark in marks):
            return length
    return 0


class StopMatcher:
    """Finds the first of several texts in a stream of text. Text that may be the beginning of one is held back.

    The first stop is the one that ends first; of two that end together, the longer. That does not depend on how the
    stream is cut.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = tuple(dict.fromkeys(s for s in stops if s))
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Text that certainly stands before any stop; nothing more once a stop was `found`."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(start + len(s), start, s) for s in self._stops if (start := self._held.find(s)) >= 0]
        if hits:
            _, start, self.found = min(hits)
            out, self._held = self._held[:start], ""
            return out
        cut = len(self._held) - beginning_len(self._held, self._stops)
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """The text held back, when no more will come."""
        out, self._held = self._held, ""
        return out


class TextStream:
    """Incremental `decode` of one reply.

    `stop_words` end the text and are not part of it; `stopped_by` is the one that did. `continues=True` keeps the first
    space that SentencePiece texts drop, for a text that goes on from a prompt. `num_tokens` counts the tokens whose
    text was given out whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_words: Sequence[str] = (),
        skip_special: bool = True,
        continues: bool = False,
    ):
        self._tokenizer = tokenizer
        self._stops = StopMatcher(stop_words)
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = tokenizer.strips_space and not continues
        self._ends: deque[int] = deque()  # for each token not yet counted: characters that must be out before it is
        self._num_decoded = 0
        self._num_out = 0
        self.num_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        return self._stops.found

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens."""
        out = []
        for token in token_ids:
            if self._stops.found is not None:
                break
            data = b"" if token in self._skipped else self._tokenizer.token_bytes(token)
            text = self._decoder.decode(data)
            self._num_decoded += len(text)
            unfinished = bool(self._decoder.getstate()[0])
            self._ends.append(self._num_decoded + unfinished)
            out.append(self._give(text))
        return "".join(out)

    def flush(self) -> str:
        """The rest, when no more tokens will come: text held back, and U+FFFD for a character cut in half."""
        text = self._decoder.decode(b"", final=True)
        self._num_decoded += len(text)
        out = self._give(text)
        if self._stops.found is None:
            out += self._count(self._stops.flush())
        return out

    def _give(self, text: str) -> str:
        if text and self._strip_next:
            self._strip_next = False
            if text[0] == " ":
                text = text[1:]
                self._num_out += 1
        return self._count(self._stops.push(text))

    def _count(self, text: str) -> str:
        self._num_out += len(text)
        while self._ends and self._ends[0] <= self._num_out:
            self._ends.popleft()
            self.num_tokens += 1
        return text
