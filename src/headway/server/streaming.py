"""Answers on their way out: whole, or as server-sent events while they are made.

Nothing is sent before the engine has produced something, so that whatever prevents an answer is
told by the HTTP status. From then on an error is an event in the stream, and ends it.

A token costs little here: what is the same in all events of an answer is spelled out once, and
what a step added to all choices of an answer goes out in one piece.

While an answer is made the client is watched; once it has gone, everything is dropped at once. One
that is there and does not read holds up ``send``; then the engine's own limit of what may wait for
a reader counts, and the HTTP protocol's of how long it may take none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Final

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from headway.engine.async_engine import AsyncEngine
from headway.engine.outputs import RequestOutput
from headway.server.active import ActiveRequests
from headway.server.answers import Usage
from headway.server.errors import to_api_error
from headway.server.generation import Generation, Outputs

__all__ = ["EVENT_STREAM", "AnswerFormat", "GenerationResponse"]

#: A stream, for the OpenAPI document.
EVENT_STREAM: Final = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            "required": ["data"],
        }
    }
}

_DONE: Final = "data: [DONE]\n\n"

_log = logging.getLogger(__name__)

#: ASCII only: some clients take U+2028 and its like for the end of a line.
_dumps = json.JSONEncoder(separators=(",", ":")).encode


class AnswerFormat(ABC):
    """How an endpoint words its answers.

    Args:
        request_id: the answer's id.
        model: the name that the client called it by.
        service_tier: repeated if it was given.
        includes_usage: end a stream with the token counts.
    """

    #: ``object`` of a whole answer, and of a piece of one in a stream.
    kinds: tuple[str, str]

    def __init__(
        self, request_id: str, model: str, service_tier: str | None, includes_usage: bool
    ) -> None:
        self.request_id = request_id
        whole, piece = self.kinds
        common: dict[str, Any] = {"id": request_id, "object": whole, "created": int(time.time())}
        common |= {"model": model, "system_fingerprint": None}
        if service_tier is not None:
            common["service_tier"] = service_tier
        self._common = common
        self._includes_usage = includes_usage
        self._head = f'data: {_dumps(common | {"object": piece})[:-1]},"choices":['
        self._tail = '],"usage":null}\n\n' if includes_usage else "]}\n\n"

    @abstractmethod
    def pieces(self, index: int, output: RequestOutput) -> Iterable[Mapping[str, Any]]:
        """What has been added to a choice, as a stream's choice objects; often there is one."""

    @abstractmethod
    def choice(self, index: int, output: RequestOutput) -> Mapping[str, Any]:
        """A finished choice."""

    def completion_tokens(self, output: RequestOutput) -> int:
        """Tokens that count as generated."""
        return len(output.outputs[0].token_ids)

    def events(self, outputs: Outputs) -> bytes:
        """What a stream says of some outputs."""
        return "".join(
            f"{self._head}{_dumps(piece)}{self._tail}"
            for index, output in outputs
            for piece in self.pieces(index, output)
        ).encode()

    def last_events(self, generation: Generation, outputs: Mapping[int, RequestOutput]) -> bytes:
        """How a stream ends, once all choices have."""
        usage = ""
        if self._includes_usage:
            usage = f'{self._head}],"usage":{_dumps(self._usage(generation, outputs))}}}\n\n'
        return f"{usage}{_DONE}".encode()

    def body(self, generation: Generation, outputs: Mapping[int, RequestOutput]) -> dict[str, Any]:
        """The whole answer."""
        return self._common | {
            "choices": [self.choice(index, outputs[index]) for index in sorted(outputs)],
            "usage": self._usage(generation, outputs),
        }

    def _usage(self, generation: Generation, outputs: Mapping[int, RequestOutput]) -> Usage:
        prompt_tokens = sum(map(len, generation.prompts))
        completion_tokens = sum(map(self.completion_tokens, outputs.values()))
        firsts = (outputs[index] for index in range(0, len(outputs), generation.num_choices))
        cached = sum(one.metrics.num_cached_tokens for one in firsts if one.metrics is not None)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class GenerationResponse(Response):
    """Generates while its client is there, and sends what comes.

    Until something has been sent, exceptions are left to the application's handlers.

    Args:
        engine: generates.
        active: where the request is entered.
        generation: what to generate.
        answer: how to word it.
        is_stream: as server-sent events.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        active: ActiveRequests,
        generation: Generation,
        answer: AnswerFormat,
        is_stream: bool,
    ) -> None:
        self._engine = engine
        self._active = active
        self._generation = generation
        self._answer = answer
        self._is_stream = is_stream
        self.status_code = 200
        self.background = None
        self.init_headers({"X-Request-Id": answer.request_id})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.create_task(self._serve(scope, receive, send))
        watching = asyncio.create_task(_wait_until_gone(receive))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._generation.request
        async with request.tenant.slot():
            with self._active.register(request):
                async with aclosing(self._generation.run(self._engine)) as steps:
                    if self._is_stream:
                        await self._stream(steps, send)
                        return
                    outputs = {index: one async for step in steps for index, one in step}
        body = self._answer.body(self._generation, outputs)
        headers = {"X-Request-Id": request.request_id}
        await JSONResponse(body, headers=headers)(scope, receive, send)

    async def _stream(self, steps: AsyncGenerator[Outputs, None], send: Send) -> None:
        step: Outputs | None = await anext(steps)
        outputs: dict[int, RequestOutput] = {}
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                    *self.raw_headers,
                ],
            }
        )
        try:
            while step is not None:
                outputs.update(step)
                if events := self._answer.events(step):
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                step = await anext(steps, None)
            last = self._answer.last_events(self._generation, outputs)
        except Exception as error:
            answer = to_api_error(error)
            if answer.status == 500:
                _log.exception("request %s has failed", self._answer.request_id)
            last = f"event: error\ndata: {_dumps(answer.body())}\n\n".encode()
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
