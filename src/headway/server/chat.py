"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from headway.engine.outputs import RequestOutput
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import TokenLogprobs
from headway.server.answers import ChatChoice, ChatCompletion, ChatLogprobs
from headway.server.auth import Tenant, authorize
from headway.server.config import ServerConfig
from headway.server.intake import accept, respond
from headway.server.logprobs import chat_logprobs
from headway.server.prompts import PromptEncoder
from headway.server.protocol import ChatCompletionRequest
from headway.server.streaming import EVENT_STREAM, AnswerFormat

__all__ = ["router"]

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=None,
    responses={200: {"model": ChatCompletion, "content": EVENT_STREAM}},
)
async def create_chat_completion(
    request: Request, body: ChatCompletionRequest, tenant: Annotated[Tenant, Depends(authorize)]
) -> Response:
    accepted = accept(request, body, tenant, "chatcmpl", 1)
    encoder: PromptEncoder = request.app.state.prompts
    config: ServerConfig = request.app.state.config
    prompt = await encoder.encode_chat([one.for_template() for one in body.messages])
    max_tokens = encoder.output_limit([prompt], body.max_completion_tokens or body.max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling_params(max_tokens, logprobs=logprobs)
    answer = _ChatAnswer(
        accepted.request_id,
        body.model or config.model_name,
        body.service_tier,
        body.includes_usage,
        tokenizer=encoder.tokenizer,
        has_logprobs=logprobs is not None,
    )
    return respond(request, body, accepted, [prompt], params, answer)


class _ChatAnswer(AnswerFormat):
    """Choices with a message of the assistant."""

    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, *common: Any, tokenizer: Tokenizer, has_logprobs: bool) -> None:
        super().__init__(*common)
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        #: Choices whose role has been said.
        self._begun: set[int] = set()

    def pieces(self, index: int, output: RequestOutput) -> Iterable[Mapping[str, Any]]:
        if index not in self._begun:
            self._begun.add(index)
            yield _delta(index, {"role": "assistant", "content": ""}, None, None)
        finish_reason = output.outputs[0].finish_reason if output.finished else None
        logprobs = self._logprobs(output.new_logprobs) if output.new_logprobs else None
        if output.new_text or logprobs is not None or finish_reason is not None:
            delta = {"content": output.new_text} if output.new_text else {}
            yield _delta(index, delta, logprobs, finish_reason)

    def choice(self, index: int, output: RequestOutput) -> ChatChoice:
        whole = output.outputs[0]
        return {
            "index": index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._logprobs(whole.logprobs or ()),
            "finish_reason": whole.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, tokens) if self._has_logprobs else None


def _delta(
    index: int,
    delta: Mapping[str, str],
    logprobs: ChatLogprobs | None,
    finish_reason: str | None,
) -> Mapping[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
