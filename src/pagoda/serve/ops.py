"""Routes for operators: health, metrics, tokens, sessions, aborts."""

import re
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pagoda import __version__
from pagoda.engine.metrics import EngineStats
from pagoda.engine.sessions import SessionInfo
from pagoda.errors import EngineDeadError, NotFoundError, RequestError
from pagoda.serve.backend import Backend
from pagoda.serve.bodies import AbortBody, DetokenizeBody, SessionFileBody, TokenizeBody, read_body
from pagoda.serve.documents import documented, failures
from pagoda.serve.exposition import METRICS_TYPE, exposition
from pagoda.serve.interactive import end_session, session_name

MAX_FILES = 32  # of one key
FILE_SECONDS = 120.0
router = APIRouter()


@router.get("/health", summary="Whether the process lives and the engine moves", responses=failures(503))
async def health(request: Request) -> dict[str, str]:
    state = request.app.state.backend.state
    if state not in ("ready", "draining"):
        raise EngineDeadError(f"The engine is {state}.")
    return {"status": "ok"}


@router.get("/ready", summary="Whether requests are taken", responses=failures(503))
async def ready(request: Request) -> dict[str, str]:
    state = request.app.state.backend.state
    if state != "ready":
        raise EngineDeadError(f"The engine is {state}.")
    return {"status": "ready"}


@router.get("/version", summary="Of this program", responses=failures(401))
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", summary="Counters in Prometheus' text format", responses=failures(401, 503))
async def metrics(request: Request) -> Response:
    backend: Backend = request.app.state.backend
    stats = msgspec.convert(await backend.call("stats"), EngineStats)
    return Response(exposition(stats, backend.name), media_type=METRICS_TYPE)


@router.post("/v1/embeddings", summary="Not offered", responses=failures(400, 401))
async def embeddings() -> Response:
    raise RequestError("Embeddings are not supported: this server generates text.")


@router.post("/tokenize", **documented(TokenizeBody, "Token ids of a text or of messages"))
async def tokenize(request: Request) -> dict[str, Any]:
    body = await read_body(request, TokenizeBody)
    backend: Backend = request.app.state.backend
    pipe = backend.pipe
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Give either prompt or messages.", "prompt")

    def work() -> tuple[list[int], list[str] | None]:
        if body.messages is not None:
            ids = pipe.encode_rendered(pipe.template.render(body.messages, body.add_generation_prompt, body.tools))
        else:
            pipe.check_length(body.prompt or "")
            ids = pipe.tokenizer.encode(body.prompt or "", add_bos=body.add_special_tokens)
        return ids, [pipe.tokenizer.token_str(i) for i in ids] if body.return_token_strs else None

    ids, words = await backend.prepare(work)
    return {"count": len(ids), "max_model_len": pipe.engine.info.session_len, "tokens": ids, "token_strs": words}


@router.post("/detokenize", **documented(DetokenizeBody, "Text of token ids"))
async def detokenize(request: Request) -> dict[str, str]:
    body = await read_body(request, DetokenizeBody)
    backend: Backend = request.app.state.backend
    last = backend.pipe.engine.info.vocab_size - 1
    if not all(0 <= token <= last for token in body.tokens):
        raise RequestError(f"tokens has a token id outside 0 to {last}, those the model has.", "tokens")
    return {"prompt": await backend.prepare(backend.pipe.tokenizer.decode, body.tokens, False)}


@router.post("/abort", **documented(AbortBody, "End running answers of this key"))
@router.post("/abort_request", include_in_schema=False)
async def abort(request: Request) -> dict[str, int]:
    body = await read_body(request, AbortBody)
    number = re.sub(r"^(chatcmpl|cmpl)-", "", body.request_id or "")
    if not body.abort_all and not re.fullmatch(r"[0-9a-f]{32}", number):
        raise RequestError("Give the id of an answer as request_id, or abort_all: true.", "request_id")
    prefix = f"{request.state.tenant}-" + ("" if body.abort_all else f"{number}-")
    return {"aborted": await request.app.state.backend.call("abort_requests", prefix=prefix)}


@router.get("/v1/sessions", summary="The conversations of this key that are remembered", responses=failures(401, 503))
async def sessions(request: Request) -> dict[str, Any]:
    prefix = session_name(request.state.tenant, "")
    found = await request.app.state.backend.call("list_sessions", prefix=prefix)
    shape = [
        {"id": s.id[len(prefix) :], "tokens": s.num_tokens, "idle_seconds": round(s.idle, 1), "busy": s.busy}
        for s in msgspec.convert(found, list[SessionInfo])
    ]
    return {"object": "list", "data": shape}


@router.delete("/v1/sessions/{session_id}", summary="Forget a conversation", responses=failures(401, 404, 503))
async def delete_session(request: Request, session_id: str) -> dict[str, Any]:
    name = session_name(request.state.tenant, session_id)
    if not await end_session(request.app.state.backend, name):
        raise NotFoundError(f"There is no session {session_id[:64]!r}.")
    return {"id": session_id, "object": "session", "deleted": True}


async def _file(request: Request, name: str, most: int = 0) -> dict[str, Any]:
    """Arguments of the call that saves or restores this key's sessions. With `most`, a new file is refused when the key
    has so many."""
    backend, tenant = request.app.state.backend, request.state.tenant
    if backend.config.session_dir is None:
        raise RequestError("Sessions cannot be saved: the operator starts the server with --session-dir FOLDER.")

    def place() -> Path:
        folder = Path(backend.config.session_dir).resolve() / tenant
        if tenant and folder.parent.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{name}.sessions"
        if most and not path.exists() and len(list(folder.glob("*.sessions"))) >= most:
            raise RequestError(f"This key has {most} sessions files, the most allowed: use the name of one.", "name")
        return path

    path = await backend.prepare(place)
    return {"path": str(path), "prefix": session_name(tenant, ""), "timeout": FILE_SECONDS}


@router.post("/v1/sessions/save", **documented(SessionFileBody, "Save this key's conversations to a file"))
async def save_sessions(request: Request) -> dict[str, Any]:
    body = await read_body(request, SessionFileBody)
    number = await request.app.state.backend.call("save_sessions", **await _file(request, body.name, MAX_FILES))
    return {"saved": body.name, "sessions": number}


@router.post("/v1/sessions/restore", **documented(SessionFileBody, "Read this key's conversations back"))
async def restore_sessions(request: Request) -> dict[str, Any]:
    body = await read_body(request, SessionFileBody)
    number = await request.app.state.backend.call("restore_sessions", **await _file(request, body.name))
    return {"restored": number}
