"""Which replica should answer: the one that holds the session, else the longest prefix, unless it is overloaded."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

PREFIX_CHARACTERS = 256  # one key of a prefix; about a block of the cache
MAX_PREFIXES = 64  # keys of one request
MAX_REMEMBERED = 200_000
SLACK = 4  # requests that a holder may have more than the least busy replica, beside half as many again


class Keys(NamedTuple):
    """What a request would like to find: its session, and its text as a chain of hashes, shortest prefix first."""

    session: str | None = None
    prefixes: tuple[str, ...] = ()


def fields_of(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object; none of anything else, which the replica refuses."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return given if isinstance(given, dict) else {}


def keys_of(path: str, body: Mapping[str, Any]) -> Keys:
    """Of a request to one of the generating routes, or to that of one session."""
    session = body.get("session_id")
    if path.startswith("/v1/sessions/"):
        session = path.removeprefix("/v1/sessions/")
    known = isinstance(session, (int, str)) and session != -1
    said = body.get("messages") or body.get("prompt") or ""
    try:
        text = said if isinstance(said, str) else orjson.dumps([body.get("tools"), said], option=orjson.OPT_SORT_KEYS)
    except TypeError:  # nested too deeply
        text = ""
    chain, prefixes = hashlib.sha256(), []
    for start in range(0, min(len(text), PREFIX_CHARACTERS * MAX_PREFIXES), PREFIX_CHARACTERS):
        part = text[start : start + PREFIX_CHARACTERS]
        chain.update(part.encode("utf-8", "replace") if isinstance(part, str) else part)
        prefixes.append(chain.hexdigest()[:24])
    return Keys(str(session) if known else None, tuple(prefixes))


class Routing:
    """Remembers who answered what; the oldest is forgotten first."""

    def __init__(self) -> None:
        self._holder: OrderedDict[str, str] = OrderedDict()

    def ranked(self, keys: Keys, load: Mapping[str, int]) -> list[str]:
        """The replicas of `load` (requests that each has), best first. A session's holder stays first whatever its
        load, for the others do not know the conversation."""
        order = sorted(load, key=lambda replica: (load[replica], replica))
        if keys.session is not None:
            holder = self._holder.get("s:" + keys.session)
            if holder in load:
                return [holder, *(r for r in order if r != holder)]
        for prefix in reversed(keys.prefixes):
            holder = self._holder.get(prefix)
            if holder in load:
                least = load[order[0]] if order else 0
                if load[holder] <= least * 1.5 + SLACK:
                    order = [holder, *(r for r in order if r != holder)]
                break
        return order

    def learn(self, keys: Keys, replica: str) -> None:
        """That replica holds the request's session and prefixes now."""
        session = [] if keys.session is None else ["s:" + keys.session]
        for key in (*session, *keys.prefixes):
            self._holder[key] = replica
            self._holder.move_to_end(key)
        while len(self._holder) > MAX_REMEMBERED:
            self._holder.popitem(last=False)
