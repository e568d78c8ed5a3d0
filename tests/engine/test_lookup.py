"""Guesses by lookup against a brute force that searches the tokens anew each time."""

import random

from pagoda.engine.lookup import SIZES, Lookup, may_guess
from pagoda.engine.request import SamplingParams


def brute(tokens: list[int], most: int) -> list[int]:
    for size in SIZES:
        ending = tokens[-size:]
        if len(ending) < size:
            continue
        for at in range(len(tokens) - 1, size - 1, -1):
            if tokens[at - size : at] == ending:
                grown = list(tokens)
                for i in range(most):
                    grown.append(grown[at + i])
                return grown[len(tokens) :]
    return []


def test_guesses_are_what_followed_the_last_occurrence():
    rng = random.Random(0)
    guessed = 0
    for _ in range(300):
        lookup, tokens = Lookup(), [rng.randrange(4) for _ in range(rng.randint(1, 12))]
        for _ in range(20):
            most = rng.randint(1, 6)
            found = lookup.guess(tokens, most)
            assert found == brute(tokens, most)
            guessed += bool(found)
            tokens += [rng.randrange(4) for _ in range(rng.randint(1, 3))]
    assert guessed > 1000


def test_a_repetition_is_taken_to_go_on():
    assert Lookup().guess([9, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert Lookup().guess([5, 6], 3) == [] == Lookup().guess([5], 3)


def test_who_may_guess():
    free = SamplingParams(
        temperature=0.7, top_k=3, min_tokens=4, logit_bias={3: 1.0}, bad_words=((4,), (5,)), logprobs=2
    )
    assert may_guess(free)
    for bound in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1},
                  {"bad_words": ((4, 5),)}, {"grammar": "g"}):  # fmt: skip
        assert not may_guess(SamplingParams(**bound))
