"""How an answer is worded: whole, or in pieces as server-sent events.

A token costs little here: the part that all events of an answer share is encoded once, and the
events of a step are sent together.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

from headway.engine.outputs import CompletionOutput, RequestOutput
from headway.server.protocol.errors import ApiError
from headway.server.protocol.requests import GenerationRequest
from headway.server.protocol.response_types import Usage

__all__ = ["AnswerFormat", "Outputs", "error_event"]

#: What came at once: for each request of the engine that has something new, the index of its first
#: choice in the answer, and its output.
Outputs = list[tuple[int, RequestOutput]]

_DONE: Final = "data: [DONE]\n\n"

#: ASCII only: some clients take U+2028 and its like for the end of a line.
_dumps = json.JSONEncoder(separators=(",", ":")).encode


class AnswerFormat(ABC):
    """How an answer of one kind is worded; an object for each answer.

    Args:
        request_id: the answer's id.
        model: the name that the answer says.
        body: what was asked for.
        prompts: tokens of each prompt.
    """

    #: ``object`` of a whole answer, and of a piece of one in a stream.
    kinds: tuple[str, str]

    def __init__(
        self, request_id: str, model: str, body: GenerationRequest, prompts: Sequence[list[int]]
    ) -> None:
        whole, piece = self.kinds
        common: dict[str, Any] = {"id": request_id, "object": whole, "created": int(time.time())}
        common |= {"model": model, "system_fingerprint": None}
        if body.service_tier is not None:
            common["service_tier"] = body.service_tier
        self._common = common
        self._includes_usage = body.includes_usage
        self._has_continuous_usage = body.has_continuous_usage
        self._num_choices = body.num_choices
        self._num_prompt_tokens = sum(map(len, prompts))
        #: What the engine's requests have got so far, by the index of their first choice.
        self._outputs: dict[int, RequestOutput] = {}
        #: Choices whose end has been said in a stream.
        self._ended: set[int] = set()
        self._head = f'data: {_dumps(common | {"object": piece})[:-1]},"choices":['
        self._tail = '],"usage":null}\n\n' if body.includes_usage else "]}\n\n"

    @abstractmethod
    def pieces(
        self, index: int, completion: CompletionOutput, output: RequestOutput
    ) -> Iterable[Mapping[str, Any]]:
        """What has been added to a choice, as a stream's choice objects; often there is one.

        Args:
            index: of the choice in the answer.
            completion: the choice.
            output: of the request that it belongs to.
        """

    @abstractmethod
    def choice(
        self, index: int, completion: CompletionOutput, output: RequestOutput
    ) -> Mapping[str, Any]:
        """A finished choice; arguments as of ``pieces``."""

    def completion_tokens(self, completion: CompletionOutput) -> int:
        """Tokens that count as generated."""
        return len(completion.token_ids)

    def add(self, outputs: Outputs) -> None:
        """Take in what a step added."""
        self._outputs.update(outputs)

    def events(self, outputs: Outputs) -> bytes:
        """Take in what a step added, and say it in a stream."""
        self.add(outputs)
        tail = self._tail
        if self._has_continuous_usage:
            tail = f'],"usage":{_dumps(self._usage())}}}\n\n'
        return "".join(
            f"{self._head}{_dumps(piece)}{tail}"
            for first_index, output in outputs
            for piece in self._new_pieces(first_index, output)
        ).encode()

    def last_events(self) -> bytes:
        """How a stream ends, once all choices have."""
        usage = ""
        if self._includes_usage:
            usage = f'{self._head}],"usage":{_dumps(self._usage())}}}\n\n'
        return f"{usage}{_DONE}".encode()

    def body(self) -> dict[str, Any]:
        """The whole answer, once all choices have ended."""
        choices = [
            self.choice(first_index + completion.index, completion, output)
            for first_index, output in sorted(self._outputs.items(), key=itemgetter(0))
            for completion in output.outputs
        ]
        return self._common | {"choices": choices, "usage": self._usage()}

    def _new_pieces(self, first_index: int, output: RequestOutput) -> Iterator[Mapping[str, Any]]:
        """What has been added to the choices of one of the engine's requests."""
        for number in output.changed:
            index, completion = first_index + number, output.outputs[number]
            if index in self._ended:
                continue
            if completion.finish_reason is not None:
                self._ended.add(index)
            yield from self.pieces(index, completion, output)

    def _usage(self) -> Usage:
        """Of the choices as far as they are known."""
        completion_tokens = sum(
            self.completion_tokens(completion)
            for output in self._outputs.values()
            for completion in output.outputs
        )
        cached = sum(
            output.num_cached_tokens
            for first_index, output in self._outputs.items()
            if first_index % self._num_choices == 0  # a prompt counts once
        )
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._num_prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def error_event(error: ApiError) -> bytes:
    """An error in a stream that has begun; it is the last event."""
    return f"event: error\ndata: {_dumps(error.body())}\n\n".encode()
