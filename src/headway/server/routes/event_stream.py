"""A response of server-sent events that stays alive while there is nothing to say.

A request that waits or is paused may be silent for minutes, and proxies, load balancers and clients
with a time limit take a silent connection for a dead connection. So a stream that has been silent
for some time gets a comment, which clients skip. A stream that has not begun gets none unless the
operator wants it: the first byte commits the status, and a request that is turned away from the
queue after it could no longer be told so by 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Final

from starlette.types import Send

__all__ = ["EventStream"]

_COMMENT: Final = b": keep-alive\n\n"


class EventStream:
    """Sends events, the head of the response before the first of them; a context manager.

    An event costs nothing but a look at the clock: one timer runs for the whole stream.

    Args:
        send: the application's way to its client.
        headers: of the response, beside the headers of every stream.
        keep_alive: seconds of silence after which a comment is sent; 0 = none is.
        speaks_first: whether a comment may be what the response begins with.
    """

    def __init__(
        self,
        send: Send,
        headers: Iterable[tuple[bytes, bytes]],
        keep_alive: float,
        speaks_first: bool,
    ) -> None:
        self._send = send
        self._headers = headers
        self._keep_alive = keep_alive
        self._speaks_first = speaks_first
        #: Whether the status has been sent.
        self.has_begun = False
        self._loop = asyncio.get_running_loop()
        self._last_sent = self._loop.time()
        #: A client that does not read holds up whatever is sent: the next waits for it.
        self._sending = asyncio.Lock()
        self._comments: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        if self._keep_alive:
            self._comments = self._loop.create_task(self._break_silence())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._comments is not None:
            self._comments.cancel()
            await asyncio.gather(self._comments, return_exceptions=True)

    async def send(self, events: bytes) -> None:
        """Send events; none only begin the response."""
        async with self._sending:
            if not self.has_begun:
                self.has_begun = True
                await self._send(self._head())
            if events:
                await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self._last_sent = self._loop.time()

    async def end(self, events: bytes = b"") -> None:
        """Send the last events, after which nothing may come."""
        await self.__aexit__(None, None, None)
        await self.send(events)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_silence(self) -> None:
        while True:
            left = self._last_sent + self._keep_alive - self._loop.time()
            if left > 0:
                await asyncio.sleep(left)
            elif self.has_begun or self._speaks_first:
                await self.send(_COMMENT)
            else:
                await asyncio.sleep(self._keep_alive)

    def _head(self) -> dict[str, object]:
        return {
            "type": "http.response.start",
            "status": 200,
            "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
                *self._headers,
            ],
        }
