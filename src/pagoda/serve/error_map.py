"""From our error tree to HTTP: one status and one body a family, the same for every route."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from pagoda.errors import PagodaError, UsageError

CODES = {
    "PromptTooLongError": "context_length_exceeded",
    "AuthenticationError": "invalid_api_key",
    "NotFoundError": "not_found",
    "SessionExpiredError": "session_expired",
    "RateLimitError": "rate_limit_exceeded",
    "OverloadedError": "overloaded",
    "EngineDeadError": "engine_unavailable",
}
FLAT = ("/v1/chat/interactive", "/generate", "/v1/encode")
"""Routes whose clients look for `message` at the top of the body."""


class ClientGoneError(PagodaError):
    """The client left before its answer was there; nobody reads this."""

    http_status = 499


def error_body(error: PagodaError) -> dict[str, Any]:
    """The body in OpenAI's shape."""
    kind = type(error).__name__
    detail = {"message": str(error), "type": error.kind, "param": getattr(error, "param", None)}
    return {"error": {**detail, "code": CODES.get(kind)}}


def error_response(error: PagodaError, path: str = "") -> Response:
    """The whole answer; 429 and 503 say when to come back."""
    body = error_body(error)
    if path in FLAT:
        body |= {"object": "error", "message": str(error), "code": error.http_status}
    headers = {}
    if error.http_status in (429, 503):
        headers["retry-after"] = str(max(1, round(getattr(error, "retry_after", 1))))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(body), error.http_status, headers, "application/json")


async def on_pagoda_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PagodaError)
    return error_response(error, request.url.path)


async def on_http_error(request: Request, error: Any) -> Response:
    """Starlette's own refusals: no such route, wrong method."""
    refusal = UsageError(f"{request.method} {request.url.path}: {error.detail}. The routes are listed at /docs.")
    refusal.http_status = error.status_code
    response = error_response(refusal, request.url.path)
    response.headers.update(error.headers or {})
    return response


async def on_invalid(request: Request, error: Any) -> Response:
    """FastAPI's 422 is our 400."""
    first = error.errors()[0]
    return error_response(UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}."), request.url.path)


async def on_bug(request: Request, error: Exception) -> Response:
    return error_response(PagodaError("The server failed on this request; its log says why."), request.url.path)
