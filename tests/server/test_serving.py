"""Answers without HTTP, as a front end of another kind gets them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from headway.core.errors import UnknownRequest
from headway.engine.async_engine import AsyncEngine
from headway.engine.engine import Engine
from headway.server.config import ServerConfig
from headway.server.edge.tenants import Tenant
from headway.server.protocol.errors import ApiError
from headway.server.protocol.requests import ChatCompletionRequest, CompletionRequest
from headway.server.serving import Call, Serving

MakeEngine = Callable[..., Engine]
Run = Callable[[Callable[[Serving], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def run(make_engine: MakeEngine) -> Run:
    """``run(function)``: what ``function(serving)`` returns."""

    def run(function: Callable[[Serving], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            async with AsyncEngine(make_engine()) as engine:
                return await function(Serving(engine, ServerConfig(("story",))))

        return asyncio.run(main())

    return run


def test_a_whole_completion(run: Run, story: str) -> None:
    async def complete(serving: Serving) -> dict[str, Any]:
        body = CompletionRequest(prompt=[story[:7], story[:9]], n=2, max_tokens=5)
        call = Call(Tenant("batch"), request_id="line-1", priority=7)
        answer = await serving.complete(call, body)
        assert answer.request_id == "line-1"
        return await answer.whole()

    answer = run(complete)
    assert answer["id"] == "line-1"
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [story[7:12]] * 2 + [story[9:14]] * 2
    assert answer["usage"]["completion_tokens"] == 20


def test_the_events_of_a_chat(run: Run) -> None:
    async def chat(serving: Serving) -> bytes:
        messages: Any = [{"role": "user", "content": "It"}]
        body = ChatCompletionRequest(messages=messages, max_tokens=3)
        answer = await serving.chat(Call(Tenant("web")), body)
        return b"".join([piece async for piece in answer.events()])

    *events, done, rest = run(chat).split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert json.loads(events[0][6:])["choices"][0]["delta"]["role"] == "assistant"
    assert json.loads(events[-1][6:])["choices"][0]["finish_reason"] == "length"


def test_a_tenant_is_limited_there_too(run: Run) -> None:
    async def complete(serving: Serving) -> None:
        call = Call(Tenant("web", most_urgent_priority=5, max_concurrent=2), priority=5)
        body = CompletionRequest(prompt="It", n=2, max_tokens=3)
        first, second = [await serving.complete(call, body) for _ in range(2)]
        pieces = first.events()
        await anext(pieces)
        with pytest.raises(ApiError, match=r"2 sequences .* 2 are running") as refused:
            await second.whole()
        assert refused.value.status == 429
        await pieces.aclose()
        assert len((await (await serving.complete(call, body)).whole())["choices"]) == 2
        with pytest.raises(ApiError, match="priority is 4"):
            await serving.complete(call._replace(priority=4), body)

    run(complete)


def test_leaving_off_reading_aborts(run: Run) -> None:
    async def complete(serving: Serving) -> None:
        tenant = Tenant("web")
        body = CompletionRequest(prompt="It", max_tokens=700)
        answer = await serving.complete(Call(tenant, "mine"), body)
        pieces = answer.events()
        await anext(pieces)
        assert serving.get_request(tenant, "mine")["id"] == "mine"
        assert serving.list_requests(Tenant("other")) == []
        await pieces.aclose()
        with pytest.raises(UnknownRequest, match="mine"):
            serving.get_request(tenant, "mine")
        await serving.engine.drain()

    run(complete)
