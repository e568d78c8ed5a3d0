"""A Python client of the server: conversations over the stateful route, chats over OpenAI's."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from pagoda.errors import (
    AuthenticationError,
    EngineDeadError,
    EngineError,
    NotFoundError,
    OverloadedError,
    PagodaError,
    RequestError,
    SessionBusyError,
    UsageError,
)

BY_STATUS: dict[int, type[PagodaError]] = {
    401: AuthenticationError,
    404: NotFoundError,
    409: SessionBusyError,
    429: OverloadedError,
    503: OverloadedError,
}
MIN_PAUSE = 0.2


@dataclass(frozen=True)
class Piece:
    """Part of a reply. Counts are of the reply so far; `history_tokens`: what the session held before."""

    text: str = ""
    reasoning: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    history_tokens: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True)
class Absence:
    """Why there is no answer yet, and in how many seconds to ask again."""

    error: EngineDeadError
    pause: float = MIN_PAUSE


class Client:
    """One server. While it is away or its engine not ready a request is tried again for `patience` seconds, as seldom
    as the server asks; `on_wait` is told why, once. Raises `EngineDeadError` when it stays away, and the error that the
    server tells: one that is full is not asked again."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        patience: float = 10.0,
        on_wait: Callable[[str], None] = lambda why: None,
    ):
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url} is not the address of a server: write http://HOST:PORT.")
        self.url = url.rstrip("/").removesuffix("/v1").replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=5.0), trust_env=False
        )
        self._patience, self._on_wait = patience, on_wait

    def close(self) -> None:
        self._http.close()

    def model(self) -> dict[str, Any]:
        """The model that is served: `id`, `max_model_len`."""
        with self._open("GET", "/v1/models", None) as answer:
            return json.loads(answer.read())["data"][0]

    def turn(self, session_id: int, prompt: str, **fields: Any) -> Iterator[Piece]:
        """One turn of a session that the server remembers. Leaving the loop stops the reply and keeps what came."""
        body = {"prompt": prompt, "session_id": session_id, "interactive_mode": True, "stream": True, **fields}
        with self._open("POST", "/v1/chat/interactive", body) as answer:
            for line in self._lines(answer):
                news = json.loads(line)
                if "error" in news:
                    raise EngineError(news["error"]["message"])
                yield Piece(
                    news["text"],
                    tokens=news["tokens"],
                    prompt_tokens=news["input_tokens"],
                    cached_tokens=news.get("cached_tokens", 0),
                    history_tokens=news["history_tokens"],
                    finish_reason=news["finish_reason"],
                )

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Iterator[Piece]:
        """A reply to a whole conversation; the server remembers nothing but the prefix."""
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"messages": messages, "stream": True, "stream_options": options, **fields}
        with self._open("POST", "/v1/chat/completions", body) as answer:
            for line in self._lines(answer):
                if not line.startswith("data: {"):
                    continue
                news = json.loads(line[6:])
                if "error" in news:
                    raise EngineError(news["error"]["message"])
                usage = news.get("usage") or {}
                delta = news["choices"][0]["delta"] if news["choices"] else {}
                yield Piece(
                    delta.get("content") or "",
                    delta.get("reasoning_content") or "",
                    usage.get("completion_tokens", 0),
                    usage.get("prompt_tokens", 0),
                    usage.get("prompt_tokens_details", {}).get("cached_tokens", 0),
                    finish_reason=news["choices"][0]["finish_reason"] if news["choices"] else None,
                )

    def end(self, session_id: int) -> None:
        """Forget a session; one that is not there is forgotten already."""
        try:
            with self._open("DELETE", f"/v1/sessions/{session_id}", None):
                return
        except NotFoundError:
            return

    @contextmanager
    def _open(self, method: str, path: str, body: Any) -> Iterator[httpx.Response]:
        until, told = time.monotonic() + self._patience, False
        while isinstance(answer := self._try(method, path, body), Absence):
            left = until - time.monotonic()
            if left <= 0:
                raise answer.error
            if not told:
                self._on_wait(f"{answer.error} Trying for {self._patience:g} s.")
            told = True
            time.sleep(min(answer.pause, left))
        try:
            if answer.status_code >= 400:
                raise _refusal(answer)
            yield answer
        finally:
            answer.close()

    def _try(self, method: str, path: str, body: Any) -> "httpx.Response | Absence":
        """The answer, or why there is none yet: nobody listens, or the engine is on its way."""
        try:
            answer = self._http.send(self._http.build_request(method, path, json=body), stream=True)
        except httpx.InvalidURL as error:
            raise UsageError(f"{self.url} is not an address ({error}): write http://HOST:PORT.") from None
        except httpx.TransportError as error:
            why = f"The server at {self.url} cannot be reached ({error or type(error).__name__})"
            return Absence(EngineDeadError(f"{why}: start it with `pagoda serve MODEL`, or check the address."))
        if answer.status_code != 503 or not isinstance(error := _refusal(answer), EngineDeadError):
            return answer
        answer.close()
        after = answer.headers.get("retry-after", "")
        return Absence(error, max(MIN_PAUSE, int(after)) if after.isdecimal() else MIN_PAUSE)

    def _lines(self, answer: httpx.Response) -> Iterator[str]:
        try:
            yield from answer.iter_lines()
        except httpx.TransportError as error:
            raise EngineDeadError(f"The connection to {self.url} broke in the middle of a reply ({error}).") from None


def _refusal(answer: httpx.Response) -> PagodaError:
    """What the server said, as an error of our tree."""
    try:
        told = json.loads(answer.read())["error"]
        message = str(told["message"])
        if told.get("code") == "engine_unavailable":
            return EngineDeadError(message)
    except (ValueError, KeyError, TypeError):
        message = f"The server answered {answer.status_code}: is this a Pagoda server?"
    return BY_STATUS.get(answer.status_code, RequestError if answer.status_code < 500 else EngineError)(message)
