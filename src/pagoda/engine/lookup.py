"""Prompt-lookup speculation: what followed the last tokens where they occurred before is a guess of what comes now."""

from collections.abc import Sequence

from pagoda.engine.request import SamplingParams

SIZES = (4, 3, 2)
"""Lengths of the endings that are looked up, the longest first: the longer, the surer."""


class Lookup:
    """An index of one request's tokens, which only grow."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # an ending -> the position after its last occurrence but the end
        self._num_seen = 1

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`; none when no ending of them occurred before. A repetition is
        taken to go on for ever."""
        for at in range(self._num_seen, len(tokens)):
            for size in SIZES:
                if size <= at:
                    self._after[tuple(tokens[at - size : at])] = at
        self._num_seen = max(self._num_seen, len(tokens))
        for size in SIZES:
            at = self._after.get(tuple(tokens[-size:]))
            if at is not None and size <= len(tokens):
                return [tokens[at + i % (len(tokens) - at)] for i in range(most)]
        return []


def may_guess(params: SamplingParams) -> bool:
    """Whether the tokens of a request may be guessed. Not where a token's scores depend on the tokens just before it in
    ways that only a step of its own follows: penalties, bad words of several tokens, grammars. Logit bias, bad single
    tokens, `min_tokens`, filters, seeds and log-probabilities are exact with guesses, too."""
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return penalties == (1.0, 0.0, 0.0) and params.grammar is None and all(len(word) == 1 for word in params.bad_words)
