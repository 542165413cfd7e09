"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response

from headway.engine.outputs import RequestOutput
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import TokenLogprobs
from headway.server.answers import Completion, CompletionChoice, CompletionLogprobs
from headway.server.auth import Tenant, authorize
from headway.server.config import ServerConfig
from headway.server.intake import accept, respond
from headway.server.logprobs import CompletionLogprobsBuilder
from headway.server.prompts import PromptEncoder
from headway.server.protocol import CompletionRequest
from headway.server.streaming import EVENT_STREAM, AnswerFormat

__all__ = ["router"]

router = APIRouter(tags=["completions"])

#: OpenAI's default.
_MAX_TOKENS: Final = 16


@router.post(
    "/v1/completions",
    summary="Complete a text",
    response_model=None,
    responses={200: {"model": Completion, "content": EVENT_STREAM}},
)
async def create_completion(
    request: Request, body: CompletionRequest, tenant: Annotated[Tenant, Depends(authorize)]
) -> Response:
    prompts = body.prompts
    accepted = accept(request, body, tenant, "cmpl", len(prompts))
    encoder: PromptEncoder = request.app.state.prompts
    config: ServerConfig = request.app.state.config
    token_ids = [one if isinstance(one, list) else await encoder.encode(one) for one in prompts]
    max_tokens = encoder.output_limit(token_ids, body.max_tokens, _MAX_TOKENS)
    params = body.sampling_params(
        max(1, max_tokens),  # the engine cannot do nothing; the token is dropped
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    answer = _CompletionAnswer(
        accepted.request_id,
        body.model or config.model_name,
        body.service_tier,
        body.includes_usage,
        tokenizer=encoder.tokenizer,
        echoed=prompts if body.echo else None,
        num_choices=body.num_choices,
        has_output=max_tokens > 0,
        has_logprobs=body.logprobs is not None,
    )
    return respond(request, body, accepted, token_ids, params, answer)


class _CompletionAnswer(AnswerFormat):
    """Choices with a text, which begins with the prompt if that is wanted."""

    kinds = ("text_completion", "text_completion")

    def __init__(
        self,
        *common: Any,
        tokenizer: Tokenizer,
        echoed: Sequence[str | list[int]] | None,
        num_choices: int,
        has_output: bool,
        has_logprobs: bool,
    ) -> None:
        super().__init__(*common)
        self._tokenizer = tokenizer
        self._echoed = echoed
        self._num_choices = num_choices
        self._has_output = has_output
        self._has_logprobs = has_logprobs
        #: Of the choices of which something has been said.
        self._builders: dict[int, CompletionLogprobsBuilder] = {}

    def completion_tokens(self, output: RequestOutput) -> int:
        return super().completion_tokens(output) if self._has_output else 0

    def pieces(self, index: int, output: RequestOutput) -> Iterable[Mapping[str, Any]]:
        text, logprobs = self._next(index, output, output.new_text, output.new_logprobs)
        finish_reason = output.outputs[0].finish_reason if output.finished else None
        if text or finish_reason is not None or (logprobs is not None and logprobs["tokens"]):
            yield _choice(index, text, logprobs, finish_reason)

    def choice(self, index: int, output: RequestOutput) -> Mapping[str, Any]:
        whole = output.outputs[0]
        text, logprobs = self._next(index, output, whole.text, whole.logprobs or ())
        return _choice(index, text, logprobs, whole.finish_reason)

    def _next(
        self, index: int, output: RequestOutput, text: str, tokens: Sequence[TokenLogprobs]
    ) -> tuple[str, CompletionLogprobs | None]:
        """A choice's next text and log-probabilities, after the prompt's if that is to come."""
        if not self._has_output:
            text, tokens = "", ()
        builder = self._builders.get(index)
        if builder is None:
            builder = self._builders[index] = CompletionLogprobsBuilder(self._tokenizer)
            if self._echoed is not None:
                prompt = self._echo(self._echoed[index // self._num_choices])
                if output.prompt_logprobs is not None:
                    builder.add_prompt(prompt, output.prompt_token_ids, output.prompt_logprobs)
                text = prompt + text
        builder.add(tokens)
        return text, builder.take() if self._has_logprobs else None

    def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=False)


def _choice(
    index: int, text: str, logprobs: CompletionLogprobs | None, finish_reason: str | None
) -> CompletionChoice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
