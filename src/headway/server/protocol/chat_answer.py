"""How ``/v1/chat/completions`` words its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headway.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from headway.engine.tokenizer import Tokenizer
from headway.server.protocol.answer_format import AnswerFormat
from headway.server.protocol.logprobs import chat_logprobs
from headway.server.protocol.requests import ChatCompletionRequest
from headway.server.protocol.response_types import ChatChoice, ChatLogprobs

__all__ = ["ChatAnswer"]


class ChatAnswer(AnswerFormat):
    """Choices with a message of the assistant.

    Args:
        request_id, model, body, prompts: see ``AnswerFormat``.
        tokenizer: the model's.
    """

    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(
        self,
        request_id: str,
        model: str,
        body: ChatCompletionRequest,
        prompts: Sequence[list[int]],
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(request_id, model, body, prompts)
        self._tokenizer = tokenizer
        self._has_logprobs = body.logprobs is True
        #: Choices whose role has been said.
        self._begun: set[int] = set()

    def pieces(
        self, index: int, completion: CompletionOutput, output: RequestOutput
    ) -> Iterable[Mapping[str, Any]]:
        if index not in self._begun:
            self._begun.add(index)
            yield _delta(index, {"role": "assistant", "content": ""}, None, None)
        finish_reason, text = completion.finish_reason, completion.new_text
        logprobs = self._logprobs(completion.new_logprobs) if completion.new_logprobs else None
        if text or logprobs is not None or finish_reason is not None:
            delta = {"content": text} if text else {}
            yield _delta(index, delta, logprobs, finish_reason)

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> ChatChoice:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion.logprobs or ()),
            "finish_reason": completion.finish_reason,
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
