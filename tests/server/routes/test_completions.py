"""``/v1/completions``, through OpenAI's own client where it lets the request through."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headway.core.request import MAX_CACHE_SALT as ENGINES_MAX_CACHE_SALT
from headway.engine.outputs import RequestMetrics
from headway.server.edge.tenants import Tenant
from headway.server.protocol.requests import MAX_CACHE_SALT
from headway.server.telemetry.tracing import Tracer


def metrics(server: Any) -> list[RequestMetrics]:
    """Of the engine's requests that have ended, in the order of their ends."""
    return [output.metrics for output in server.ended]


def events(body: bytes) -> list[dict[str, Any]]:
    """The objects of a stream, which must end as OpenAI's do."""
    *pieces, end, rest = body.decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


# --- one choice -----------------------------------------------------------------------------------


def test_a_whole_answer(client: OpenAI, story: str) -> None:
    answer = client.completions.create(model="story", prompt=story[:7])
    assert answer.choices[0].text == story[7:23]  # OpenAI's default is 16 tokens
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].index == 0
    assert answer.choices[0].logprobs is None
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "story")
    assert answer.usage is not None
    assert answer.usage.to_dict() == {
        "prompt_tokens": 7,
        "completion_tokens": 16,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer._request_id == answer.id


def test_the_fields_of_a_whole_answer(server: Any, story: str) -> None:
    body = {"prompt": story[:7], "max_tokens": 2, "service_tier": "flex"}
    answer = server.call("POST", "/v1/completions", body)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found.pop("created") > 1_700_000_000
    assert found.pop("usage")["total_tokens"] == 9
    assert found == {
        "id": answer.headers["X-Request-Id"],
        "object": "text_completion",
        "model": "story",
        "choices": [{"index": 0, "text": "a ", "logprobs": None, "finish_reason": "length"}],
        "service_tier": "flex",
        "system_fingerprint": None,
    }


def test_a_stream_adds_up_to_the_whole(client: OpenAI, story: str) -> None:
    stream = client.completions.create(
        model="story",
        prompt=story[:7],
        max_tokens=90,
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == story[7:95]  # 3 bytes in "—"
    ends = [piece.choices[0].finish_reason for piece in pieces]
    assert ends == [None] * (len(pieces) - 1) + ["length"]
    assert len({(piece.id, piece.created, piece.model) for piece in (*pieces, last)}) == 1
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 90


def test_a_stream_as_bytes(server: Any, story: str) -> None:
    body = {"prompt": story[:7], "max_tokens": 3, "stream": True}
    answer = server.call("POST", "/v1/completions", body, {"X-Request-Id": "mine"})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["X-Request-Id"] == "mine"
    found = events(answer.body)
    assert {piece["id"] for piece in found} == {"mine"}
    assert all("usage" not in piece for piece in found)
    assert "".join(piece["choices"][0]["text"] for piece in found) == story[7:10]


def test_every_piece_of_a_stream_may_have_the_usage_so_far(client: OpenAI, story: str) -> None:
    def pieces(**options: Any) -> list[Any]:
        stream = client.completions.create(
            model="story",
            prompt=story[:7],
            n=2,
            max_tokens=5,
            stream=True,
            stream_options=options,  # type: ignore[arg-type]
        )
        return list(stream)

    *begun, last = pieces(include_usage=True, continuous_usage_stats=True)
    assert len(begun) > 1
    counts = [piece.usage.completion_tokens for piece in (*begun, last)]
    assert counts == sorted(counts)
    assert counts[0] > 0 and counts[-1] == 10
    texts = ["", ""]
    for piece in begun:
        texts[piece.choices[0].index] += piece.choices[0].text
        assert piece.usage.completion_tokens >= sum(map(len, texts))
        assert piece.usage.total_tokens == 7 + piece.usage.completion_tokens
    assert last.choices == []
    for options in ({"continuous_usage_stats": True}, {"include_usage": False}):
        assert all(piece.usage is None for piece in pieces(**options))


@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_texts_end_the_output(client: OpenAI, story: str, is_stream: bool) -> None:
    answer: Any = client.completions.create(
        model="story", prompt=story[:7], stop=["xyz", "dark"], max_tokens=50, stream=is_stream
    )
    pieces = list(answer) if is_stream else [answer]
    assert "".join(piece.choices[0].text for piece in pieces) == "a "
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_one_stop_text_and_a_stop_token(client: OpenAI, story: str) -> None:
    def text(**more: Any) -> str:
        answer = client.completions.create(
            model="story", prompt=story[:7], max_tokens=50, extra_body=more
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].text

    assert text(stop="dark") == "a "
    assert text(stop_token_ids=[ord("k")]) == "a dar"


def test_parameters_reach_the_engine(client: OpenAI, server: Any, story: str) -> None:
    client.completions.create(
        model="story",
        prompt=story[:7],
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        seed=-1,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        logit_bias={"65": 7},
        extra_body={
            "top_k": 9,
            "min_p": 0.125,
            "min_tokens": 2,
            "repetition_penalty": 1.25,
            "ignore_eos": True,
            "stop_token_ids": [3],
        },
    )
    params = metrics(server)[0].sampling_params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.25, 9)
    assert params.seed == 2**64 - 1
    assert (params.presence_penalty, params.frequency_penalty) == (1.5, -0.5)
    assert params.logit_bias == {65: 7}
    assert (params.min_p, params.min_tokens, params.repetition_penalty) == (0.125, 2, 1.25)
    assert params.ignore_eos and params.stop_token_ids == {3}


def test_without_parameters_the_defaults_are_openais(
    client: OpenAI, server: Any, story: str
) -> None:
    client.completions.create(model="story", prompt=story[:7], n=None, stop=None, temperature=None)
    params = metrics(server)[0].sampling_params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)


def test_the_prefix_cache_shows_in_the_usage(client: OpenAI, story: str) -> None:
    def cached() -> int:
        answer = client.completions.create(model="story", prompt=story[:30], max_tokens=1)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() > 0


# --- prompts and choices --------------------------------------------------------------------------


def test_prompts_of_every_kind(client: OpenAI, story: str) -> None:
    def texts(prompt: Any) -> list[str]:
        answer = client.completions.create(model="story", prompt=prompt, max_tokens=5)
        assert [one.index for one in answer.choices] == list(range(len(answer.choices)))
        return [one.text for one in answer.choices]

    token_ids = list(story.encode())
    assert texts(story[:7]) == [story[7:12]]
    assert texts(token_ids[:7]) == [story[7:12]]
    assert texts([story[:7], story[:9]]) == [story[7:12], story[9:14]]
    assert texts([token_ids[:7], token_ids[:9]]) == [story[7:12], story[9:14]]


@pytest.mark.parametrize("is_stream", [False, True])
def test_choices_go_by_prompt_and_number(client: OpenAI, story: str, is_stream: bool) -> None:
    answer: Any = client.completions.create(
        model="story",
        prompt=[story[:7], story[:9]],
        n=3,
        max_tokens=5,
        stream=is_stream,
        extra_body={"stream_options": {"include_usage": True}} if is_stream else {},
    )
    texts = [""] * 6
    pieces = list(answer) if is_stream else [answer]
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [story[7:12]] * 3 + [story[9:14]] * 3
    assert pieces[-1].usage.prompt_tokens == 7 + 9
    assert pieces[-1].usage.completion_tokens == 6 * 5


def test_the_prompt_of_several_choices_is_computed_once(
    client: OpenAI, server: Any, story: str
) -> None:
    answer = client.completions.create(model="story", prompt=story[:41], n=4, max_tokens=9, seed=7)
    assert answer.usage is not None and answer.usage.completion_tokens == 36
    (request,) = metrics(server)
    assert request.request_id == answer.id
    assert (request.num_sequences, request.num_prompt_tokens) == (4, 41)
    assert (request.num_output_tokens, request.sampling_params.seed) == (36, 7)


@pytest.mark.parametrize("is_stream", [False, True])
def test_more_choices_than_a_step_has_room_for(
    serve: Callable[..., Any], make_engine: Any, story: str, is_stream: bool
) -> None:
    server = serve(make_engine(max_num_seqs=64, num_blocks=3000))
    with server.client() as client:
        answer: Any = client.completions.create(
            model="story", prompt=story[:9], n=128, max_tokens=5, seed=2**64 - 1, stream=is_stream
        )
        texts = [""] * 128
        for piece in answer if is_stream else [answer]:
            for choice in piece.choices:
                texts[choice.index] += choice.text
    assert texts == [story[9:14]] * 128
    requests = sorted(metrics(server), key=lambda request: request.request_id)
    assert [request.num_sequences for request in requests] == [64, 64]
    # The 64th choice has the 64th seed, as if all were one group.
    assert [request.sampling_params.seed for request in requests] == [2**64 - 1, 63]


def test_choices_that_do_not_fit_into_the_pool_together_are_not_cut_short(
    serve: Callable[..., Any], make_engine: Any, story: str
) -> None:
    server = serve(make_engine(num_blocks=50))  # of 4 tokens
    with server.client() as client:
        answer = client.completions.create(model="story", prompt=story[:8], n=3, max_tokens=90)
    assert [choice.text for choice in answer.choices] == [story[8:96]] * 3
    requests = sorted(metrics(server), key=lambda request: request.request_id)
    assert [request.num_sequences for request in requests] == [2, 1]


def test_an_urgent_request_of_two_choices_passes_a_full_queue(
    serve: Callable[..., Any], make_engine: Any, background: ThreadPoolExecutor
) -> None:
    server = serve(make_engine(max_num_seqs=2, max_num_queued_reqs=2))

    def call(name: str, priority: int, **more: Any) -> Any:
        body = {"prompt": "It", "priority": priority, "max_tokens": 50} | more
        return server.call("POST", "/v1/completions", body, {"X-Request-Id": name})

    server.brake.hold()
    batch = [background.submit(call, f"batch-{index}", 9) for index in range(3)]
    server.wait_until(lambda: len(server.app.state.serving.list_requests(Tenant(""))) == 3)
    assert server.brake.is_holding.wait(60)
    server.brake.step(2)  # two are served, and one waits
    urgent = background.submit(call, "urgent", 0, n=2, max_tokens=5)
    server.wait_until(lambda: server.engine.ingress_usage > 0)
    server.brake.step()  # the urgent request is in the step that is held
    batch.append(background.submit(call, "batch-3", 9))
    server.wait_until(lambda: server.engine.ingress_usage > 0)
    server.brake.step()  # two wait: the queue is full when the first tokens come
    server.brake.release()
    assert [len(choice["text"]) for choice in urgent.result().json()["choices"]] == [5, 5]
    assert [answer.result().status for answer in batch] == [200] * 4
    assert metrics(server)[0].request_id == "urgent"


def test_salts_keep_cached_prefixes_apart(client: OpenAI, story: str) -> None:
    def cached(salt: str | None) -> int:
        answer = client.completions.create(
            model="story", prompt=story[:30], max_tokens=1, extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(salt) for salt in ("a", "b", None)] == [0, 0, 0]
    assert min(cached(salt) for salt in ("a", "b", None)) > 0


def test_a_salt_that_is_too_long(server: Any) -> None:
    assert MAX_CACHE_SALT == ENGINES_MAX_CACHE_SALT
    for length, status in ((256, 200), (257, 400)):
        body = {"prompt": "It", "cache_salt": "x" * length}
        answer = server.call("POST", "/v1/completions", body)
        assert answer.status == status
    assert answer.error()["param"] == "cache_salt"
    assert "has 257 characters, may have at most 256" in answer.error()["message"]


# --- log-probabilities and echo -------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs(server: Any, story: str, is_stream: bool) -> None:
    # The dash is three tokens, none of them a character.
    prompt = story[: story.index("—")]
    body = {"prompt": prompt, "max_tokens": 4, "logprobs": 1, "stream": is_stream}
    answer = server.call("POST", "/v1/completions", body)
    pieces = events(answer.body) if is_stream else [answer.json()]
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(one["text"] for one in choices) == "— "
    found = {name: [x for one in choices for x in one["logprobs"][name]] for name in FIELDS}
    names = [r"bytes:\xe2", r"bytes:\x80", r"bytes:\x94", " "]
    assert found == {
        "tokens": names,
        "token_logprobs": [pytest.approx(math.log(0.5))] * 4,
        "top_logprobs": [{name: pytest.approx(math.log(0.5))} for name in names],
        "text_offset": [0, 0, 0, 1],
    }


FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_the_chosen_token_is_among_the_top_ones(client: OpenAI, story: str) -> None:
    for count, names in ((0, {"a"}), (3, {"a", "`", "_"})):
        answer = client.completions.create(
            model="story", prompt=story[:7], max_tokens=1, logprobs=count
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.top_logprobs is not None
        assert logprobs.top_logprobs[0].keys() == names


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo(server: Any, story: str, is_stream: bool, max_tokens: int) -> None:
    token_ids = list(story.encode())[:9]
    body = {
        "prompt": [token_ids[:7], token_ids],
        "n": 2,
        "echo": True,
        "max_tokens": max_tokens,
        "stream": is_stream,
    }
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    answer = server.call("POST", "/v1/completions", body)
    pieces = events(answer.body) if is_stream else [answer.json()]
    texts = [""] * 4
    ends: dict[int, str] = {}
    for piece in pieces:
        for choice in piece["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"] is not None:
                ends[choice["index"]] = choice["finish_reason"]
    assert texts == [story[: 7 + max_tokens]] * 2 + [story[: 9 + max_tokens]] * 2
    assert ends == dict.fromkeys(range(4), "length")
    assert pieces[-1]["usage"]["completion_tokens"] == 4 * max_tokens


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_with_logprobs(server: Any, story: str, is_stream: bool, max_tokens: int) -> None:
    body = {
        "prompt": story[:4],
        "echo": True,
        "logprobs": 2,
        "max_tokens": max_tokens,
        "stream": is_stream,
    }
    answer = server.call("POST", "/v1/completions", body)
    pieces = events(answer.body) if is_stream else [answer.json()]
    choices = [piece["choices"][0] for piece in pieces]
    found = {name: [x for one in choices for x in one["logprobs"][name]] for name in FIELDS}
    length = 4 + max_tokens
    assert found["tokens"] == list(story[:length])
    assert found["token_logprobs"] == [None] + [pytest.approx(math.log(0.5))] * (length - 1)
    assert found["top_logprobs"][0] is None
    assert [len(one) for one in found["top_logprobs"][1:]] == [2] * (length - 1)
    assert found["text_offset"] == list(range(length))


# --- ids, models ----------------------------------------------------------------------------------


def test_an_id_in_use_is_refused(server: Any, background: ThreadPoolExecutor, story: str) -> None:
    def call(request_id: str, **more: Any) -> Any:
        body = {"prompt": story[:7]} | more
        return server.call("POST", "/v1/completions", body, {"X-Request-Id": request_id})

    server.brake.hold()
    first = background.submit(call, "mine", prompt=["It", "It was"])
    assert server.brake.is_holding.wait(60)
    for request_id in ("mine", "mine-1"):
        again = call(request_id)
        assert again.status == 409
        assert again.error()["code"] == "duplicate_request_id"
        assert request_id in again.error()["message"]
    server.brake.release()
    assert first.result().status == 200
    assert call("mine").status == 200


@pytest.mark.parametrize("request_id", ["", "a b", "a/b", "x" * 129, "é"])
def test_an_id_that_cannot_stand_in_a_path_is_refused(server: Any, request_id: str) -> None:
    headers = {"X-Request-Id": request_id}
    answer = server.call("POST", "/v1/completions", {"prompt": "It"}, headers)
    assert answer.status == 400
    assert answer.error()["param"] == "X-Request-Id"


def test_parts_belong_to_the_clients_trace(serve: Callable[..., Any]) -> None:
    server = serve()
    exporter = InMemorySpanExporter()
    client = server.app.state.serving.engine
    server.app.state.serving.tracer = tracer = Tracer(client, exporter, "story")
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    body = {"prompt": ["It", "It was"], "n": 2}
    assert server.call("POST", "/v1/completions", body, headers).status == 200
    # The tracer has been told of a step when the next one begins.
    assert server.call("POST", "/v1/completions", {"prompt": "It"}).status == 200
    server.assert_idle()
    tracer.close()
    spans = exporter.get_finished_spans()
    remote = [span for span in spans if span.parent is not None and span.parent.is_remote]
    assert [f"{span.context.trace_id:032x}" for span in remote] == [trace_id] * 2
    children = {span.parent.span_id for span in spans if span.parent is not None}
    assert {span.context.span_id for span in remote} <= children


def test_a_model_that_is_not_served(server: Any) -> None:
    answer = server.call("POST", "/v1/completions", {"prompt": "It", "model": "gpt-5"})
    assert answer.status == 404
    assert (answer.error()["code"], answer.error()["param"]) == ("model_not_found", "model")
    assert "gpt-5" in answer.error()["message"] and "story" in answer.error()["message"]


def test_a_model_has_several_names(serve: Callable[..., Any]) -> None:
    server = serve(served_model_names=("story", "tale"))
    for asked, told in (("tale", "tale"), ("story", "story"), (None, "story")):
        answer = server.call("POST", "/v1/completions", {"prompt": "It", "model": asked})
        assert answer.json()["model"] == told


# --- refusals -------------------------------------------------------------------------------------


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ""}),
    ("prompt[1]", {"prompt": [1, True]}),
    ("prompt[1]", {"prompt": [1, 1.5]}),
    ("prompt[0]", {"prompt": [2**31]}),
    ("prompt[0]", {"prompt": [[]]}),
    ("prompt[0][1]", {"prompt": [[1, "a"]]}),
    ("prompt[1]", {"prompt": ["a", [1]]}),
    ("n", {"n": True}),
    ("n", {"n": 129}),
    ("n", {"n": 65, "prompt": ["a", "b"]}),
    ("prompt", {"prompt": ["a"] * 129}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("temperature", {"temperature": 10**400}),
    ("seed", {"seed": 2**64}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop_token_ids[0]", {"stop_token_ids": [-1]}),
    ("logprobs", {"logprobs": True}),
    ("logprobs", {"logprobs": 21}),
    ("logit_bias", {"logit_bias": [1]}),
    ("priority", {"priority": 1.5}),
    ("service_tier", {"service_tier": ""}),
    ("best_of", {"best_of": True}),
    ("min_p", {"min_p": 1.5}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": True}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("frobnicate", {"frobnicate": None}),
]


def test_a_value_that_cannot_be_honoured_is_named(server: Any) -> None:
    for param, more in REFUSED:
        answer = server.call("POST", "/v1/completions", {"prompt": "It"} | more)
        assert answer.status == 400, more
        error = answer.error()
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert param in error["message"]


def test_more_tokens_than_may_be_generated_cannot_be_had(server: Any) -> None:
    body = {"prompt": "It", "max_tokens": 5, "min_tokens": 6}
    answer = server.call("POST", "/v1/completions", body)
    assert answer.status == 400
    assert "min_tokens is 6, must be 0 … 5" in answer.error()["message"]


def test_values_that_ask_for_nothing_are_accepted(server: Any) -> None:
    nothing = {"best_of": 1, "suffix": None, "min_p": 0.0, "repetition_penalty": 1.0, "user": "me"}
    nothing |= {"min_tokens": 0, "response_format": {"type": "text"}, "n": 1}
    nothing |= {"stop": [], "logit_bias": {}, "logprobs": None, "echo": False, "top_k": -1}
    answer = server.call("POST", "/v1/completions", {"prompt": "It", **nothing})
    assert answer.status == 200


@pytest.mark.parametrize("prompt", ["a" * 800, [97] * 800, "a" * 1601, [97] * 100_000])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prompt_that_is_too_long(server: Any, prompt: Any, is_stream: bool) -> None:
    body = {"prompt": prompt, "stream": is_stream, "echo": True}
    answer = server.call("POST", "/v1/completions", body)
    assert answer.status == 400
    assert answer.error()["code"] == "context_length_exceeded"
    assert "800" in answer.error()["message"]


@pytest.mark.parametrize("more", [{"prompt": [258]}, {"logit_bias": {"258": 1}}])
def test_a_token_that_is_not_in_the_vocabulary(server: Any, more: dict[str, Any]) -> None:
    answer = server.call("POST", "/v1/completions", {"prompt": "It", "echo": True} | more)
    assert answer.status == 400
    assert "258" in answer.error()["message"]
