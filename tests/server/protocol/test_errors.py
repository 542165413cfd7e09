"""Bad input gets a 4xx that says what is wrong with it, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from headway.core import errors
from headway.server.protocol.errors import ApiError, to_api_error

Serve = Callable[..., Any]


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.InvalidRequest("x"), 400, "invalid_request_error", None),
        (errors.RequestTooLong("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.UnknownRequest("x"), 404, "invalid_request_error", "request_not_found"),
        (errors.DuplicateRequest("x"), 409, "invalid_request_error", "duplicate_request_id"),
        (errors.QueueFull("x"), 503, "server_overloaded", "queue_full"),
        (errors.QueueTimeout("x"), 503, "server_overloaded", "queue_timeout"),
        (errors.EngineStopped("x"), 503, "server_error", "engine_stopped"),
        (errors.SlowReader("x"), 503, "server_error", "slow_reader"),
        (ApiError(418, "x", "teapot", code="short"), 418, "teapot", "short"),
    ],
)
def test_each_error_has_its_status(
    error: Exception, status: int, kind: str, code: str | None
) -> None:
    answer = to_api_error(error)
    assert answer.status == status
    assert answer.body() == {
        "error": {"message": "x", "type": kind, "param": None, "code": code},
    }


@pytest.mark.parametrize("error", [errors.InternalError("secret"), KeyError("secret")])
def test_a_bug_says_nothing_about_itself(error: Exception) -> None:
    answer = to_api_error(error)
    assert answer.status == 500
    assert "secret" not in answer.message


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, "1"), (0.4, "1"), (1.0, "1"), (1.01, "2"), (75.5, "76")]
)
def test_when_to_try_again_is_rounded_up(seconds: float, header: str) -> None:
    for kind in (errors.QueueFull, errors.QueueTimeout):
        answer = to_api_error(kind("x", retry_after=seconds))
        assert answer.headers == {"Retry-After": header}


def test_what_is_quoted_can_be_anything() -> None:
    answer = ApiError(400, "half a pair: \ud800, and long: " + "x" * 10_000).response()
    message = json.loads(answer.body)["error"]["message"]
    assert message.startswith("half a pair: \ud800, and long: xxx")
    assert len(message) == 500


# --- over HTTP ------------------------------------------------------------------------------------


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "story", "prompt": "It was", "max_tokens": 4, "temperature": 0} | fields


LIMIT = 2**63

NOT_JSON: list[tuple[bytes, str]] = [
    (b"", "body"),
    (b"{", "not JSON"),
    (b'{"prompt": "a"', "not JSON"),
    (b"prompt=a", "not JSON"),
    (b"{'prompt': 'a'}", "not JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    (b'{"prompt": "\xc3', "not UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"null", "body"),
    (b"[]", "body"),
    (b'"text"', "body"),
    (b"\x00", "not JSON"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_no_object_is_refused(serve: Serve, path: str) -> None:
    server = serve()
    for body, words in NOT_JSON:
        answer = server.call("POST", path, body)
        assert answer.status == 400, body[:100]
        assert words in answer.error()["message"], body[:100]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": ["a", 7]}, "prompt[1]"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [LIMIT]}, "prompt[0]"),
    ({"max_tokens": "4"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 4.5}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -LIMIT}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"top_k": 0.5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"seed": "one"}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"stop": 7}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": ["x" * 1_000_000]}, "stop[0]"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 10**6}, "logprobs"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"1": 1000}}, "logit_bias.1"),
    ({"priority": LIMIT}, "priority"),
    ({"priority": -LIMIT - 1}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"service_tier": "platinum"}, "service_tier"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"user": 7}, "user"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"x" * 100_000: 1}, "x" * 79 + "…"),
]


def test_a_wrong_field_is_named(serve: Serve) -> None:
    server = serve()
    for fields, param in WRONG:
        answer = server.call("POST", "/v1/completions", completion(**fields))
        assert answer.status == 400, (param, answer.body)
        error = answer.error()
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert len(answer.body) < 1000
        server.assert_idle()


MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    ("hello", "messages"),
    (["hello"], "messages[0]"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "king", "content": "a"}], "messages[0].role"),
    ([{"role": "user", "content": "a"}, {"content": "b"}], "messages[1].role"),
    ([{"role": "user", "content": "a", "colour": "red"}], "messages[0].colour"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
]


def test_a_wrong_message_is_named(serve: Serve) -> None:
    server = serve()
    for messages, param in MESSAGES:
        body = {"model": "story", "messages": messages}
        answer = server.call("POST", "/v1/chat/completions", body)
        assert answer.status == 400, param
        assert answer.error()["param"] == param


def test_a_missing_field_is_named(serve: Serve) -> None:
    answer = serve().call("POST", "/v1/completions", {"model": "story"})
    assert answer.status == 400
    assert answer.error()["param"] == "prompt"


def test_a_model_that_is_not_served(serve: Serve) -> None:
    answer = serve().call("POST", "/v1/completions", completion(model="gpt-17"))
    assert answer.status == 404
    assert answer.error()["code"] == "model_not_found"
    assert "gpt-17" in answer.error()["message"]


@pytest.mark.parametrize(("length", "max_tokens"), [(799, 2), (1, 800), (1_000_000, 1)])
def test_what_is_longer_than_the_context(serve: Serve, length: int, max_tokens: int) -> None:
    body = completion(prompt="x" * length, max_tokens=max_tokens)
    answer = serve().call("POST", "/v1/completions", body)
    assert answer.status == 400
    assert answer.error()["code"] == "context_length_exceeded"
    assert "800 tokens" in answer.error()["message"]


def test_a_token_that_is_not_in_the_vocabulary_is_named(serve: Serve) -> None:
    server = serve()
    for fields in ({"prompt": [1, 9999]}, {"logit_bias": {"9999": 1}}):
        answer = server.call("POST", "/v1/completions", completion(**fields))
        assert answer.status == 400
        assert "9999" in answer.error()["message"]


def test_half_a_surrogate_pair_is_refused(serve: Serve) -> None:
    server = serve()
    for body in (
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stop": "\\udfff"}',
        b'{"\\ud800": 1}',
    ):
        assert server.call("POST", "/v1/completions", body).status == 400
    server.assert_idle()


def test_a_body_that_does_not_claim_to_be_json_is_refused(serve: Serve) -> None:
    """A web page can send these to any server without being asked first."""
    server = serve()
    body = json.dumps(completion()).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "x" * 5000, ""):
        answer = server.call("POST", "/v1/completions", body, {"Content-Type": kind})
        assert answer.status == 400
        assert len(answer.body) < 1000


NOWHERE: list[tuple[str, str, int]] = [
    ("GET", "/", 404),
    ("GET", "/v1/completion", 404),
    ("GET", "/v1/" + "x" * 10_000, 404),
    ("GET", "/%ff%00", 404),
    ("GET", "/v1/completions", 405),
    ("PUT", "/v1/requests/x", 405),
    ("BREW", "/health", 400),
]


def test_paths_and_methods_that_are_not_there(serve: Serve) -> None:
    server = serve()
    for method, path, status in NOWHERE:
        answer = server.call(method, path)
        assert answer.status == status
        if status != 400:  # no method of HTTP gets no further than the parser
            assert answer.error()["code"] == {404: "not_found", 405: "method_not_allowed"}[status]
            assert len(answer.body) < 1000
        if status == 405:
            assert answer.headers["allow"]


def test_a_bug_is_logged_and_the_server_goes_on(
    capfd: pytest.CaptureFixture[str], serve: Serve
) -> None:
    server = serve()
    server.app.state.serving.prompts = None  # as good a bug as any
    answer = server.call("POST", "/v1/completions", completion())
    assert answer.status == 500
    assert answer.error()["type"] == "server_error"
    assert "NoneType" not in answer.body.decode()
    server.assert_idle()
    assert "AttributeError: 'NoneType'" in capfd.readouterr().err
    assert server.call("GET", "/health").status == 200
