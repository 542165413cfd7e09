"""How ``/v1/completions`` words its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headway.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from headway.engine.tokenizer import Tokenizer
from headway.server.protocol.answer_format import AnswerFormat
from headway.server.protocol.logprobs import CompletionLogprobsBuilder
from headway.server.protocol.requests import CompletionRequest
from headway.server.protocol.response_types import CompletionChoice, CompletionLogprobs

__all__ = ["CompletionAnswer"]


class CompletionAnswer(AnswerFormat):
    """Choices with a text, which begins with the prompt if that is wanted.

    Args:
        request_id, model, body, prompts: see ``AnswerFormat``.
        tokenizer: the model's.
    """

    kinds = ("text_completion", "text_completion")

    def __init__(
        self,
        request_id: str,
        model: str,
        body: CompletionRequest,
        prompts: Sequence[list[int]],
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(request_id, model, body, prompts)
        self._tokenizer = tokenizer
        #: What choices begin with; None = their output.
        self._echoed = body.prompts if body.echo else None
        #: The engine cannot generate nothing: the one token is dropped.
        self._has_output = body.max_tokens != 0
        self._has_logprobs = body.logprobs is not None
        #: Of the choices of which something has been said.
        self._builders: dict[int, CompletionLogprobsBuilder] = {}

    def completion_tokens(self, completion: CompletionOutput) -> int:
        return super().completion_tokens(completion) if self._has_output else 0

    def pieces(
        self, index: int, completion: CompletionOutput, output: RequestOutput
    ) -> Iterable[Mapping[str, Any]]:
        text, logprobs = self._next(index, output, completion.new_text, completion.new_logprobs)
        finish_reason = completion.finish_reason
        if text or finish_reason is not None or (logprobs is not None and logprobs["tokens"]):
            yield _choice(index, text, logprobs, finish_reason)

    def choice(
        self, index: int, completion: CompletionOutput, output: RequestOutput
    ) -> Mapping[str, Any]:
        text, logprobs = self._next(index, output, completion.text, completion.logprobs or ())
        return _choice(index, text, logprobs, completion.finish_reason)

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
