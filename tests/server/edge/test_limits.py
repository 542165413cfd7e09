"""Clients that send too much, too slowly or not at all, do not read, or go away."""

from __future__ import annotations

import itertools
import json
import select
import socket
from collections.abc import Callable, Sequence
from http.client import HTTPResponse
from typing import Any

import pytest

from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput
from headway.server.edge.limits import MAX_HEAD_BYTES

Serve = Callable[..., Any]
MakeEngine = Callable[..., Engine]

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
DOCUMENT = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def request(**fields: Any) -> bytes:
    """A whole request for a completion."""
    body = json.dumps({"model": "story", "prompt": "It was", "temperature": 0} | fields).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answer_of(connection: socket.socket) -> tuple[int, Any]:
    """Status and body, or its error's code, of the next response."""
    response = HTTPResponse(connection)
    response.begin()
    body = json.loads(response.read())
    return response.status, body["error"]["code"] if "error" in body else body


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side hangs up, now or soon, without another byte."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# --- too much -------------------------------------------------------------------------------------


def test_a_body_that_is_announced_to_be_too_long_is_not_waited_for(serve: Serve) -> None:
    server = serve(max_body_bytes=1000)
    with server.connect() as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
        assert answer_of(connection) == (413, "body_too_large")


def test_a_body_of_just_the_limit_is_accepted(serve: Serve) -> None:
    server = serve(max_body_bytes=1000)
    body = request(max_tokens=1).split(b"\r\n\r\n")[1]
    assert server.call("POST", "/v1/completions", body.ljust(1000)).status == 200
    assert server.call("POST", "/v1/completions", body.ljust(1001)).status == 413


def test_a_chunked_body_is_refused_when_it_gets_too_long(serve: Serve) -> None:
    server = serve(max_body_bytes=1000)
    with server.connect() as connection:
        connection.sendall(CHUNKED + b"3e8\r\n" + b" " * 1000 + b"\r\n1\r\n{\r\n")
        assert answer_of(connection) == (413, "body_too_large")


def test_a_client_that_sends_100_mb_all_the_same_is_told(serve: Serve) -> None:
    answer = serve().call("POST", "/v1/completions", bytes(100_000_000))
    assert answer.status == 413
    assert "4194304" in answer.error()["message"]


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_a_head_that_is_too_long_is_refused(serve: Serve, end: bytes) -> None:
    server = serve()
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + bytes(b"x" * MAX_HEAD_BYTES) + end)
        assert answer_of(connection) == (431, "head_too_large")
        assert is_closed(connection)


@pytest.mark.parametrize(
    "lengths",
    [
        b"Content-Length: 2\r\nContent-Length: 3\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: two\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
    ],
)
def test_a_length_that_can_be_understood_in_two_ways_is_refused(
    serve: Serve, lengths: bytes
) -> None:
    server = serve()
    with server.connect() as connection:
        connection.sendall(HEAD + lengths + b"\r\n{}")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


# --- too slow -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        HEAD,
        HEAD + b"Content-Length: 100\r\n\r\n",
        HEAD + b'Content-Length: 100\r\n\r\n{"prompt": "',
        CHUNKED + b"5\r\n",
        b"\r\n",
        request(max_tokens=1) + HEAD,
    ],
)
def test_a_request_must_arrive_in_time(serve: Serve, sent: bytes) -> None:
    server = serve(request_timeout=0.1)
    with server.connect() as connection:
        connection.sendall(sent)
        if sent.startswith(request(max_tokens=1)):
            assert answer_of(connection)[0] == 200
        assert answer_of(connection) == (408, "request_timeout")
        assert is_closed(connection)


@pytest.mark.parametrize("request_", [request(max_tokens=1), HEAD + b"X: " + b"y" * 500])
def test_a_byte_now_and_then_does_not_help(serve: Serve, request_: bytes) -> None:
    server = serve(request_timeout=0.2)
    with server.connect() as connection:
        for byte in request_:
            connection.sendall(bytes([byte]))
            if select.select([connection], [], [], 0.01)[0]:
                break
        assert answer_of(connection) == (408, "request_timeout")


def test_an_answer_may_take_longer_than_the_request(serve: Serve) -> None:
    server = serve(request_timeout=0.1)
    server.brake.hold()
    with server.connect() as late, server.connect() as connection:
        connection.sendall(request(max_tokens=3))
        assert server.brake.is_holding.wait(60)
        late.sendall(b"P")
        assert answer_of(late)[0] == 408, "so the time is over"
        server.brake.release()
        assert answer_of(connection)[0] == 200


def test_a_client_that_is_answered_before_it_has_sent_all_is_hung_up_on(serve: Serve) -> None:
    server = serve(request_timeout=0.1)
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n{")
        assert answer_of(connection) == (413, "body_too_large")
        assert is_closed(connection)


# --- not reading ----------------------------------------------------------------------------------


def wait_for_reset(connection: socket.socket) -> None:
    """Returns once the connection has been aborted; reads nothing."""
    poll = select.poll()
    poll.register(connection, 0)
    assert poll.poll(60_000)


#: More than the kernel keeps for a client, of which each choice has its own.
MUCH: dict[str, Any] = {"prompt": "x" * 1500, "echo": True, "n": 100, "max_tokens": 20}


def test_a_stream_that_is_not_read_is_ended(serve: Serve, make_engine: MakeEngine) -> None:
    server = serve(make_engine(num_blocks=20_000), send_buffer=4096, send_timeout=0.2)
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(request(stream=True, **MUCH))
        wait_for_reset(connection)
        server.assert_idle()
    assert server.call("GET", "/health").status == 200


def test_a_stream_that_is_not_read_is_ended_while_it_is_made(
    serve: Serve, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_blocks=20_000)
    server = serve(engine, send_buffer=4096, send_timeout=5.0)

    def hold_in_the_middle(_: Any, outputs: Sequence[EngineOutput]) -> None:
        if any(output.request_id.endswith("-3") for output in outputs):
            server.brake.hold()

    engine.listeners.append(hold_in_the_middle)
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(request(stream=True, **MUCH))
        assert server.brake.is_holding.wait(60)
        wait_for_reset(connection)
        engine.listeners.remove(hold_in_the_middle)
        server.brake.release()
        server.assert_idle()


def test_an_answer_that_is_not_read_is_dropped(serve: Serve) -> None:
    server = serve(send_buffer=4096, send_timeout=0.2)
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(
            b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        wait_for_reset(connection)


def test_a_slow_reader_gets_everything(serve: Serve) -> None:
    """Its time begins anew whenever it takes something."""
    server = serve(send_buffer=4096, send_timeout=1.0)
    whole = server.call("GET", "/openapi.json").body
    with server.connect(receive_buffer=16384) as connection:
        connection.sendall(
            b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        received = bytearray()
        # It takes longer than ``send_timeout`` for all.
        while part := connection.recv(len(whole) // 30):
            received += part
            select.select([], [], [], 0.05)
    assert received.endswith(whole)


# --- gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 40, len(HEAD), -100, -1])
def test_a_client_may_go_before_it_has_asked(serve: Serve, length: int) -> None:
    server = serve()
    with server.connect() as connection:
        connection.sendall(request(max_tokens=5)[:length])
    server.assert_idle()
    assert server.call("GET", "/health").status == 200


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"prompt": ["It", "It was"]}])
def test_a_client_may_go_before_the_first_token(serve: Serve, fields: dict[str, Any]) -> None:
    server = serve()
    server.brake.hold()
    with server.connect() as connection:
        connection.sendall(request(max_tokens=500, **fields))
        assert server.brake.is_holding.wait(60)
    server.brake.release()
    server.assert_idle()


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["It", "It was"]}])
def test_a_client_may_go_in_the_middle_of_a_stream(serve: Serve, fields: dict[str, Any]) -> None:
    server = serve()
    with server.connect() as connection:
        steps = itertools.count()
        server.engine.listeners.append(lambda *_: next(steps) == 20 and server.brake.hold())
        connection.sendall(request(max_tokens=500, stream=True, **fields))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        assert server.brake.is_holding.wait(60)
    server.brake.release()
    server.assert_idle()
