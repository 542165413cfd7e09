"""Looking at requests, re-ranking and cancelling them; and how they get their priority."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from headway.server.api_keys import ApiKey

Serve = Callable[..., Any]


class House:
    """A server in which nothing moves until it is let go, and requests with ids of their own."""

    def __init__(self, server: Any, background: ThreadPoolExecutor) -> None:
        self.server = server
        self._background = background
        server.brake.hold()
        #: The request that is in the step that is held, and goes on for some time after it.
        self.first = self.send("first", max_tokens=700)
        assert server.brake.is_holding.wait(60)

    def send(self, request_id: str, headers: Any = None, **more: Any) -> Future[Any]:
        """Send a request; returns when the server has it."""
        num_commands = self.server.engine.ingress_usage
        headers = {"X-Request-Id": request_id} | (headers or {})
        body = {"prompt": "It was", "max_tokens": 4} | more
        answer = self._background.submit(self.server.call, "POST", "/v1/completions", body, headers)
        if request_id != "first":
            self.server.wait_until(lambda: self.server.engine.ingress_usage > num_commands)
        return answer

    def ask(
        self, method: str, path: str = "", body: Any = None, headers: Any = None
    ) -> Future[Any]:
        """The same, of the requests themselves; it is answered between two steps."""
        num_commands = self.server.engine.ingress_usage
        answer = self._background.submit(
            self.server.call, method, f"/v1/requests{path}", body, headers
        )
        self.server.wait_until(
            lambda: answer.done() or self.server.engine.ingress_usage > num_commands
        )
        return answer

    def open(self) -> None:
        self.server.brake.release()


@pytest.fixture
def house(serve: Serve, make_engine: Callable[..., Any], background: ThreadPoolExecutor) -> House:
    """One slot, which is taken."""
    return House(serve(make_engine(max_num_seqs=1)), background)


def listed(answer: Any) -> dict[str, dict[str, Any]]:
    assert answer.status == 200
    assert answer.json()["object"] == "list"
    return {state["id"]: state for state in answer.json()["data"]}


# --- looking --------------------------------------------------------------------------------------


def test_where_requests_stand(house: House) -> None:
    answers = [house.send("later", priority=7), house.send("sooner", priority=5)]
    asked = house.ask("GET")
    house.open()
    found = listed(asked.result())
    assert list(found) == ["first", "sooner", "later"]
    assert [state["rank"] for state in found.values()] == [0, 1, 2]
    assert [state["status"] for state in found.values()] == ["running", "waiting", "waiting"]
    first, later = found["first"], found["later"]
    assert (first["prompt_tokens"], first["output_tokens"], first["max_tokens"]) == (6, 1, 700)
    assert (later["computed_tokens"], later["preemptions"], later["priority"]) == (0, 0, 7)
    assert later["predicted_wait"] > found["sooner"]["predicted_wait"] > 0
    assert later["object"] == "request" and "parts" not in later
    assert [answer.result().status for answer in (house.first, *answers)] == [200] * 3


def test_some_of_the_requests(house: House) -> None:
    answers = [house.send("a", priority=5), house.send("b", priority=6)]
    asked = [house.ask("GET", f"?{query}") for query in ("limit=2", "status=waiting&limit=1")]
    asked += [house.ask("GET", "?status=swapped")]
    house.open()
    assert [list(listed(one.result())) for one in asked] == [["first", "a"], ["a"], []]
    assert [answer.result().status for answer in answers] == [200] * 2


@pytest.mark.parametrize("query", ["limit=0", "limit=many", "limit=1e9", "status=bored"])
def test_a_question_that_makes_no_sense(server: Any, query: str) -> None:
    answer = server.call("GET", f"/v1/requests?{query}")
    assert answer.status == 400
    assert answer.error()["param"] == query.partition("=")[0]


def test_one_request(house: House) -> None:
    answer = house.send("mine")
    asked = house.ask("GET", "/mine")
    house.open()
    assert asked.result().json()["id"] == "mine"
    assert asked.result().json()["status"] == "waiting"
    assert answer.result().status == 200
    house.server.wait_until(lambda: house.server.call("GET", "/v1/requests/mine").status == 404)


def test_a_request_of_several_choices(serve: Serve, make_engine: Any) -> None:
    server = serve(make_engine(num_blocks=5000))

    def whole() -> dict[str, Any]:
        found: dict[str, Any] = server.call("GET", "/v1/requests/mine").json()
        return found

    def parts(name: str) -> list[Any]:
        return [part[name] for part in whole()["parts"]]

    with server.client() as client:
        stream = client.completions.create(
            model="story",
            prompt="It was",
            n=3,
            max_tokens=19_000,
            stream=True,
            extra_headers={"X-Request-Id": "mine"},
        )
        next(piece for piece in stream if piece.choices[0].index == 2)

        assert (whole()["id"], whole()["rank"]) == ("mine", 0)
        assert parts("id") == ["mine-0", "mine-1", "mine-2"]
        assert list(listed(server.call("GET", "/v1/requests"))) == ["mine"]
        assert server.call("GET", "/v1/requests/mine-1").json()["id"] == "mine-1"

        assert server.call("POST", "/v1/requests/mine-1", {"priority": 4}).status == 200
        assert parts("priority") == [0, 0, 4]
        assert server.call("POST", "/v1/requests/mine", {"priority": 6}).status == 200
        assert parts("priority") == [6, 6, 6]

        assert server.call("DELETE", "/v1/requests/mine-1").status == 200
        assert parts("id") == ["mine-0", "mine-2"]
        assert server.call("DELETE", "/v1/requests/mine").status == 200
        ends = [choice.finish_reason for piece in stream for choice in piece.choices]
    assert [end for end in ends if end is not None] == ["abort"] * 3


# --- re-ranking and cancelling --------------------------------------------------------------------


def test_a_request_can_be_made_more_urgent(house: House) -> None:
    answers = [house.send("a", priority=5), house.send("b", priority=5)]
    changed = house.ask("POST", "/b", {"priority": -3})
    asked = house.ask("GET")
    house.open()
    assert changed.result().json() == {"id": "b", "object": "request", "priority": -3}
    found = listed(asked.result())
    assert (found["b"]["priority"], found["b"]["rank"]) == (-3, 0)
    assert [answer.result().status for answer in answers] == [200] * 2


def test_a_request_can_be_cancelled(house: House) -> None:
    waiting = house.send("mine")
    deleted = [house.ask("DELETE", "/mine"), house.ask("DELETE", "/first")]
    house.open()
    assert deleted[0].result().json() == {"id": "mine", "object": "request", "deleted": True}
    for answer in (waiting.result(), house.first.result()):
        assert answer.status == 200
        assert answer.json()["choices"][0]["finish_reason"] == "abort"
    assert waiting.result().json()["choices"][0]["text"] == ""


@pytest.mark.parametrize(("path", "num_cancelled"), [("mine", 3), ("mine-1", 1)])
@pytest.mark.parametrize("is_stream", [False, True])
def test_choices_that_have_not_begun_can_be_cancelled(
    serve: Serve, background: ThreadPoolExecutor, path: str, num_cancelled: int, is_stream: bool
) -> None:
    server = serve()
    server.brake.hold()
    body = {"prompt": "It", "n": 3, "stream": is_stream}
    answer = background.submit(
        server.call, "POST", "/v1/completions", body, {"X-Request-Id": "mine"}
    )
    assert server.brake.is_holding.wait(60)
    assert server.call("DELETE", f"/v1/requests/{path}").status == 200
    server.brake.release()
    assert answer.result().status == 200
    text = answer.result().body.decode()
    assert text.count('"finish_reason":"abort"') == num_cancelled


def test_choices_that_have_not_begun_get_the_new_priority(
    serve: Serve, background: ThreadPoolExecutor
) -> None:
    server = serve()
    ended: list[int] = []
    server.engine.request_observers.append(lambda request, _: ended.append(request.priority))
    server.brake.hold()
    body = {"prompt": "It", "n": 3}
    answer = background.submit(
        server.call, "POST", "/v1/completions", body, {"X-Request-Id": "mine"}
    )
    assert server.brake.is_holding.wait(60)
    assert server.call("POST", "/v1/requests/mine", {"priority": 8}).status == 200
    assert server.call("POST", "/v1/requests/mine-2", {"priority": 9}).status == 200
    server.brake.release()
    assert answer.result().status == 200
    assert sorted(ended) == [8, 8, 9]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("request_id", ["nobody", "x" * 1000, "%F0%9F%98%80"])
def test_a_request_that_is_not_there(server: Any, method: str, request_id: str) -> None:
    body = {"priority": 1} if method == "POST" else None
    answer = server.call(method, f"/v1/requests/{request_id}", body)
    assert answer.status == 404
    assert answer.error()["code"] == "request_not_found"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("priority", {}),
        ("priority", {"priority": 2**63}),
        ("priority", {"priority": None}),
        ("priority", {"priority": "1"}),
        ("urgency", {"priority": 1, "urgency": 2}),
    ],
)
def test_a_new_priority_must_be_one(server: Any, param: str, body: Any) -> None:
    answer = server.call("POST", "/v1/requests/any", body)
    assert answer.status == 400
    assert answer.error()["param"] == param


# --- where a priority comes from ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "headers", "more"),
    [
        (3, {}, {}),
        (-10, {}, {"service_tier": "priority"}),
        (10, {}, {"service_tier": "flex"}),
        (3, {}, {"service_tier": "auto"}),
        (77, {}, {"service_tier": "night"}),
        (5, {}, {"service_tier": "priority", "priority": 5}),
        (6, {"X-Vllm-Priority": "6"}, {"priority": 5}),
        (-7, {"X-Vllm-Priority": "6", "X-Headway-Priority": "-7"}, {"priority": 5}),
        (2**63 - 1, {"X-Headway-Priority": str(2**63 - 1)}, {}),
    ],
)
def test_headers_precede_the_body_and_that_the_tier(
    serve: Serve, priority: int, headers: dict[str, str], more: dict[str, Any]
) -> None:
    server = serve(default_priority=3, service_tiers={"night": 77})
    ended: list[int] = []
    server.engine.request_observers.append(lambda request, _: ended.append(request.priority))
    for path, prompt in (
        ("completions", {"prompt": "It"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "It"}], "max_tokens": 1}),
    ):
        assert server.call("POST", f"/v1/{path}", prompt | more, headers).status == 200
    assert ended == [priority] * 2


@pytest.mark.parametrize("name", ["X-Headway-Priority", "X-Vllm-Priority"])
@pytest.mark.parametrize("value", ["", "high", "1.5", "1_000", str(2**63), "9" * 5000])
def test_a_header_that_is_no_priority(server: Any, name: str, value: str) -> None:
    answer = server.call("POST", "/v1/completions", {"prompt": "It"}, {name: value})
    assert answer.status == 400
    assert answer.error()["param"] == name
    assert name in answer.error()["message"]


# --- tenants --------------------------------------------------------------------------------------

WEB = {"Authorization": "Bearer w"}
BATCH = {"Authorization": "Bearer b"}


@pytest.fixture
def shared(serve: Serve, background: ThreadPoolExecutor, make_engine: Any) -> House:
    """Two tenants, one of which may not be urgent; ``first`` is nobody's whom they know."""
    keys = (ApiKey("o", "operator"), ApiKey("w", "web"), ApiKey("b", "batch", 10))
    server = serve(make_engine(max_num_seqs=1), api_keys=keys)
    send = House.send

    class Shared(House):
        def send(self, request_id: str, headers: Any = None, **more: Any) -> Future[Any]:
            return send(self, request_id, headers or {"Authorization": "Bearer o"}, **more)

    return Shared(server, background)


def test_tenants_see_their_own_requests_only(shared: House) -> None:
    answers = [shared.send("webs", WEB), shared.send("batchs", BATCH)]
    asked = [shared.ask("GET", headers=headers) for headers in (WEB, BATCH)]
    for method, body in (("GET", None), ("POST", {"priority": 11}), ("DELETE", None)):
        assert shared.ask(method, "/webs", body, BATCH).result().status == 404
    shared.open()
    assert [list(listed(one.result())) for one in asked] == [["webs"], ["batchs"]]
    assert [answer.result().status for answer in answers] == [200] * 2


def test_a_tenant_gets_no_more_urgent_than_it_may(shared: House) -> None:
    for headers, more in (
        ({}, {"priority": 9}),
        ({"X-Headway-Priority": "9"}, {}),
        ({}, {"service_tier": "priority"}),
    ):
        answer = shared.server.call(
            "POST", "/v1/completions", {"prompt": "It"} | more, BATCH | headers
        )
        assert answer.status == 403
        assert answer.error()["param"] == "priority"
    waiting = [shared.send("by-default", BATCH), shared.send("auto", BATCH, service_tier="auto")]
    changed = shared.ask("POST", "/auto", {"priority": 9}, BATCH)
    assert changed.result().status == 403
    asked = shared.ask("GET", headers=BATCH)
    shared.open()
    assert [state["priority"] for state in listed(asked.result()).values()] == [10, 10]
    assert [answer.result().status for answer in waiting] == [200] * 2
