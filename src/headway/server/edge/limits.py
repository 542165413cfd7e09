"""Bounds on what a client can make the server hold or wait for, whatever the client sends.

Time and sockets are bounded in the HTTP protocol, below ASGI, where a client that trickles its
request or never reads its response can be seen, and cut off, whatever the application is doing:

- a request must have arrived whole ``request_timeout`` after its first byte (or the connection);
- its head may have ``MAX_HEAD_BYTES``;
- a client for which bytes are waiting must take some every ``send_timeout``; otherwise the
  connection is aborted, which the application sees as any other disconnect.

The size of bodies is bounded by a middleware, which also receives them: the application starts once
a request is complete.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from functools import partial
from typing import Any, Final, cast

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from headway.server.config import ServerConfig
from headway.server.protocol.errors import ApiError

__all__ = ["MAX_HEAD_BYTES", "BodyLimitMiddleware", "limited_protocol"]

#: Bytes of a request line and its headers; clients send a few hundred.
MAX_HEAD_BYTES: Final = 64 << 10


class BodyLimitMiddleware:
    """Receives the whole body, and refuses one that is too long with 413.

    Args:
        app: gets the body in one message.
        max_body_bytes: the longest body.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A body that is announced to be too long is not waited for; others may be chunked.
        length = int(Headers(scope=scope).get("content-length", "0"))
        body, is_complete = bytearray(), False
        while not is_complete and length <= self.max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            length = max(length, len(body))
            is_complete = not message.get("more_body", False)
        if length > self.max_body_bytes:
            await self._refuse(length)(scope, receive, send)
            return
        messages: list[Message] = [
            {"type": "http.request", "body": bytes(body), "more_body": False}
        ]
        del body

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _refuse(self, length: int) -> ASGIApp:
        return ApiError(
            413,
            f"the body has {length} bytes or more, may have at most {self.max_body_bytes}",
            code="body_too_large",
        ).response()


def limited_protocol(config: ServerConfig) -> type[asyncio.Protocol]:
    """The HTTP protocol for uvicorn, with the limits of ``config``."""
    protocol = partial(
        _LimitedProtocol, request_timeout=config.request_timeout, send_timeout=config.send_timeout
    )
    return cast("type[asyncio.Protocol]", protocol)


class _LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with two more timers; it has one itself, for idle connections."""

    def __init__(
        self, *args: Any, request_timeout: float, send_timeout: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._request_timeout = request_timeout
        self._send_timeout = send_timeout
        #: Runs while a request is arriving.
        self._arrival: asyncio.TimerHandle | None = None
        #: Runs while bytes are waiting for the client.
        self._progress: asyncio.TimerHandle | None = None
        self._num_unsent = 0
        self._is_in_head = True
        #: Received of a head that is not complete.
        self._num_head_bytes = 0
        #: The request that is being answered; more may have arrived behind it.
        self._answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Writing is "paused" as soon as the kernel takes no more, so that no unsent byte goes
        # unnoticed. The application waits a little earlier than it would have to.
        transport.set_write_buffer_limits(high=0)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._progress):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        # uvicorn tells the request that arrived last.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    # ------------------------------------------------------------------ requests

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._await_request()
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            message = f"the request's head has more than {MAX_HEAD_BYTES} bytes"
            self._refuse(ApiError(431, message, code="head_too_large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_request()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._num_head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        super().on_message_complete()

    def _await_request(self) -> None:
        if self._arrival is None:
            self._arrival = self.loop.call_later(self._request_timeout, self._give_up)

    def _give_up(self) -> None:
        message = f"the request has not arrived within {self._request_timeout:g} s"
        self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer in place of the application, unless it has begun to, and hang up."""
        cycle = self.cycle  # of the last request whose head has arrived
        if self.transport.is_closing():
            return
        if cycle is None or (
            cycle.response_complete if self._is_in_head else not cycle.response_started
        ):
            response = error.response()
            lines = [STATUS_LINE[error.status].rstrip()]
            lines += [name + b": " + value for name, value in response.raw_headers]
            lines += [b"connection: close", b"", bytes(response.body)]
            self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    # ------------------------------------------------------------------ responses

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_progress()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._progress is not None:
            self._progress.cancel()
            self._progress = None

    def _await_progress(self) -> None:
        self._num_unsent = self.transport.get_write_buffer_size()
        self._progress = self.loop.call_later(self._send_timeout, self._check_progress)

    def _check_progress(self) -> None:
        if self.transport.get_write_buffer_size() < self._num_unsent:
            self._await_progress()
        else:
            # Without lingering: the kernel, too, drops what nobody reads, and says so.
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
