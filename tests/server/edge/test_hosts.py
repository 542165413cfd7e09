"""A server without keys answers to this machine's own names only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from headway.server.edge.api_keys import ApiKey

Serve = Callable[..., Any]

OWN = ["localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:1"]
OTHERS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.168.1.7",
    "0.0.0.0",
    "[fe80::1]",
    "[::1",
    "user@evil.example",
    "localhost@evil.example",
    "x" * 5000,
    "",
]


def test_own_names_are_answered_and_others_are_refused(serve: Serve) -> None:
    server = serve()
    for host in OWN:
        assert server.call("GET", "/health", headers={"Host": host}).status == 200, host
    for host in OTHERS:
        for method, path in (("GET", "/health"), ("POST", "/v1/completions"), ("OPTIONS", "/x")):
            answer = server.call(method, path, headers={"Host": host})
            assert answer.status == 421, host
            error = answer.error()
            assert error["code"] == "misdirected_request"
            assert "localhost" in error["message"] and "--allowed-host" in error["message"]
            assert host[:60] in error["message"]


def test_a_request_that_says_no_host_is_refused(serve: Serve) -> None:
    with serve().connect() as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 421 ")


def test_a_page_that_calls_this_machine_by_its_own_name_is_refused(serve: Serve) -> None:
    """Even if its origin is allowed: pages of that origin are to call the server by its name."""
    server = serve(allowed_origins=("*",))
    headers = {"Host": "evil.example", "Origin": "http://evil.example"}
    assert server.call("POST", "/v1/completions", {"prompt": "It"}, headers).status == 421


def test_the_operator_may_add_names(serve: Serve) -> None:
    server = serve(allowed_hosts=("Llm.Example",))
    for host, status in (("llm.example", 200), ("LLM.example:80", 200), ("a.llm.example", 421)):
        assert server.call("GET", "/health", headers={"Host": host}).status == status


@pytest.mark.parametrize(
    "settings", [{"api_keys": (ApiKey("sk", "web"),)}, {"allow_unauthenticated": True}]
)
def test_a_server_for_others_answers_to_any_name(serve: Serve, settings: dict[str, Any]) -> None:
    server = serve(**settings)
    for host in OTHERS[:5]:
        assert server.call("GET", "/health", headers={"Host": host}).status == 200
