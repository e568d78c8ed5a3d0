"""The application: routes, error map and middleware put together."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from pagoda import __version__
from pagoda.config import ServeConfig
from pagoda.errors import PagodaError
from pagoda.serve import documents, error_map, generate, interactive, models, openai_chat, openai_completions, ops
from pagoda.serve.backend import Backend
from pagoda.serve.middleware import Guard, RequestLog


def make_app(backend: Backend, config: ServeConfig) -> FastAPI:
    """An ASGI application in front of `backend`."""
    layers = [Middleware(RequestLog)]
    if config.allow_origins:
        cors = {"allow_origins": config.allow_origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        layers.append(Middleware(CORSMiddleware, **cors))
    layers.append(Middleware(Guard, config=config, backend=backend))
    app = FastAPI(title="Pagoda", version=__version__, docs_url=None, redoc_url=None, middleware=layers)
    app.state.backend = backend
    app.add_exception_handler(PagodaError, error_map.on_pagoda_error)
    app.add_exception_handler(HTTPException, error_map.on_http_error)
    app.add_exception_handler(RequestValidationError, error_map.on_invalid)
    app.add_exception_handler(Exception, error_map.on_bug)
    for routes in (openai_chat, openai_completions, models, interactive, generate, ops):
        app.include_router(routes.router)
    documents.install(app)
    return app
