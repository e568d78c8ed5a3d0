"""The OpenAPI document and Swagger's page, which needs no network."""

from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import FileResponse, Response

from pagoda.errors import MissingExtraError
from pagoda.serve.bodies import Body

REFERENCE = "#/components/schemas/{model}"
MEANINGS = {
    400: "The request cannot be done as asked",
    401: "The key is missing or wrong",
    404: "No such model, session or request",
    405: "The route has other methods",
    408: "The body did not arrive in time",
    409: "The session is answering already",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The key has too many requests open",
    503: "The engine is full, or not there",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"],
                             "properties": {"message": {"type": "string"}, "type": {"type": "string"}}}},
}  # fmt: skip
router = APIRouter(include_in_schema=False)


def failures(*codes: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": ERROR}}
    return {code: {"description": MEANINGS[code], "content": content} for code in codes}


def documented(body: type[Body], summary: str, stream: str | None = None) -> dict[str, Any]:
    """Arguments of a route that reads its body itself, so that the document still tells of it."""
    good: dict[str, Any] = {"application/json": {}}
    if stream is not None:
        good[stream] = {}
    schema = {"$ref": REFERENCE.format(model=body.__name__)}
    return {
        "summary": summary,
        "responses": {200: {"description": "The answer", "content": good}, **failures(*MEANINGS)},
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        },
    }


def families(kind: type[Body]) -> list[type[Body]]:
    """All bodies that are read by some route."""
    return [each for sub in kind.__subclasses__() for each in (sub, *families(sub))]


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies' schemas among its components."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = models_json_schema([(b, "validation") for b in families(Body)], ref_template=REFERENCE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas.get("$defs", {}))
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


@router.get("/")
@router.get("/docs")
async def docs() -> Response:
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Pagoda",
        swagger_js_url="docs-assets/swagger-ui.js",
        swagger_css_url="docs-assets/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


@router.get("/docs-assets/swagger-ui.{kind}")
async def docs_asset(kind: str) -> Response:
    try:
        from swagger_ui_bundle import swagger_ui_path
    except ImportError:
        raise MissingExtraError(
            "The page needs the package swagger-ui-bundle: run `pip install 'pagoda-llm[serve]'`."
        ) from None
    name = {"js": "swagger-ui-bundle.js", "css": "swagger-ui.css"}.get(kind)
    if name is None:
        return Response(status_code=404)
    return FileResponse(f"{swagger_ui_path}/{name}")


def install(app: FastAPI) -> None:
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    app.include_router(router)
