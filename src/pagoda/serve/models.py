"""GET /v1/models: the one model of this server."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from pagoda.errors import NotFoundError
from pagoda.serve.backend import Backend
from pagoda.serve.documents import failures

router = APIRouter(responses=failures(401, 404, 503))
STARTED = int(time.time())


def card(backend: Backend) -> dict[str, Any]:
    return {
        "id": backend.name,
        "object": "model",
        "created": STARTED,
        "owned_by": "pagoda",
        "root": backend.model,
        "parent": None,
        "max_model_len": backend.pipe.engine.info.session_len,
    }


@router.get("/v1/models", summary="The models that are served")
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [card(request.app.state.backend)]}


@router.get("/v1/models/{model_id:path}", summary="One model")
async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    backend: Backend = request.app.state.backend
    if model_id != backend.name:
        raise NotFoundError(f"There is no model {model_id[:128]!r}: this server has {backend.name!r}.")
    return card(backend)
