"""Which replica is asked; the oracle: the rules in words, and a brute-force search for the longest shared prefix."""

import random

from pagoda.serve.routing import MAX_REMEMBERED, PREFIX_CHARACTERS, Keys, Routing, keys_of

CHAT = "/v1/chat/completions"


def asked(text: str, **more: object) -> Keys:
    return keys_of("/v1/completions", {"prompt": text, **more})


def test_the_longest_prefix_decides() -> None:
    rng, routing = random.Random(1), Routing()
    words = ["".join(rng.choices("abcdef", k=PREFIX_CHARACTERS)) for _ in range(6)]
    told = {"a": words[:4], "b": words[:2] + words[4:], "c": words[3:]}
    for replica, parts in told.items():
        routing.learn(asked("".join(parts)), replica)
    idle = dict.fromkeys(told, 0)
    for parts in ([*words[:4], "more"], [*words[:2], words[4]], [words[3], words[4], "x"], words[:3]):
        best = max(told, key=lambda r: sum(x == y for x, y in zip(told[r], parts, strict=False)))
        assert routing.ranked(asked("".join(parts)), idle)[0] == best, parts
    assert routing.ranked(asked("nobody knows"), {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]


def test_an_overloaded_holder_is_passed_over_and_a_lost_one_forgotten() -> None:
    routing, keys = Routing(), asked("x" * 1000)
    routing.learn(keys, "a")
    assert routing.ranked(keys, {"a": 4, "b": 0})[0] == "a"
    assert routing.ranked(keys, {"a": 5, "b": 0})[0] == "b"
    assert routing.ranked(keys, {"a": 19, "b": 10})[0] == "a"
    assert routing.ranked(keys, {"b": 7, "c": 3}) == ["c", "b"]


def test_a_session_stays_with_its_holder() -> None:
    routing = Routing()
    turn = keys_of("/v1/chat/interactive", {"session_id": 7, "prompt": "hello"})
    routing.learn(turn, "b")
    later = keys_of("/v1/chat/interactive", {"session_id": 7, "prompt": "and then?"})
    assert routing.ranked(later, {"a": 0, "b": 99})[0] == "b"
    assert routing.ranked(keys_of("/v1/sessions/7", {}), {"a": 0, "b": 99})[0] == "b"
    assert (
        routing.ranked(keys_of("/v1/chat/interactive", {"session_id": -1, "prompt": "?"}), {"a": 0, "b": 9})[0] == "a"
    )
    assert routing.ranked(later, {"a": 0, "c": 1})[0] == "a", "its holder is gone"


def test_messages_and_odd_bodies_have_keys() -> None:
    system = {"role": "system", "content": "s" * 600}
    one, two = (keys_of(CHAT, {"messages": [system, {"role": "user", "content": c}]}) for c in ("a", "b"))
    assert one.prefixes[:2] == two.prefixes[:2] and one.prefixes[-1] != two.prefixes[-1]
    for body in ({}, {"messages": None}, {"prompt": [1, 2, 3]}, {"prompt": "\ud800"}, {"session_id": [1]}):
        assert keys_of(CHAT, body).session is None


def test_memory_is_bounded() -> None:
    routing = Routing()
    for n in range(MAX_REMEMBERED + 10):
        routing.learn(Keys(str(n)), "a")
    assert len(routing._holder) == MAX_REMEMBERED
    assert routing.ranked(Keys("0"), {"a": 1, "b": 0})[0] == "b", "the oldest went"
