"""Streams that have nothing to say for a while."""

from __future__ import annotations

import itertools
import json
import select
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPResponse
from typing import Any

import pytest

from headway.engine.engine import Engine

Serve = Callable[..., Any]
MakeEngine = Callable[..., Engine]

#: Seconds; so short that tests need not wait.
SOON = 0.01


class Stream:
    """A stream as its client sees it."""

    def __init__(self, server: Any, **fields: Any) -> None:
        self._connection = server.connect()
        body = json.dumps({"prompt": "It", "max_tokens": 100, "stream": True} | fields).encode()
        self._connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )

    def has_said_something(self) -> bool:
        return bool(select.select([self._connection], [], [], 0)[0])

    def close(self) -> None:
        self._connection.close()

    def begin(self) -> HTTPResponse:
        """Returns when the status has come."""
        response = HTTPResponse(self._connection)
        response.begin()
        return response


#: Opens a stream.
Open = Callable[..., Stream]


@pytest.fixture
def opened() -> Iterator[Open]:
    """``opened(server, **fields)``: a stream, which is closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda *args, **fields: stack.enter_context(closing(Stream(*args, **fields)))


def read_comments(response: HTTPResponse, count: int) -> None:
    """Read on until so many comments have come."""
    for _ in range(count):
        while response.readline() != b": keep-alive\n":
            pass
        assert response.readline() == b"\n"


def hold_in_the_middle(server: Any) -> None:
    """Hold the steps once the first request has got some tokens."""
    steps = itertools.count()

    def hold(*_: Any) -> None:
        if next(steps) == 20:
            server.brake.hold()

    server.engine.listeners.append(hold)


def test_a_stream_that_is_silent_gets_comments(serve: Serve, opened: Open) -> None:
    server = serve(stream_keep_alive=SOON)
    hold_in_the_middle(server)
    response = opened(server).begin()
    read_comments(response, 3)
    server.brake.release()
    events = [event for event in response.read().split(b"\n\n") if event.startswith(b"data: {")]
    assert json.loads(events[-1][6:])["choices"][0]["finish_reason"] == "length"


def test_openais_client_skips_them(
    serve: Serve, opened: Open, background: ThreadPoolExecutor, story: str
) -> None:
    server = serve(stream_keep_alive=SOON)
    hold_in_the_middle(server)
    witness = opened(server).begin()
    with server.client() as client:

        def read() -> str:
            stream = client.completions.create(
                model="story", prompt=story[:7], max_tokens=50, stream=True
            )
            return "".join(piece.choices[0].text for piece in stream)

        text = background.submit(read)
        read_comments(witness, 3)
        server.brake.release()
        assert text.result() == story[7:57]


def test_a_stream_that_has_not_begun_gets_none(
    serve: Serve, opened: Open, make_engine: MakeEngine
) -> None:
    server = serve(make_engine(max_num_seqs=1), stream_keep_alive=SOON)
    hold_in_the_middle(server)
    silent = opened(server).begin()
    assert server.brake.is_holding.wait(60)
    waiting = opened(server)
    server.wait_until(lambda: server.engine.ingress_usage > 0)
    read_comments(silent, 5)
    assert not waiting.has_said_something()
    server.brake.release()
    assert waiting.begin().read().endswith(b"data: [DONE]\n\n")


def test_unless_the_operator_wants_it(serve: Serve, opened: Open) -> None:
    server = serve(stream_keep_alive=SOON, stream_keep_alive_before_first_token=True)
    server.brake.hold()
    response = opened(server).begin()
    assert response.status == 200
    read_comments(response, 2)
    server.brake.release()
    assert response.read().endswith(b"data: [DONE]\n\n")


def test_what_prevents_the_answer_is_then_an_event(
    serve: Serve, opened: Open, make_engine: MakeEngine
) -> None:
    server = serve(
        make_engine(max_num_seqs=1, max_num_queued_reqs=1),
        stream_keep_alive=SOON,
        stream_keep_alive_before_first_token=True,
    )
    server.brake.hold()
    streams = [opened(server, priority=0)]
    assert server.brake.is_holding.wait(60)
    for number, priority in enumerate((9, 5), 1):
        streams.append(opened(server, priority=priority))
        server.wait_until(lambda: round(server.engine.ingress_usage * 100) == number)  # noqa: B023
    refused = streams[1].begin()
    read_comments(refused, 1)
    server.brake.release()
    *_, last, rest = refused.read().split(b"\n\n")
    assert (last[:12], rest) == (b"event: error", b"")
    assert json.loads(last.split(b"data: ")[1])["error"]["code"] == "queue_full"
    assert streams[2].begin().status == 200
