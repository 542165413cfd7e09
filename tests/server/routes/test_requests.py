"""Looking at requests, re-ranking and cancelling them; and how they get their priority."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from headway.server.edge.api_keys import ApiKey

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

    def ask(self, method: str, path: str = "", body: Any = None, headers: Any = None) -> Any:
        """The answer to a question about the requests, or to a command."""
        return self.server.call(method, f"/v1/requests{path}", body, headers)

    def settle(self) -> None:
        """Let what was sent so far get to the scheduler, and its place be published."""
        self.server.brake.step(2)

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
    house.settle()
    found = listed(house.ask("GET"))
    house.open()
    assert list(found) == ["first", "sooner", "later"]
    assert [state["rank"] for state in found.values()] == [0, 1, 2]
    assert [state["status"] for state in found.values()] == ["running", "waiting", "waiting"]
    first, later = found["first"], found["later"]
    assert (first["prompt_tokens"], first["output_tokens"], first["max_tokens"]) == (6, 2, 700)
    assert (later["computed_tokens"], later["preemptions"], later["priority"]) == (0, 0, 7)
    assert later["predicted_wait"] > found["sooner"]["predicted_wait"] > 0
    assert later["object"] == "request" and "parts" not in later
    assert [answer.result().status for answer in (house.first, *answers)] == [200] * 3


def test_some_of_the_requests(house: House) -> None:
    answers = [house.send("a", priority=5), house.send("b", priority=6)]
    house.settle()
    queries = ("?limit=2", "?status=waiting&limit=1", "?status=swapped")
    found = [list(listed(house.ask("GET", query))) for query in queries]
    house.open()
    assert found == [["first", "a"], ["a"], []]
    assert [answer.result().status for answer in answers] == [200] * 2


@pytest.mark.parametrize("query", ["limit=0", "limit=many", "limit=1e9", "status=bored"])
def test_a_question_that_makes_no_sense(server: Any, query: str) -> None:
    answer = server.call("GET", f"/v1/requests?{query}")
    assert answer.status == 400
    assert answer.error()["param"] == query.partition("=")[0]


def test_one_request(house: House) -> None:
    answer = house.send("mine")
    found = house.ask("GET", "/mine").json()  # the engine need not have seen it yet
    house.open()
    assert (found["id"], found["status"], found["choices"]) == ("mine", "waiting", 1)
    assert answer.result().status == 200
    house.server.wait_until(lambda: house.ask("GET", "/mine").status == 404)


class Stream:
    """An endless stream of the request ``mine`` that has begun."""

    def __init__(self, server: Any, client: Any, **more: Any) -> None:
        self._server = server
        self._stream = client.completions.create(
            **{"model": "story", "prompt": "It was", "max_tokens": 6_000} | more,
            stream=True,
            extra_headers={"X-Request-Id": "mine"},
        )

    def read_until(self, index: int) -> None:
        """Read until a choice says something."""
        next(piece for piece in self._stream if piece.choices[0].index == index)

    def ends(self) -> list[str]:
        """The finish reasons of the choices, once all have ended."""
        choices = [choice for piece in self._stream for choice in piece.choices]
        return [choice.finish_reason for choice in choices if choice.finish_reason is not None]

    def state(self) -> dict[str, Any]:
        """Where the request stands."""
        found: dict[str, Any] = self._server.call("GET", "/v1/requests/mine").json()
        return found

    def wait_for(self, name: str, *values: Any) -> None:
        """Return when its parts have these values."""
        self._server.wait_until(lambda: [part[name] for part in self.state()["parts"]] == [*values])


def test_the_choices_of_a_prompt_are_one_request(serve: Serve, make_engine: Any) -> None:
    server = serve(make_engine(num_blocks=5000))
    with server.client() as client:
        stream = Stream(server, client, n=3)
        stream.read_until(2)
        state = stream.state()
        assert (state["id"], state["choices"], state["rank"]) == ("mine", 3, 0)
        assert state["output_tokens"] >= 3 and state["max_tokens"] == 6_000
        assert "parts" not in state
        assert list(listed(server.call("GET", "/v1/requests"))) == ["mine"]
        assert server.call("GET", "/v1/requests/mine-1").status == 404
        assert server.call("POST", "/v1/requests/mine", {"priority": 6}).status == 200
        server.wait_until(lambda: stream.state()["priority"] == 6)
        assert server.call("DELETE", "/v1/requests/mine").status == 200
        assert stream.ends() == ["abort"] * 3


def test_each_prompt_is_a_part_of_its_request(serve: Serve, make_engine: Any) -> None:
    server = serve(make_engine(num_blocks=5000))
    with server.client() as client:
        stream = Stream(server, client, prompt=["It", "It was", "It was a"], n=2, max_tokens=9_000)
        stream.read_until(5)
        state = stream.state()
        assert (state["id"], state["choices"], state["rank"]) == ("mine", 6, 0)
        assert state["prompt_tokens"] == 2 + 6 + 8
        stream.wait_for("id", "mine-0", "mine-1", "mine-2")
        stream.wait_for("choices", 2, 2, 2)
        assert list(listed(server.call("GET", "/v1/requests"))) == ["mine"]
        assert server.call("GET", "/v1/requests/mine-1").json()["id"] == "mine-1"

        assert server.call("POST", "/v1/requests/mine-2", {"priority": 4}).status == 200
        stream.wait_for("priority", 0, 0, 4)
        assert server.call("POST", "/v1/requests/mine", {"priority": 6}).status == 200
        stream.wait_for("priority", 6, 6, 6)

        assert server.call("DELETE", "/v1/requests/mine-1").status == 200
        stream.wait_for("id", "mine-0", "mine-2")
        assert server.call("DELETE", "/v1/requests/mine").status == 200
        assert stream.ends() == ["abort"] * 6


# --- re-ranking and cancelling --------------------------------------------------------------------


def test_a_request_can_be_made_more_urgent(house: House) -> None:
    answers = [house.send("a", priority=5), house.send("b", priority=5)]
    changed = house.ask("POST", "/b", {"priority": -3})
    assert changed.json() == {"id": "b", "object": "request", "priority": -3}
    house.settle()
    found = listed(house.ask("GET"))
    house.open()
    assert (found["b"]["priority"], found["b"]["rank"]) == (-3, 0)
    assert [answer.result().status for answer in answers] == [200] * 2


def test_a_request_can_be_cancelled(house: House) -> None:
    waiting = house.send("mine")
    deleted = [house.ask("DELETE", "/mine"), house.ask("DELETE", "/first")]
    house.open()
    assert deleted[0].json() == {"id": "mine", "object": "request", "deleted": True}
    for answer in (waiting.result(), house.first.result()):
        assert answer.status == 200
        assert answer.json()["choices"][0]["finish_reason"] == "abort"
    assert waiting.result().json()["choices"][0]["text"] == ""


@pytest.mark.parametrize(
    ("path", "prompt", "num_cancelled"),
    [("mine", "It", 3), ("mine", ["It", "I"], 6), ("mine-1", ["It", "I"], 3)],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_choices_that_have_not_begun_can_be_cancelled(
    serve: Serve,
    background: ThreadPoolExecutor,
    path: str,
    prompt: Any,
    num_cancelled: int,
    is_stream: bool,
) -> None:
    server = serve()
    server.brake.hold()
    body = {"prompt": prompt, "n": 3, "stream": is_stream}
    answer = background.submit(
        server.call, "POST", "/v1/completions", body, {"X-Request-Id": "mine"}
    )
    assert server.brake.is_holding.wait(60)
    server.wait_until(lambda: server.call("GET", f"/v1/requests/{path}").status == 200)
    assert server.call("DELETE", f"/v1/requests/{path}").status == 200
    server.brake.release()
    assert answer.result().status == 200
    text = answer.result().body.decode()
    assert text.count('"finish_reason":"abort"') == num_cancelled


def test_choices_for_which_the_ring_has_no_room_can_be_cancelled(
    serve: Serve, make_engine: Any, background: ThreadPoolExecutor
) -> None:
    server = serve(make_engine(ingress_capacity=1, max_num_seqs=3))
    server.brake.hold()

    def send(request_id: str) -> Future[Any]:
        body = {"prompt": "It", "n": 3}
        headers = {"X-Request-Id": request_id}
        return background.submit(server.call, "POST", "/v1/completions", body, headers)

    first = send("first")
    assert server.brake.is_holding.wait(60)
    second = send("second")
    server.wait_until(lambda: server.engine.ingress_usage == 1)
    third = send("third")
    server.wait_until(lambda: server.call("DELETE", "/v1/requests/third").status == 200)
    ends = [choice["finish_reason"] for choice in third.result().json()["choices"]]
    assert ends == ["abort"] * 3  # while the others are held
    server.brake.release()
    assert [answer.result().status for answer in (first, second)] == [200] * 2


def test_what_has_not_begun_gets_the_new_priority(
    serve: Serve, background: ThreadPoolExecutor
) -> None:
    server = serve()
    server.brake.hold()
    body = {"prompt": ["It", "It was", "I"]}
    answer = background.submit(
        server.call, "POST", "/v1/completions", body, {"X-Request-Id": "mine"}
    )
    assert server.brake.is_holding.wait(60)
    assert server.call("POST", "/v1/requests/mine", {"priority": 8}).status == 200
    assert server.call("POST", "/v1/requests/mine-2", {"priority": 9}).status == 200
    server.brake.release()
    assert answer.result().status == 200
    assert sorted(output.metrics.priority for output in server.ended) == [8, 8, 9]


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
    for path, prompt in (
        ("completions", {"prompt": "It"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "It"}], "max_tokens": 1}),
    ):
        assert server.call("POST", f"/v1/{path}", prompt | more, headers).status == 200
    assert [output.metrics.priority for output in server.ended] == [priority] * 2


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


OPERATOR = {"Authorization": "Bearer o"}


@pytest.fixture
def shared(serve: Serve, background: ThreadPoolExecutor, make_engine: Any) -> House:
    """Two tenants, of which ``batch`` may not be urgent; ``first`` is a third one's."""
    keys = (ApiKey("o", "operator"), ApiKey("w", "web"), ApiKey("b", "batch", 10))
    server = serve(make_engine(max_num_seqs=1), api_keys=keys)
    send = House.send

    class Shared(House):
        def send(self, request_id: str, headers: Any = None, **more: Any) -> Future[Any]:
            return send(self, request_id, headers or OPERATOR, **more)

    return Shared(server, background)


def test_tenants_see_their_own_requests_only(shared: House) -> None:
    answers = [shared.send("webs", WEB), shared.send("batchs", BATCH)]
    shared.settle()
    found = [list(listed(shared.ask("GET", headers=headers))) for headers in (WEB, BATCH)]
    for method, body in (("GET", None), ("POST", {"priority": 11}), ("DELETE", None)):
        assert shared.ask(method, "/webs", body, BATCH).status == 404
    shared.open()
    assert found == [["webs"], ["batchs"]]
    assert [answer.result().status for answer in answers] == [200] * 2


def test_an_id_in_use_is_free_for_other_tenants(shared: House) -> None:
    webs = shared.send("mine", WEB, max_tokens=5)
    headers = WEB | {"X-Request-Id": "mine"}
    assert shared.server.call("POST", "/v1/completions", {"prompt": "I"}, headers).status == 409
    assert shared.ask("GET", "/mine", headers=BATCH).status == 404
    batchs = shared.send("mine", BATCH, max_tokens=6)
    shared.settle()
    states = [shared.ask("GET", "/mine", headers=headers).json() for headers in (WEB, BATCH)]
    assert [state["max_tokens"] for state in states] == [5, 6]
    assert shared.ask("DELETE", "/mine", headers=BATCH).status == 200
    shared.open()
    ends = [answer.result().json()["choices"][0]["finish_reason"] for answer in (webs, batchs)]
    assert ends == ["length", "abort"]


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
    assert shared.ask("POST", "/auto", {"priority": 9}, BATCH).status == 403
    shared.settle()
    found = listed(shared.ask("GET", headers=BATCH))
    shared.open()
    assert [state["priority"] for state in found.values()] == [10, 10]
    assert [answer.result().status for answer in waiting] == [200] * 2
