"""What stands before every route, as plain ASGI: request ids, log lines, keys, limits."""

import hashlib
import hmac
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from logging import DEBUG, INFO
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from pagoda.config import ServeConfig
from pagoda.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ConfigError,
    OverloadedError,
    PagodaError,
    RateLimitError,
)
from pagoda.log import get_logger
from pagoda.serve.backend import Backend
from pagoda.serve.error_map import error_response

OPEN_PATHS = frozenset(
    ("/", "/docs", "/openapi.json", "/health", "/ready", "/docs-assets/swagger-ui.css", "/docs-assets/swagger-ui.js")
)
"""The only paths that need no key."""
LIMITED = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/chat/interactive", "/generate", "/v1/encode", "/tokenize")
    + ("/detokenize", "/v1/sessions/save", "/v1/sessions/restore")
)
"""The paths that prepare prompts, generate or write files: of these, and of each key's, so many may be open."""
PROBES = frozenset(("/health", "/ready", "/metrics"))
log = get_logger(__name__)


class RequestLog:
    """Names each request, adds the headers that every answer carries, writes one line when it is over."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        label = Headers(scope=scope).get("x-request-id", "")
        label = label if re.fullmatch(r"[\w.:-]{1,128}", label, re.ASCII) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"request_id": label, "ignored": [], "tenant": ""}
        started, status = time.monotonic(), 499

        async def tell(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = label
                if state["ignored"]:
                    headers["x-ignored-fields"] = ", ".join(state["ignored"])
            await send(message)

        try:
            await self.app(scope, receive, tell)
        finally:
            line = {"request_id": label, "method": scope["method"], "path": scope["path"][:256], "status": status}
            line |= {"ms": round(1000 * (time.monotonic() - started), 1), "tenant": state.get("tenant", "")}
            if state["ignored"]:
                line["ignored"] = state["ignored"]
            log.log(DEBUG if scope["path"] in PROBES else INFO, "request", extra={"fields": line})


def read_keys(given: Iterable[str] | None) -> list[bytes]:
    """SHA-256 digests of the keys that may enter: words, `@PATH` of a file with one key a line, PAGODA_API_KEYS."""
    keys: list[str] = re.split(r"[\s,]+", os.environ.get("PAGODA_API_KEYS", ""))
    for word in given or ():
        if not word.startswith("@"):
            keys.append(word)
            continue
        try:
            keys += Path(word[1:]).read_text(encoding="utf-8").split()
        except OSError as error:
            raise ConfigError(f"The key file {word[1:]} cannot be read ({error.strerror}): check the path.") from None
    return [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys) if key]


class Guard:
    """Lets in who has a key, while there is room, with a body of bounded size."""

    def __init__(self, app: Any, config: ServeConfig, backend: Backend):
        self.app, self.config, self.backend = app, config, backend
        self.keys = read_keys(config.api_keys)
        self.num_open: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        tenant = ""
        try:
            if self.keys and path not in OPEN_PATHS:
                tenant = scope["state"]["tenant"] = self._tenant(headers)
            self._check_length(headers.get("content-length", "0"))
            counted = path in LIMITED
            if counted:
                self._check_room(tenant)
        except PagodaError as error:
            await error_response(error, path)(scope, receive, send)
            return
        self.num_open[tenant] += counted
        try:
            await self.app(scope, self._bounded(receive), send)
        finally:
            self.num_open[tenant] -= counted
            if not self.num_open[tenant]:
                del self.num_open[tenant]

    def _tenant(self, headers: Headers) -> str:
        kind, _, word = headers.get("authorization", "").partition(" ")
        key = word.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.keys]
        if not any(matches):
            raise AuthenticationError("The API key is missing or wrong: send it as `Authorization: Bearer KEY`.")
        return self.backend.tenant_of(digest)

    def _check_length(self, given: str) -> None:
        if not given.isdecimal() or int(given) > self.config.max_body_bytes:
            raise BodyTooLargeError(f"The body is larger than {self.config.max_body_bytes} bytes.")

    def _check_room(self, tenant: str) -> None:
        share = self.config.max_concurrent_per_key
        if share and self.num_open[tenant] >= -(-share // self.config.num_http_workers):
            raise RateLimitError(f"This key has {share} requests open, the most allowed: wait for one to end.")
        most = self.backend.max_open
        if sum(self.num_open.values()) >= most:
            raise OverloadedError(f"{most} requests are open, the most allowed: try again later.")

    def _bounded(self, receive: Any) -> Any:
        seen = 0

        async def bounded() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.config.max_body_bytes:
                raise BodyTooLargeError(f"The body is larger than {self.config.max_body_bytes} bytes.")
            return message

        return bounded
