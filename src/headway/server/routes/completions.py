"""``POST /v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from headway.server.protocol.requests import CompletionRequest
from headway.server.protocol.response_types import Completion
from headway.server.routes.common import CurrentServing, CurrentTenant, call_of
from headway.server.routes.response import EVENT_STREAM, AnswerResponse

__all__ = ["router"]

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/completions",
    summary="Complete a text",
    response_model=None,
    responses={200: {"model": Completion, "content": EVENT_STREAM}},
)
async def create_completion(
    request: Request, body: CompletionRequest, tenant: CurrentTenant, serving: CurrentServing
) -> Response:
    answer = await serving.complete(call_of(request, tenant), body)
    return AnswerResponse(answer, body.stream is True, serving.config)
