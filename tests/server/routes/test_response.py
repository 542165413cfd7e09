"""What becomes of an answer when something goes wrong, and of a client that goes away."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import APIError, OpenAI

from headway.core.errors import HeadwayError, InternalError
from headway.engine.client import StepReport
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput
from headway.executor.simulated import SimulatedExecutor, VirtualClock

#: Longer than any of these tests should take, so that one that hangs fails.
TIMEOUT = 60.0

Serve = Callable[..., Any]
MakeEngine = Callable[..., Engine]


class Ends:
    """How an engine's requests end: id, finish reason, error, in that order."""

    def __init__(self, engine: Engine) -> None:
        self._queue: queue.Queue[tuple[str, str | None, HeadwayError | None]] = queue.Queue()
        engine.listeners.append(self._on_step)

    def _on_step(self, _: StepReport, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if output.is_last:
                self._queue.put((output.request_id, output.finish_reason, output.error))

    def next(self) -> tuple[str, str | None, HeadwayError | None]:
        return self._queue.get(timeout=TIMEOUT)


@pytest.fixture
def endless(serve: Serve, make_engine: MakeEngine) -> Any:
    """A server in whose contexts 20,000 tokens fit, more than any test waits for."""
    return serve(make_engine(num_blocks=5000))


def failing(make_engine: MakeEngine, position: int) -> Engine:
    """An engine that cannot choose the token at this position, in requests named so."""

    def sample(request_id: str, at: int) -> int:
        if at == position and request_id.startswith("bad"):
            raise InternalError("the logits are not finite")
        return ord("a")

    executor = SimulatedExecutor(
        VirtualClock(), num_blocks=200, block_size=4, max_model_len=800, sampler=sample
    )
    return make_engine(executor=executor)


def head(body: bytes, **headers: str) -> bytes:
    """A request's head."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def body_of(**more: Any) -> bytes:
    return json.dumps({"prompt": "It", "max_tokens": 19_000} | more).encode()


def read_until(connection: socket.socket, text: bytes) -> bytes:
    data = b""
    while text not in data:
        received = connection.recv(4096)
        assert received, data
        data += received
    return data


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_an_error_before_the_first_token_is_the_status(
    serve: Serve, make_engine: MakeEngine, is_stream: bool, n: int
) -> None:
    server = serve(failing(make_engine, 2))
    body = {"prompt": "It", "stream": is_stream, "n": n}
    answer = server.call("POST", "/v1/completions", body, {"X-Request-Id": "bad"})
    assert answer.status == 500
    assert answer.error()["type"] == "server_error"
    assert server.call("POST", "/v1/completions", body).status == 200


def test_an_error_in_the_stream_is_its_last_event(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(failing(make_engine, 5))
    with server.client() as client:
        stream = client.completions.create(
            model="story", prompt="It", stream=True, extra_headers={"X-Request-Id": "bad"}
        )
        text = ""
        with pytest.raises(APIError) as raised:
            for piece in stream:
                text += piece.choices[0].text
    assert text == "aaa"
    assert raised.value.type == "server_error"


@pytest.mark.parametrize(
    ("more", "failed", "aborted"),
    [({"n": 2}, "bad", ()), ({"prompt": ["It", "It was"]}, "bad-1", ("bad-0",))],
)
def test_the_choices_of_a_request_end_together(
    serve: Serve,
    make_engine: MakeEngine,
    more: dict[str, Any],
    failed: str,
    aborted: tuple[str, ...],
) -> None:
    engine = failing(make_engine, 100)
    ends = Ends(engine)
    server = serve(engine)
    body = {"prompt": "It", "stream": True, "max_tokens": 300} | more
    answer = server.call("POST", "/v1/completions", body, {"X-Request-Id": "bad"})
    *_, last, rest = answer.body.decode().split("\n\n")
    event, data = last.split("\n")
    assert (event, rest) == ("event: error", "")
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "server_error"
    request_id, _, error = ends.next()
    assert request_id == failed and isinstance(error, InternalError)
    for part_id in aborted:
        assert ends.next()[:2] == (part_id, "abort")


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_full_queue_is_told_by_the_status(
    serve: Serve,
    make_engine: MakeEngine,
    background: ThreadPoolExecutor,
    is_stream: bool,
) -> None:
    server = serve(make_engine(max_num_seqs=1, max_num_queued_reqs=1))

    def call(priority: int) -> Any:
        body = {"prompt": "It", "stream": is_stream, "priority": priority}
        return server.call("POST", "/v1/completions", body)

    server.brake.hold()
    running = background.submit(call, 0)
    assert server.brake.is_holding.wait(TIMEOUT)
    waiting = [background.submit(call, priority) for priority in (5, 3, 4)]
    server.wait_until(lambda: len(waiting) == round(server.engine.ingress_usage * 100))
    server.brake.release()
    assert running.result().status == 200
    answers = [call.result() for call in waiting]
    assert [answer.status for answer in answers] == [503, 200, 503]
    assert answers[0].error()["code"] == "queue_full"
    assert int(answers[0].headers["Retry-After"]) >= 1


def test_a_reader_that_is_too_slow_is_told_so(serve: Serve, make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=5000)
    ends = Ends(engine)
    server = serve(engine, send_buffer=4096, max_buffered_tokens=64)
    connection = server.connect(receive_buffer=4096)
    body = body_of(stream=True)
    connection.sendall(head(body) + body)
    _, reason, _ = ends.next()  # it was never read, and yet is over
    assert reason == "abort"
    data = read_until(connection, b"event: error")
    assert b"data: [DONE]" not in data
    hang_up(connection)


# --- clients that go away -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["nothing", "half a head", "a head", "half a body"])
def test_a_client_that_leaves_before_it_has_asked(server: Any, part: str) -> None:
    body = body_of()
    message = {
        "nothing": b"",
        "half a head": head(body)[:40],
        "a head": head(body),
        "half a body": head(body) + body[:10],
    }[part]
    connection = server.connect()
    connection.sendall(message)
    hang_up(connection)
    assert server.call("POST", "/v1/completions", {"prompt": "It"}).status == 200


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_before_the_first_token(endless: Any, is_stream: bool, n: int) -> None:
    ends = Ends(endless.engine)
    endless.brake.hold()
    connection = endless.connect()
    body = body_of(stream=is_stream, n=n)
    connection.sendall(head(body) + body)
    assert endless.brake.is_holding.wait(TIMEOUT)
    hang_up(connection)
    endless.brake.release()
    _, reason, error = ends.next()
    assert (reason, error) == ("abort", None)


def test_a_client_that_leaves_while_it_waits_for_a_slot(
    serve: Serve, make_engine: MakeEngine
) -> None:
    server = serve(make_engine(num_blocks=5000, max_num_seqs=1))
    ends = Ends(server.engine)
    body = body_of(stream=True)
    first, second = server.connect(), server.connect()
    first.sendall(head(body, X_Request_Id="first") + body)
    read_until(first, b"data: ")
    second.sendall(head(body, X_Request_Id="second") + body)
    while not server.engine.scheduler.waiting_heap:
        read_until(first, b"data: ")
    hang_up(second)
    assert ends.next()[:2] == ("second", "abort")
    hang_up(first)
    assert ends.next()[:2] == ("first", "abort")


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_in_the_middle(endless: Any, n: int) -> None:
    ends = Ends(endless.engine)
    connection = endless.connect()
    body = body_of(stream=True, n=n)
    connection.sendall(head(body) + body)
    read_until(connection, f'"index":{n - 1}'.encode())
    hang_up(connection)
    assert [ends.next()[1] for _ in range(n)] == ["abort"] * n


def test_a_client_that_leaves_without_having_got_its_whole_answer(endless: Any) -> None:
    ends = Ends(endless.engine)
    tokens = iter(range(100))

    def leave(*_: Any) -> None:
        if next(tokens, None) == 50:
            hang_up(connection)

    endless.engine.listeners.append(leave)
    connection = endless.connect()
    body = body_of()
    connection.sendall(head(body) + body)
    assert ends.next()[1] == "abort"


def test_a_client_that_leaves_after_the_end(server: Any) -> None:
    for is_stream, end in ((True, b"0\r\n\r\n"), (False, b'"cached_tokens":0}}}')):
        connection = server.connect()
        body = body_of(stream=is_stream, max_tokens=5, prompt=f"It {is_stream}")
        connection.sendall(head(body) + body)
        read_until(connection, end)
        hang_up(connection)


def test_a_client_that_leaves_with_another_request_behind_the_first(
    endless: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ends = Ends(endless.engine)
    connection = endless.connect()
    body = body_of(stream=True)
    connection.sendall(2 * (head(body) + body))
    read_until(connection, b"data: ")
    hang_up(connection)
    assert ends.next()[1] == "abort"
    endless.assert_idle()
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_openais_client_aborts_by_closing_the_stream(endless: Any) -> None:
    ends = Ends(endless.engine)
    with endless.client() as client:
        with client.completions.create(
            model="story", prompt="It", max_tokens=19_000, stream=True
        ) as stream:
            next(iter(stream))
        assert ends.next()[1] == "abort"


# --- curl -----------------------------------------------------------------------------------------


def curl(*arguments: str) -> str:
    done = subprocess.run(
        ["curl", "-sS", "--max-time", str(TIMEOUT), *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_curl(server: Any, story: str) -> None:
    url = f"{server.url}/v1/completions"
    body = json.dumps({"prompt": story[:7], "max_tokens": 5})
    whole = curl(url, "-H", "Content-Type: application/json", "-d", body)
    assert json.loads(whole)["choices"][0]["text"] == story[7:12]
    streamed = curl(url, "-N", "--json", body.replace("}", ', "stream": true}'))
    assert streamed.startswith("data: {") and streamed.endswith("data: [DONE]\n\n")
    without_type = json.loads(curl(url, "-d", body))
    assert "Content-Type" in without_type["error"]["message"]


def test_client_sees_headers_before_the_end(client: OpenAI, server: Any) -> None:
    """A stream begins with its first token, not with its last."""
    with client.completions.with_streaming_response.create(
        model="story", prompt="It", max_tokens=5, stream=True
    ) as response:
        assert response.headers["x-request-id"].startswith("cmpl-")
        assert response.status_code == 200
