"""What operators ask: is it well, which version is it, how is it doing."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.responses import PlainTextResponse

from headway import __version__
from headway.core.errors import EngineStopped
from headway.server.protocol.response_types import Status, Version
from headway.server.routes.common import CurrentServing

__all__ = ["router"]

router = APIRouter(tags=["operation"])


@router.get("/health", summary="Whether requests are served")
async def health(serving: CurrentServing) -> Status:
    if not serving.engine.is_alive:
        raise EngineStopped("the engine does not run")
    return {"status": "ok"}


@router.get("/version", summary="The server's version")
async def version() -> Version:
    return {"version": __version__}


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    content, content_type = request.app.state.metrics.render()
    return Response(content, media_type=content_type)
