"""Who may use the server, and how much of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from headway.server.api_keys import ApiKey

Serve = Callable[..., Any]

KEYS = (
    ApiKey("sk-web", "web", most_urgent_priority=0, max_concurrent=2),
    ApiKey("sk-batch", "batch", most_urgent_priority=10),
    ApiKey("sk-root", "root"),
)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "story", "prompt": "It was", "max_tokens": 4, "temperature": 0} | fields


STRANGERS: list[dict[str, str]] = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Basic sk-web"},
    {"Authorization": "sk-web"},
    bearer("sk-we"),
    bearer("sk-web2"),
    bearer("sk-web sk-web"),
    bearer("sk-w\u00e9b"),
    bearer("x" * 10_000),
    {"X-Api-Key": "sk-web"},
]


def test_strangers_are_refused(serve: Serve) -> None:
    server = serve(api_keys=KEYS)
    for headers in STRANGERS:
        for method, path in [
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/requests"),
            ("DELETE", "/v1/requests/cmpl-1"),
            ("GET", "/no/such/path"),
            ("GET", "/health/"),
        ]:
            body = completion() if method == "POST" else None
            answer = server.call(method, path, body, headers)
            assert answer.status == 401, (headers, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error()["code"] == "invalid_api_key"


def test_probes_and_documentation_need_no_key(serve: Serve) -> None:
    server = serve(api_keys=KEYS)
    for path in ("/health", "/version", "/metrics", "/docs", "/openapi.json"):
        assert server.call("GET", path).status == 200, path


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_lets_in(serve: Serve, scheme: str, story: str) -> None:
    server = serve(api_keys=KEYS)
    for one in KEYS:
        headers = {"Authorization": f"{scheme} {one.key}"}
        answer = server.call("POST", "/v1/completions", completion(), headers)
        assert answer.status == 200
        assert answer.json()["choices"][0]["text"] == story[6:10]


def test_a_stranger_is_refused_before_the_body_has_arrived(serve: Serve) -> None:
    server = serve(api_keys=KEYS)
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_without_keys_everybody_may(serve: Serve) -> None:
    assert serve().call("POST", "/v1/completions", completion(priority=-(2**63))).status == 200


def test_a_key_bounds_the_priority(serve: Serve) -> None:
    server = serve(api_keys=KEYS)
    for key, priority, status in [
        ("sk-web", 0, 200),
        ("sk-web", 1, 200),
        ("sk-web", -1, 403),
        ("sk-batch", 10, 200),
        ("sk-batch", 9, 403),
        ("sk-root", -(2**63), 200),
    ]:
        body = completion(priority=priority)
        answer = server.call("POST", "/v1/completions", body, bearer(key))
        assert answer.status == status
        if status == 403:
            assert answer.error()["param"] == "priority"
            assert answer.error()["code"] == "priority_not_allowed"
            assert str(priority) in answer.error()["message"]


def test_who_asks_for_no_priority_gets_one_that_the_key_allows(serve: Serve) -> None:
    server = serve(api_keys=KEYS, default_priority=0)
    priorities: list[int] = []
    server.engine.observers.append(
        lambda step: priorities.extend(request.priority for request in step.output)
    )
    assert server.call("POST", "/v1/completions", completion(), bearer("sk-batch")).status == 200
    assert set(priorities) == {10}


def test_a_key_bounds_the_requests_at_a_time(serve: Serve) -> None:
    server = serve(api_keys=KEYS)
    server.brake.hold()
    statuses: list[int] = []

    def ask() -> None:
        body = completion(max_tokens=2)
        statuses.append(server.call("POST", "/v1/completions", body, bearer("sk-web")).status)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    # One of the three is refused, whichever is last; the other two wait for the held step.
    while not statuses:
        threads[0].join(0.005)
        threads[1].join(0.005)
        threads[2].join(0.005)
    assert statuses == [429]
    answer = server.call("POST", "/v1/completions", completion(), bearer("sk-web"))
    assert answer.status == 429
    assert answer.error()["code"] == "rate_limit_exceeded"
    assert "at most 2" in answer.error()["message"]

    body = completion(max_tokens=1, stream=True)
    others = threading.Thread(
        target=lambda: statuses.append(
            server.call("POST", "/v1/completions", body, bearer("sk-batch")).status
        )
    )
    others.start()
    server.brake.release()
    for thread in (*threads, others):
        thread.join()
    assert sorted(statuses) == [200, 200, 200, 429]
    assert server.call("POST", "/v1/completions", completion(), bearer("sk-web")).status == 200


def test_pages_of_allowed_origins_may_use_it(serve: Serve) -> None:
    server = serve(api_keys=KEYS, allowed_origins=("https://here.example",))
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-headway-priority",
    }
    here, there = {"Origin": "https://here.example"}, {"Origin": "https://there.example"}
    answer = server.call("OPTIONS", "/v1/completions", headers=here | preflight)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == here["Origin"]
    answer = server.call("OPTIONS", "/v1/completions", headers=there | preflight)
    assert answer.headers["access-control-allow-origin"] is None
    answer = server.call("GET", "/v1/models", headers=here)
    assert answer.status == 401
    assert answer.headers["access-control-allow-origin"] == here["Origin"], "or it cannot be read"


def test_by_default_pages_of_no_origin_may(serve: Serve) -> None:
    headers = {"Origin": "https://there.example", "Access-Control-Request-Method": "POST"}
    answer = serve().call("OPTIONS", "/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("keys", [(), KEYS])
def test_the_document_says_what_needs_a_key(serve: Serve, keys: tuple[ApiKey, ...]) -> None:
    paths = serve(api_keys=keys).call("GET", "/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert ("security" in operation) == (bool(keys) and path.startswith("/v1/")), path
