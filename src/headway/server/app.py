"""The application: routes, who may use them, and what becomes of errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from headway import __version__
from headway.engine.client import EngineClient
from headway.server.config import ServerConfig
from headway.server.edge.auth import AuthMiddleware
from headway.server.edge.hosts import HostMiddleware
from headway.server.edge.limits import BodyLimitMiddleware
from headway.server.error_handlers import add_error_handlers
from headway.server.protocol.response_types import ErrorBody
from headway.server.routes import add_routes
from headway.server.serving import Serving
from headway.server.telemetry.metrics import Metrics
from headway.server.telemetry.tracing import Tracer

__all__ = ["create_app"]

_DESCRIPTION: Final = """
OpenAI's API, in which the urgent request goes next: give a `priority` (smaller is more urgent) in
the body or in the header `X-Headway-Priority`.
"""

#: What every route may answer instead of its own responses.
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {
        "model": ErrorBody,
        "description": (
            "The request is refused: 400 a value is wrong, 401 no API key, 403 a priority the key "
            "does not allow, 404 there is no such thing, 408 it took too long to arrive, 409 its "
            "id is in use, 413 it is too long, 421 the server does not answer to this Host, 429 "
            "the key has as many sequences as it may."
        ),
    },
    "5XX": {
        "model": ErrorBody,
        "description": (
            "503: there is no room now, or the server is stopping; where `Retry-After` is given, "
            "try again then. 500: a bug."
        ),
    },
}


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The document; it asks for a key only if the server does."""
        document = super().openapi()
        if not self.state.serving.config.api_keys:
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation.pop("security", None)
        return document


def create_app(engine: EngineClient, config: ServerConfig) -> FastAPI:
    """The server as an ASGI application, which owns the engine: it starts it and shuts it down.

    Raises:
        ConfigError: spans are to be sent, and cannot be.
    """
    tracer = None
    if config.otlp_endpoint is not None:
        tracer = Tracer(engine, config.otlp_endpoint, config.model_name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.shutdown()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    # From the outside in; who it is comes first, so that strangers' bodies are not received.
    middleware = [
        Middleware(AuthMiddleware, api_keys=config.api_keys),
        Middleware(BodyLimitMiddleware, max_body_bytes=config.max_body_bytes),
    ]
    if config.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    if not config.is_protected:
        hosts = (config.host, *config.allowed_hosts)
        middleware.insert(0, Middleware(HostMiddleware, allowed_hosts=hosts))
    app = _App(
        title="Headway",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        middleware=middleware,
        responses=_ERRORS,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    add_error_handlers(app)
    app.state.serving = Serving(engine, config, tracer)
    app.state.metrics = Metrics(
        engine,
        config.model_name,
        priorities=(config.default_priority, *config.service_tiers.values()),
        tenants=[key.tenant for key in config.api_keys] if config.metrics_by_tenant else None,
    )
    add_routes(app)
    return app
