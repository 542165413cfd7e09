"""``/v1/chat/completions``, through OpenAI's own client where it lets the request through."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from headway.core.request import SamplingParams
from headway.engine.config import EngineConfig
from headway.engine.llm import LLM

#: With what the template makes of them, 24 tokens of the byte tokenizer.
MESSAGES: Any = [{"role": "user", "content": "Go on."}]
LENGTH = len("user: Go on.\nassistant: ")


def test_a_whole_answer(client: OpenAI, story: str) -> None:
    answer = client.chat.completions.create(
        model="story", messages=MESSAGES, max_completion_tokens=9
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", story[LENGTH:][:9])
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "story")
    assert answer.service_tier is None and answer.system_fingerprint is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (LENGTH, 9)


def test_a_stream_adds_up_to_the_whole(client: OpenAI, story: str) -> None:
    stream = client.chat.completions.create(
        model="story",
        messages=MESSAGES,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        service_tier="priority",
    )
    first, *pieces, last = list(stream)
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [piece.choices[0].delta.role for piece in pieces] == [None] * len(pieces)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == story[LENGTH:][:9]
    ends = [piece.choices[0].finish_reason for piece in pieces]
    assert ends == [None] * (len(pieces) - 1) + ["length"]
    assert last.choices == [] and last.usage is not None
    assert last.usage.total_tokens == LENGTH + 9
    assert {piece.service_tier for piece in (first, *pieces, last)} == {"priority"}


def test_openais_own_accumulator_takes_the_stream(client: OpenAI, story: str) -> None:
    with client.chat.completions.stream(
        model="story", messages=MESSAGES, stop=["rain"], n=2
    ) as stream:
        answer = stream.get_final_completion()
    expected = story[LENGTH : story.index("rain")]
    assert [one.message.content for one in answer.choices] == [expected] * 2


def test_an_answer_may_take_what_is_left_of_the_context(
    serve: Callable[..., Any], make_engine: Callable[..., Any]
) -> None:
    server = serve(make_engine(max_model_len=40))
    answer = server.call("POST", "/v1/chat/completions", {"messages": MESSAGES})
    assert answer.json()["usage"]["completion_tokens"] == 40 - LENGTH
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_precedes_max_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="story", messages=MESSAGES, max_tokens=9, max_completion_tokens=3
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_contents_of_every_kind(client: OpenAI, story: str) -> None:
    messages: Any = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}],
        },
        {"role": "developer", "content": "b", "name": "dev"},
        {"role": "user", "content": "c"},
    ]
    answer = client.chat.completions.create(model="story", messages=messages, max_tokens=2)
    prompt = "system: a\n\ndeveloper: b\nuser: c\nassistant: "
    assert answer.choices[0].message.content == story[len(prompt) :][:2]


def test_an_answer_can_be_sent_back(client: OpenAI) -> None:
    first = client.chat.completions.create(model="story", messages=MESSAGES, max_tokens=9)
    history: Any = [*MESSAGES, first.choices[0].message, *MESSAGES]
    second = client.chat.completions.create(model="story", messages=history, max_tokens=1)
    assert second.usage is not None and second.usage.prompt_tokens > 2 * LENGTH


def test_what_the_template_refuses(client: OpenAI) -> None:
    messages: Any = [*MESSAGES, {"role": "tool", "content": "4", "tool_call_id": "1"}]
    with pytest.raises(BadRequestError, match="there are no tools"):
        client.chat.completions.create(model="story", messages=messages)


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs(client: OpenAI, story: str, is_stream: bool) -> None:
    padding = "x" * (story.index("—") - LENGTH)
    answer: Any = client.chat.completions.create(
        model="story",
        messages=[{"role": "user", "content": f"Go on.{padding}"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        stream=is_stream,
    )
    choices = [piece.choices[0] for piece in answer] if is_stream else [answer.choices[0]]
    found = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert [one.token for one in found] == [r"\xe2", r"\x80", r"\x94", " "]
    assert bytes(byte for one in found for byte in one.bytes) == "— ".encode()
    assert [one.logprob for one in found] == [pytest.approx(math.log(0.5))] * 4
    for one in found:
        likeliest, second = one.top_logprobs
        assert (likeliest.token, likeliest.bytes) == (one.token, one.bytes)
        assert second.logprob == pytest.approx(2 * math.log(0.5))


def test_no_alternatives_unless_asked_for(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="story", messages=MESSAGES, max_tokens=1, logprobs=True
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert logprobs.content[0].top_logprobs == []


def test_many_streams_at_once(server: Any, story: str) -> None:
    async def text(client: AsyncOpenAI, count: int) -> str:
        stream = await client.chat.completions.create(
            model="story", messages=MESSAGES, max_tokens=count, stream=True
        )
        return "".join([piece.choices[0].delta.content or "" async for piece in stream])

    async def test() -> None:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            texts = await asyncio.gather(*(text(client, 1 + n % 20) for n in range(60)))
        assert texts == [story[LENGTH:][: 1 + n % 20] for n in range(60)]

    asyncio.run(test())


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("messages[0].content", {"messages": [{"role": "assistant", "content": None}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
    ("messages[0].tool_calls", {"messages": [MESSAGES[0] | {"tool_calls": [{}]}]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("logprobs", {"logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("n", {"n": 1.0}),
    ("audio", {"audio": {"voice": "ash", "format": "wav"}}),
    ("function_call", {"function_call": "auto"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("prediction", {"prediction": {"type": "content", "content": "a"}}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("store", {"store": True}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("verbosity", {"verbosity": "high"}),
    ("web_search_options", {"web_search_options": {}}),
    ("metadata.a", {"metadata": {"a": 1}}),
    ("prompt", {"prompt": "Go on."}),
    ("echo", {"echo": True}),
]


def test_a_value_that_cannot_be_honoured_is_named(server: Any) -> None:
    for param, more in REFUSED:
        answer = server.call("POST", "/v1/chat/completions", {"messages": MESSAGES} | more)
        assert answer.status == 400, more
        error = answer.error()
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert param in error["message"]


def test_values_that_cannot_change_the_answer_are_accepted(server: Any) -> None:
    nothing = {
        "metadata": {"purpose": "test"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "reasoning_effort": None,
        "response_format": {"type": "text"},
        "safety_identifier": "me",
        "store": False,
        "tool_choice": "none",
        "tools": [],
        "user": "me",
        "verbosity": "medium",
        "max_tokens": 1,
    }
    for more in (nothing, nothing | {"tool_choice": "auto"}):
        answer = server.call("POST", "/v1/chat/completions", {"messages": MESSAGES} | more)
        assert answer.status == 200


def test_a_conversation_that_is_too_long(server: Any) -> None:
    messages = [{"role": "user", "content": "a" * 5000}]
    answer = server.call("POST", "/v1/chat/completions", {"messages": messages})
    assert answer.status == 400
    assert answer.error()["code"] == "context_length_exceeded"


def test_parameters_reach_the_engine(server: Any) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "temperature": 0, "seed": 7, "n": 2}
    assert server.call("POST", "/v1/chat/completions", body).status == 200
    (output,) = server.ended
    params = output.metrics.sampling_params
    assert (output.metrics.num_sequences, params.seed, params.temperature) == (2, 7, 0)


@pytest.mark.model
def test_the_real_model_answers_as_it_does_offline(serve: Callable[..., Any], llm: LLM) -> None:
    messages: Any = [{"role": "user", "content": "Why do queues form? Answer in one sentence."}]
    (offline,) = llm.chat(messages, SamplingParams(max_tokens=40, temperature=0, logprobs=1))
    engine = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512, kv_cache_bytes=200_000_000
    ).build()
    with serve(engine).client() as client:
        whole = client.chat.completions.create(
            model="story", messages=messages, max_tokens=40, temperature=0, logprobs=True
        )
        stream = client.chat.completions.create(
            model="story", messages=messages, max_tokens=40, temperature=0, stream=True
        )
        streamed = "".join(piece.choices[0].delta.content or "" for piece in stream)
    (expected,) = offline.outputs
    assert whole.choices[0].message.content == expected.text
    assert streamed == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and expected.logprobs is not None
    assert [one.logprob for one in logprobs.content] == [one.logprob for one in expected.logprobs]
