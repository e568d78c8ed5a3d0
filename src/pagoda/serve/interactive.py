"""POST /v1/chat/interactive: conversations that the engine remembers, so that a turn sends only its new text."""

import secrets
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pagoda.config import ServeConfig
from pagoda.errors import NotFoundError, PagodaError, PromptTooLongError, SessionExpiredError, TemplateError
from pagoda.offline import Piece, Pipeline, Prepared
from pagoda.serve.backend import Backend
from pagoda.serve.bodies import InteractiveBody, read_body
from pagoda.serve.documents import documented
from pagoda.serve.error_map import error_body
from pagoda.serve.generation import Generation, copies, new_answer_id, respond
from pagoda.text.template import ChatTemplate

router = APIRouter()
MARK = "<<pagoda:turn>>"


def continuation(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    """What follows a reply, up to where the next reply begins: the mark that closes the reply, then `messages`."""
    before = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
    parts = template.render([*before, *messages]).split(MARK)
    if len(parts) != 2:
        raise TemplateError("The chat template repeats earlier turns: use /v1/chat/completions with this model.")
    return parts[1]


def prepare_turn(
    pipe: Pipeline, config: ServeConfig, body: InteractiveBody, tenant: str, session: str | None, history_len: int
) -> Prepared:
    """The new text of a turn becomes ids. Runs in a thread."""
    messages = [{"role": "user", "content": body.prompt}] if isinstance(body.prompt, str) else body.prompt
    if history_len:
        ids = pipe.tokenizer.encode_continuation(continuation(pipe.template, messages))
    else:
        ids = pipe.encode_rendered(pipe.template.render(messages))
    return pipe.prepare(
        ids,
        body.generation(tenant, max_new_tokens=body.request_output_len),
        stop_words=pipe.template.stop_words,
        session_id=session,
        history_len=history_len,
        max_new_tokens=None,
        max_wait=config.queue_seconds,
    )


def nothing_said(session_id: int, history_len: int, reason: str | None) -> dict[str, Any]:
    """The shape of all answers."""
    counts = {"tokens": 0, "input_tokens": 0, "history_tokens": history_len}
    return {"text": "", **counts, "finish_reason": reason, "session_id": session_id}


class InteractiveWriter:
    """One JSON object a line, or one in all."""

    media_type = "application/x-ndjson"

    def __init__(self, session_id: int, history_len: int, generation: Generation):
        self._session_id, self._history_len, self._reply = session_id, history_len, generation.answers[0].reply

    def _now(self, text: str, reason: str | None) -> dict[str, Any]:
        reply = self._reply
        return nothing_said(self._session_id, self._history_len, reason) | {
            "text": text,
            "tokens": reply.generate_token_len,
            "input_tokens": max(0, reply.input_token_len - self._history_len),
            "cached_tokens": reply.cached_token_len,
        }

    def take(self, index: int, piece: Piece) -> bytes:
        if not piece.text and piece.finish_reason is None:
            return b""
        return orjson.dumps(self._now(piece.text, piece.finish_reason)) + b"\n"

    def end(self) -> bytes:
        return b""

    def failure(self, error: PagodaError) -> bytes:
        return orjson.dumps({**nothing_said(self._session_id, self._history_len, "error"), **error_body(error)}) + b"\n"

    def whole(self) -> dict[str, Any]:
        return self._now(self._reply.text, self._reply.finish_reason)


def session_name(tenant: str, session_id: int | str) -> str:
    """The engine's name of a client's session: keys do not see each other's."""
    return f"{tenant}:{session_id}"


async def history_of(backend: Backend, session: str, goes_on: bool) -> int:
    """Tokens that a session holds; 0 when there is none. Raises `SessionExpiredError` when a turn `goes_on` with one
    that was forgotten."""
    try:
        return len(await backend.call("session_tokens", session_id=session))
    except NotFoundError as error:
        backend.forget(session)
        if goes_on and isinstance(error, SessionExpiredError):
            raise
        return 0


async def end_session(backend: Backend, session: str) -> bool:
    """Forget a session; False when there is none."""
    backend.forget(session)
    return await backend.call("delete_session", session_id=session)


async def converse(request: Request, body: InteractiveBody) -> Response:
    """One turn, or the interruption or end of a session."""
    backend: Backend = request.app.state.backend
    backend.check_model(body.model)
    pipe, tenant = backend.pipe, request.state.tenant
    wanted = body.session_id if body.session_id >= 0 else secrets.randbelow(2**31)
    remembered = body.interactive_mode or body.session_id >= 0
    session = session_name(tenant, wanted) if remembered else None

    def brief(reason: str, history_len: int = 0) -> Response:
        shape = nothing_said(wanted, history_len, reason)
        return Response(orjson.dumps(shape) + (b"\n" if body.stream else b""), media_type="application/json")

    if session is not None and (body.cancel or body.stop is True):
        await backend.call("abort_requests", session_id=session)
        return brief("abort")
    ends = body.request_output_len == 0
    history_len = await history_of(backend, session, not ends) if session is not None else 0
    if ends:
        if session is not None and not body.interactive_mode:
            await end_session(backend, session)
        return brief("stop", history_len)
    body.stop = False if body.stop is True else body.stop
    try:
        prepared = await backend.prepare(prepare_turn, pipe, backend.config, body, tenant, session, history_len)
    except PromptTooLongError:  # the meaning that clients of this route know
        return brief("length", history_len)
    backend.log_prompt(request, prepared)
    generation = Generation(pipe, copies(prepared, tenant, new_answer_id()), backend.config.request_seconds)
    if session is not None and body.interactive_mode:
        backend.remember(session)
    elif session is not None:
        backend.forget(session)
        generation.at_end = lambda: pipe.engine.tell("delete_session", session_id=session)
    return await respond(request, generation, InteractiveWriter(wanted, history_len, generation), body.stream)


@router.post(
    "/v1/chat/interactive", **documented(InteractiveBody, "A turn of a session", stream="application/x-ndjson")
)
async def chat_interactive(request: Request) -> Response:
    return await converse(request, await read_body(request, InteractiveBody))
