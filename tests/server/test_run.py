"""Binding, starting and ending; what needs a process of its own is in ``test_command``."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest

from headway.core.errors import ConfigError, EngineStopped
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.async_engine import AsyncEngine
from headway.engine.engine import Engine
from headway.executor.base import ModelRunnerOutput
from headway.server import run
from headway.server.config import ServerConfig
from headway.server.edge.api_keys import ApiKey

Serve = Callable[..., Any]
MakeEngine = Callable[..., Engine]


def config(**settings: Any) -> ServerConfig:
    return ServerConfig(**({"served_model_names": ("story",), "port": 0} | settings))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_may_connect_without_a_key(host: str) -> None:
    with run.bind(config(host=host)) as listener:
        listener.listen()
        url = run.base_url(config(host=host), listener)
        shown = f"[{host}]" if ":" in host else host
        assert url == f"http://{shown}:{listener.getsockname()[1]}"
        with socket.create_connection(listener.getsockname()[:2]):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_may_not_unless_told_otherwise(host: str) -> None:
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        run.bind(config(host=host))
    for more in ({"allow_unauthenticated": True}, {"api_keys": (ApiKey("sk", "web"),)}):
        run.bind(config(host=host, **more)).close()


@pytest.mark.parametrize("host", ["", "no such host", "x" * 300, "256.0.0.1", "\ud800"])
def test_a_host_that_does_not_exist_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="host is"):
        run.bind(config(host=host, allow_unauthenticated=True))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1 port 0: cannot assign"):
        run.bind(config(host="192.0.2.1", allow_unauthenticated=True))


def test_an_address_that_is_taken_while_the_model_is_loaded(make_engine: MakeEngine) -> None:
    with run.bind(config()) as listener, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(listener.getsockname())
        other.listen()
        with pytest.raises(ConfigError, match="address already in use"):
            port = listener.getsockname()[1]
            run.run(AsyncEngine(make_engine()), config(port=port), listener, print)


class Broken:
    """An executor that fails."""

    num_blocks = 200
    block_size = 4
    num_swap_blocks = 0
    max_model_len = 800

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        raise RuntimeError("out of smoke")

    def close(self) -> None:
        pass


def test_a_server_whose_engine_dies_ends_and_says_why(
    make_engine: MakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sys.getswitchinterval()
    statuses: list[int] = []
    with run.bind(config()) as listener:
        connection = HTTPConnection("127.0.0.1", listener.getsockname()[1])

        def ask() -> None:
            body = '{"prompt": "a"}'
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)

        with pytest.raises(EngineStopped, match="step loop died"):
            run.run(AsyncEngine(make_engine(executor=Broken())), config(), listener, ask)
        statuses.append(connection.getresponse().status)
        connection.close()
    sys.setswitchinterval(before)
    assert statuses == [503]
    assert "RuntimeError: out of smoke" in capfd.readouterr().err


def test_connections_that_are_idle_do_not_hold_up_the_end(serve: Serve) -> None:
    server = serve()
    with server.connect() as fresh, server.connect() as used:
        used.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert used.recv(1000).startswith(b"HTTP/1.1 200 ")
        server.stop()
        assert fresh.recv(1) == b""
        assert b"ok" not in used.recv(1000)


def test_what_is_gathered_for_a_reader_is_still_sent(serve: Serve, story: str) -> None:
    server = serve()
    connection = HTTPConnection("127.0.0.1", server.port)
    body = '{"prompt": "It was", "max_tokens": 300, "stream": true, "temperature": 0}'
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    server.stop()
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_request_that_was_accepted_is_served_whole(
    serve: Serve, background: ThreadPoolExecutor, story: str, num_choices: int
) -> None:
    server = serve()
    server.brake.hold()
    body = {"prompt": [story[:7], story[:9]], "n": num_choices, "max_tokens": 5}
    answer = background.submit(server.call, "POST", "/v1/completions", body)
    assert server.brake.is_holding.wait(60)
    ending = background.submit(server.stop)
    server.wait_until(lambda: not server.app.state.serving.engine.is_alive)
    server.brake.release()
    texts = [choice["text"] for choice in answer.result().json()["choices"]]
    assert texts == [story[7:12]] * num_choices + [story[9:14]] * num_choices
    ending.result()
