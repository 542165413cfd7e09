"""Completions from a vLLM server, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from openai import AsyncOpenAI

#: Longer than any answer should be silent for, so that one that never comes fails.
_TIMEOUT = 120.0


class Client(AsyncOpenAI):
    """The real client, of one server; ``model`` is what it asks for by default.

    Attributes:
        streams: all that were made with it.
    """

    def __init__(self, url: str, model: str) -> None:
        super().__init__(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=_TIMEOUT)
        self.model = model
        self.streams: list[Stream] = []

    async def alone(self, prompt: str, num_tokens: int, model: str | None = None) -> list[int]:
        """What the idle server answers."""
        return await Stream(self, prompt, num_tokens, model=model).end()

    @asynccontextmanager
    async def background(
        self, prompts: Sequence[str], num_tokens: int, *, num_begun: int, **body: Any
    ) -> AsyncIterator[list[Stream]]:
        """Streams that are not urgent, from when ``num_begun`` of them have begun to their end.

        At their end, none may have lost a token.
        """
        streams = [Stream(self, prompt, num_tokens, priority=10, **body) for prompt in prompts]
        await begun(streams, num_begun)
        yield streams
        for stream in streams:
            assert len(await stream.end()) == num_tokens


class Stream:
    """A greedy completion of exactly ``num_tokens`` tokens; it is under way when it is made.

    Args:
        client: of the server.
        prompt: the text to go on with.
        num_tokens: of the answer.
        model: the name of an adapter; None = the model itself.
        headers: in addition to the client's.
        body: what else the request says.
    """

    def __init__(
        self,
        client: Client,
        prompt: str,
        num_tokens: int,
        *,
        model: str | None = None,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> None:
        client.streams.append(self)
        #: Tokens that have come.
        self.token_ids: list[int] = []
        self.has_ended = False
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(
            self._read(
                client,
                model=model or client.model,
                prompt=prompt,
                max_tokens=num_tokens,
                temperature=0,
                stream=True,
                extra_headers=headers,
                extra_body={"ignore_eos": True, "return_token_ids": True, **body},
            )
        )

    async def reach(self, num_tokens: int) -> None:
        """Wait until so many tokens have come."""
        async with self._news:
            await self._news.wait_for(lambda: self.has_ended or len(self.token_ids) >= num_tokens)
        if self.has_ended:
            await self._task  # for what went wrong
        assert len(self.token_ids) >= num_tokens

    async def end(self) -> list[int]:
        """Wait for the end; all tokens."""
        await self._task
        return self.token_ids

    async def hang_up(self) -> None:
        """Close the connection; nothing happens if the answer has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, client: Client, **request: Any) -> None:
        try:
            async with await client.completions.create(**request) as chunks:
                async for chunk in chunks:
                    for choice in chunk.choices:
                        self.token_ids += choice.token_ids or []
                    await self._tell()
        finally:
            self.has_ended = True
            await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


async def begun(streams: Sequence[Stream], count: int) -> None:
    """Wait until any ``count`` of ``streams`` have begun."""
    pending = {asyncio.create_task(stream.reach(1)) for stream in streams}
    try:
        while len(streams) - len(pending) < count:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def hang_up(streams: Sequence[Stream]) -> None:
    """Close the connections of all ``streams``."""
    await asyncio.gather(*(stream.hang_up() for stream in streams))
