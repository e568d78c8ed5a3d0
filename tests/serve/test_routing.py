"""Which replica is asked; the oracle: the rules in words, and a brute-force search for the longest shared prefix."""

import random
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from pagoda import EngineConfig, ServeConfig
from pagoda.engine.metrics import SECONDS, Counters, EngineStats
from pagoda.errors import ConfigError
from pagoda.serve.all_replicas import added_up, concerns_all, one_page
from pagoda.serve.exposition import exposition
from pagoda.serve.routing import MAX_REMEMBERED, PREFIX_CHARACTERS, Keys, Routing, fields_of, keys_of

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


def test_bodies_that_are_no_requests_have_no_keys() -> None:
    for body in (b"", b"[", b"[1]", b"\xff", b"9" * 6000, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        assert fields_of(body) == {}
    deep = b'{"model": "m", "session_id": 5, "messages": ' + b"[" * 900 + b"]" * 900 + b"}"
    assert fields_of(deep)["model"] == "m" and keys_of(CHAT, fields_of(deep)) == Keys("5", ())


def test_answers_of_all_replicas_become_one() -> None:
    assert added_up([{"aborted": 1}, {"aborted": 2}]) == {"aborted": 3}
    lists = [{"object": "list", "data": [1]}, {"object": "list", "data": []}, {"object": "list", "data": [2, 3]}]
    assert added_up(lists) == {"object": "list", "data": [1, 2, 3]} and lists[0]["data"] == [1]
    ways = ("POST /abort", "GET /v1/sessions", "GET /metrics", "DELETE /v1/sessions/5")
    assert all(concerns_all(*way.split()) for way in ways)
    others = ("GET /v1/models", "POST /v1/chat/completions", "GET /abort", "DELETE /metrics", "POST /v1/sessions/save")
    assert not any(concerns_all(*way.split()) for way in others)


def test_one_page_of_metrics_keeps_replicas_apart() -> None:
    def page(**counts: int) -> str:
        stats = EngineStats(1, 0, 0, 9, 3, 2, Counters(**counts))
        stats.counters.first_token_time.add(0.3)
        return exposition(stats, 'a "model"')

    both = one_page({"r1": page(steps=5, preemptions=1), "r2": page(steps=7)})
    families = {family.name: family for family in parse(both)}
    assert len(families) == both.count("# TYPE ") == page().count("# TYPE ")
    assert {s.labels["engine"]: s.value for s in families["pagoda:steps"].samples} == {"r1": 5, "r2": 7}
    assert len(families["pagoda:time_to_first_token_seconds"].samples) == 2 * (len(SECONDS) + 3)


def test_sessions_are_not_saved_by_one_of_several_replicas(tmp_path: Path) -> None:
    replicas = pytest.importorskip("pagoda.serve.replicas")
    made = ServeConfig(session_dir=str(tmp_path), replicas=2)
    for config, models in ((made, ["a"]), (made.replace(replicas=1), ["a", "b"]),
                           (made.replace(replicas=1, max_replicas=2), ["a"])):  # fmt: skip
        with pytest.raises(ConfigError, match="leave out session_dir"):
            replicas.application(dict.fromkeys(models, "mini"), EngineConfig(), config, None, 0)
    assert replicas.application({"a": "mini"}, EngineConfig(), made.replace(replicas=1), None, 0)
