"""Answers on their way out: whole, or as server-sent events while they are made.

Nothing is sent before the engine has produced something (unless the operator wants it), so that
whatever prevents an answer is told by the HTTP status. From then on an error is an event in the
stream, and ends it.

While an answer is made the client is watched; once it has gone, everything is dropped at once. One
that is there and does not read holds up ``send``; then the engine's own limit of what may wait for
a reader counts, and the HTTP protocol's of how long it may take none.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Final

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from headway.server.config import ServerConfig
from headway.server.protocol.answer_format import error_event
from headway.server.protocol.errors import to_api_error
from headway.server.routes.event_stream import EventStream
from headway.server.serving import Answer

__all__ = ["EVENT_STREAM", "AnswerResponse"]

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

_log = logging.getLogger(__name__)


class AnswerResponse(Response):
    """Reads an answer while its client is there, and sends what comes.

    Until something has been sent, exceptions are left to the application's handlers.

    Args:
        answer: to send.
        is_stream: as server-sent events.
        config: how to serve.
    """

    def __init__(self, answer: Answer, is_stream: bool, config: ServerConfig) -> None:
        self._answer = answer
        self._is_stream = is_stream
        self._config = config
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
        if self._is_stream:
            await self._stream(send)
            return
        body = await self._answer.whole()
        headers = {"X-Request-Id": self._answer.request_id}
        await JSONResponse(body, headers=headers)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        config = self._config
        stream = EventStream(
            send,
            self.raw_headers,
            config.stream_keep_alive,
            config.stream_keep_alive_before_first_token,
        )
        async with stream:
            try:
                async with aclosing(self._answer.events()) as pieces:
                    async for piece in pieces:
                        await stream.send(piece)
                await stream.end()
            except Exception as error:
                if not stream.has_begun:
                    raise
                answer = to_api_error(error)
                if answer.status == 500:
                    _log.exception("request %s has failed", self._answer.request_id)
                await stream.end(error_event(answer))


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
