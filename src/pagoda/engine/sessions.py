"""Conversations that the engine remembers: token ids, one turn at a time.

A session's claim on cached blocks is nothing but the prefix cache: the blocks of its last turn were released last, so
they are evicted last, and history that was evicted is computed anew. A session holds its prompts and exactly the
tokens that the client received; a stop token was not received, so the next turn's text begins with the mark that
closes the answer, whatever ended it.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from msgspec import Struct

from pagoda.errors import NotFoundError, SessionBusyError, SessionExpiredError

MAX_SESSIONS = 100_000
MAX_TOKENS = 1 << 28  # 1 GiB of token ids


class SessionInfo(Struct):
    """`num_tokens` of history; `idle` seconds since it was last used; `busy`: a turn is running."""

    id: str
    num_tokens: int
    idle: float
    busy: bool


@dataclass
class Session:
    tokens: array = field(default_factory=lambda: array("i"))  # of all committed turns; replaced, never changed
    turn: str | None = None  # the running request
    last_turn: str | None = None  # the request that was committed last ...
    last_prompt_len: int = 0  # ... and the length of its prompt, history included
    used: float = 0.0


class Sessions:
    """All sessions of one engine. `ttl` is in seconds. Beyond `max_sessions`, or
    `max_tokens` of history in all, those that were idle for the longest are forgotten first."""

    def __init__(
        self,
        ttl: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
        max_sessions: int = MAX_SESSIONS,
        max_tokens: int = MAX_TOKENS,
    ):
        self.ttl, self.clock = ttl, clock
        self.max_sessions, self.max_tokens = max_sessions, max_tokens
        self._num_tokens = 0  # of all committed histories
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # by time of last use
        self._forgotten: OrderedDict[str, None] = OrderedDict()  # those that nobody asked us to forget

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._sessions

    def tokens(self, session_id: str) -> list[int]:
        """The committed history; empty for a new session. Raises `SessionBusyError` while a turn is running."""
        session = self._sessions.get(session_id)
        if session is not None and session.turn is not None:
            raise SessionBusyError(f"Session {session_id!r} is still answering: wait for its turn to end or abort it.")
        return list(session.tokens) if session is not None else []

    def look_up(self, session_id: str) -> list[int]:
        """`tokens` for a client that is about to continue a session, which is kept for it. Raises
        `SessionExpiredError`, once, for one that was forgotten, and `NotFoundError` for one that never was."""
        self.expire()
        if session_id in self._sessions:
            self._touch(session_id)
            return self.tokens(session_id)
        if session_id in self._forgotten:
            del self._forgotten[session_id]
            raise SessionExpiredError(
                "The session was forgotten: it was idle for too long, newer ones took its room, or the engine was "
                "started again; the same session_id now begins a new one."
            )
        raise NotFoundError(f"There is no session {session_id!r}.")

    def turn(self, session_id: str) -> str | None:
        """The id of the running request of a session, if any."""
        session = self._sessions.get(session_id)
        return session.turn if session is not None else None

    def begin(self, session_id: str, request_id: str) -> None:
        """A turn starts, of a session that is not busy."""
        session = self._sessions.setdefault(session_id, Session())
        self._forgotten.pop(session_id, None)
        assert session.turn is None
        session.turn = request_id
        self._touch(session_id)

    def end(self, session_id: str, request_id: str, tokens: list[int] | None, prompt_len: int = 0) -> None:
        """The turn is over: `tokens` is the whole new history (None: the turn leaves no trace), whose first
        `prompt_len` are the prompt. Nothing happens if the session was deleted meanwhile."""
        session = self._sessions.get(session_id)
        if session is None or session.turn != request_id:
            return
        session.turn = None
        if tokens is not None:
            self._num_tokens += len(tokens) - len(session.tokens)
            session.tokens = array("i", tokens)
            session.last_turn, session.last_prompt_len = request_id, prompt_len
        self._touch(session_id)

    def trim(self, request_id: str, keep_tokens: int) -> None:
        """A client stopped reading a turn that had just ended: keep what it received. Later turns are not touched."""
        for session in self._sessions.values():
            if session.last_turn == request_id and session.turn is None:
                self._num_tokens -= len(session.tokens)
                session.tokens = session.tokens[: session.last_prompt_len + max(0, keep_tokens)]
                self._num_tokens += len(session.tokens)
                return

    def delete(self, session_id: str) -> bool:
        """Forget a session; a running turn goes on but leaves no trace. False if there is none."""
        session = self._sessions.pop(session_id, None)
        self._forgotten.pop(session_id, None)
        if session is not None:
            self._num_tokens -= len(session.tokens)
        return session is not None

    def expire(self) -> None:
        """Forget the sessions that were idle for longer than `ttl`, and the oldest ones beyond the limits."""
        for _ in range(len(self._sessions)):
            session_id, session = next(iter(self._sessions.items()))
            full = len(self._sessions) > self.max_sessions or self._num_tokens > self.max_tokens
            if self.clock() - session.used <= self.ttl and not full:
                return
            if session.turn is not None:
                self._touch(session_id)  # in use: others are older
                continue
            self.delete(session_id)
            self.lose([session_id])

    def lose(self, session_ids: Iterable[str]) -> None:
        """These were of an engine that is gone: `look_up` tells it."""
        self._forgotten.update((i, None) for i in session_ids if i not in self._sessions)
        while len(self._forgotten) > self.max_sessions:
            self._forgotten.popitem(last=False)

    def list(self, prefix: str = "") -> "list[SessionInfo]":
        """Those whose id begins with `prefix`."""
        now, mine = self.clock(), [(i, s) for i, s in self._sessions.items() if i.startswith(prefix)]
        return [SessionInfo(i, len(s.tokens), now - s.used, s.turn is not None) for i, s in mine]

    def snapshot(self, prefix: str = "") -> dict[str, array]:
        """All committed histories of the sessions whose id begins with `prefix`; nobody may change them."""
        return {i: s.tokens for i, s in self._sessions.items() if i.startswith(prefix)}

    def adopt(self, histories: dict[str, array]) -> int:
        """Add sessions and return their number; those of the same name are replaced. Raises `SessionBusyError`, having
        changed nothing."""
        busy = [i for i in histories if i in self._sessions and self._sessions[i].turn is not None]
        if busy:
            raise SessionBusyError(f"Session {busy[0]!r} is still answering: wait for its turn to end or abort it.")
        for session_id, tokens in histories.items():
            self.delete(session_id)
            self._sessions[session_id] = Session(tokens)
            self._num_tokens += len(tokens)
            self._touch(session_id)
        return len(histories)

    def _touch(self, session_id: str) -> None:
        self._sessions[session_id].used = self.clock()
        self._sessions.move_to_end(session_id)
