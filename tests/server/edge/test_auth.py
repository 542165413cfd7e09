"""Who may use the server, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headway.server.edge.api_keys import ApiKey

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
    assert server.call("POST", "/v1/completions", completion(), bearer("sk-batch")).status == 200
    assert [output.metrics.priority for output in server.ended] == [10]


def test_a_key_bounds_the_sequences_at_a_time(serve: Serve, background: ThreadPoolExecutor) -> None:
    keys = (ApiKey("sk-web", "web", max_concurrent=4), *KEYS[1:])
    server = serve(api_keys=keys)

    def call(key: str = "sk-web", **fields: Any) -> Any:
        return server.call("POST", "/v1/completions", completion(**fields), bearer(key))

    server.brake.hold()
    running = background.submit(call, prompt=["It", "It was"], n=1)
    assert server.brake.is_holding.wait(60)
    for fields in ({"n": 3}, {"prompt": ["a"] * 3}, {"n": 3, "stream": True}):
        answer = call(**fields)
        assert answer.status == 429
        assert answer.error()["code"] == "rate_limit_exceeded"
        assert "3 sequences" in answer.error()["message"]
        assert "2 are running" in answer.error()["message"]
        assert "at most 4" in answer.error()["message"]
    for fields in ({"n": 5}, {"prompt": ["a"] * 3, "n": 2}):
        answer = call(**fields)
        assert answer.status == 400, "trying again would not help"
        assert answer.error()["code"] == "too_many_sequences"
        assert "at most 4" in answer.error()["message"]
    others = [background.submit(call, n=2), background.submit(call, "sk-batch", n=20)]
    server.brake.release()
    assert [answer.result().status for answer in (running, *others)] == [200] * 3
    assert call(n=4).status == 200


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


def test_tenants_share_cached_prefixes_only_within_a_group(serve: Serve, story: str) -> None:
    groups = {"alone": None, "other": None, "us": "ours", "we": "ours"}
    keys = [ApiKey(name, name, cache_group=group) for name, group in groups.items()]
    server = serve(api_keys=keys)

    def cached(key: str) -> int:
        body = {"prompt": story[:30], "max_tokens": 1}
        usage = server.call("POST", "/v1/completions", body, bearer(key)).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached(key) for key in ("alone", "other", "us")] == [0, 0, 0]
    assert cached("we") > 0 and cached("alone") > 0


def test_metrics_by_tenant_if_wanted(serve: Serve) -> None:
    for is_wanted in (False, True):
        server = serve(api_keys=KEYS, metrics_by_tenant=is_wanted)
        body = completion(max_tokens=1)
        assert server.call("POST", "/v1/completions", body, bearer("sk-web")).status == 200
        text = server.call("GET", "/metrics").body.decode()
        assert ('tenant="web"' in text) == is_wanted
        assert ('tenant="batch"' in text) == is_wanted  # known before it comes
