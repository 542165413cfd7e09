"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from headway.server.protocol.requests import ChatCompletionRequest
from headway.server.protocol.response_types import ChatCompletion
from headway.server.routes.common import CurrentServing, CurrentTenant, call_of
from headway.server.routes.response import EVENT_STREAM, AnswerResponse

__all__ = ["router"]

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=None,
    responses={200: {"model": ChatCompletion, "content": EVENT_STREAM}},
)
async def create_chat_completion(
    request: Request, body: ChatCompletionRequest, tenant: CurrentTenant, serving: CurrentServing
) -> Response:
    answer = await serving.chat(call_of(request, tenant), body)
    return AnswerResponse(answer, body.stream is True, serving.config)
