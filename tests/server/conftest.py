"""A real server, in a thread, on an engine that tells a story in virtual time."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPMessage
from typing import Any, NamedTuple

import pytest
from openai import OpenAI

from headway.core.scheduler_output import SchedulerOutput
from headway.engine.async_engine import AsyncEngine
from headway.engine.client import EngineClient, StepReport
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput
from headway.executor.base import Executor, ModelRunnerOutput
from headway.server import run
from headway.server.config import ServerConfig

#: Longer than any of these tests should take, so that one that hangs fails.
TIMEOUT = 60.0

MakeEngine = Callable[..., Engine]


class Brake:
    """An executor whose steps can be held, so that requests stay as they are meanwhile."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._changed = threading.Condition()
        #: Steps that have come, and how many of them may pass.
        self._num_steps = 0
        self._num_free: float = math.inf
        #: Set while a step is being held.
        self.is_holding = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def hold(self) -> None:
        """Hold the next step and those after it."""
        with self._changed:
            self.is_holding.clear()
            self._num_free = self._num_steps

    def release(self) -> None:
        """Let all steps pass."""
        with self._changed:
            self._num_free = math.inf
            self._changed.notify_all()

    def step(self, count: int = 1) -> None:
        """Let the held step pass and hold the next, so many times."""
        for _ in range(count):
            with self._changed:
                self.is_holding.clear()
                self._num_free += 1
                self._changed.notify_all()
            assert self.is_holding.wait(TIMEOUT)

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        with self._changed:
            self._num_steps += 1
            if self._num_steps > self._num_free:
                self.is_holding.set()
            assert self._changed.wait_for(lambda: self._num_steps <= self._num_free, TIMEOUT)
        return self._executor.execute(output)


class Answer(NamedTuple):
    """A whole response."""

    status: int
    headers: HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """What is wrong, which must be said in OpenAI's shape and in a line."""
        assert self.headers["content-type"] == "application/json"
        body = self.json()
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["message"]
        assert "\n" not in body["error"]["message"]
        return body["error"]


class RunningServer:
    """A server that answers at ``url``, which is on ``port`` of this machine.

    Args:
        engine: to serve with.
        config: how to serve.
        send_buffer: bytes that the kernel keeps for a client that does not read; None = many.
    """

    def __init__(
        self, engine: Engine, config: ServerConfig, send_buffer: int | None = None
    ) -> None:
        self.engine = engine
        #: The last outputs of requests that have ended, in the order of their ends.
        self.ended: list[EngineOutput] = []
        engine.listeners.append(self._on_step)
        self.brake = engine.executor = Brake(engine.executor)
        listener = run.bind(config)
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.url = run.base_url(config, listener)
        self.port = int(listener.getsockname()[1])
        is_ready = threading.Event()
        self._server = run.Server(
            AsyncEngine(engine, config.max_buffered_tokens), config, is_ready.set
        )
        self.app = self._server.config.app
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="test-server"
        )
        self._thread.start()
        assert is_ready.wait(TIMEOUT)

    def _on_step(self, _: StepReport, outputs: Sequence[EngineOutput]) -> None:
        self.ended += [output for output in outputs if output.is_last]

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request, with ``body`` as JSON unless it is bytes."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def client(self, api_key: str = "none") -> OpenAI:
        """OpenAI's own client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=TIMEOUT)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A bare connection."""
        connection = socket.socket()
        connection.settimeout(TIMEOUT)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when something has become true of the server, which must be soon."""
        deadline = time.monotonic() + TIMEOUT
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < deadline, self.engine.scheduler.requests
            pause.wait(0.005)

    def assert_idle(self) -> None:
        """Soon nothing is left of all requests so far, while the server goes on."""
        self.wait_until(lambda: not self.engine.has_work and not self._server.server_state.tasks)
        statistics = self.engine.scheduler.statistics()
        assert statistics.blocks.held == 0
        assert statistics.num_swap_blocks_used == 0

    def stop(self) -> None:
        """What SIGTERM does; returns when the server has ended."""
        self._server.should_exit = True
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


#: Starts a server; see ``serve``.
Serve = Callable[..., RunningServer]


@pytest.fixture
def serve(make_engine: MakeEngine) -> Iterator[Serve]:
    """``serve(engine, send_buffer, **settings)``: a running server, see ``RunningServer``.

    At the end of the test nothing may be left of its requests, while it is still running.

    The engine is one of ``make_engine`` unless given; settings are those of ``ServerConfig``.
    """
    with ExitStack() as stack:

        def start(
            engine: Engine | None = None, send_buffer: int | None = None, **settings: Any
        ) -> RunningServer:
            defaults: dict[str, Any] = {"served_model_names": ("story",), "port": 0}
            config = ServerConfig(**(defaults | settings))
            server = RunningServer(engine or make_engine(), config, send_buffer)
            stack.callback(server.stop)
            stack.callback(server.assert_idle)
            stack.callback(server.brake.release)
            return server

        yield start


@pytest.fixture
def client_of() -> Callable[[Engine], EngineClient]:
    """``client_of(engine)``: the client of an engine that the test steps itself."""

    def client_of(engine: Engine) -> EngineClient:
        client = AsyncEngine(engine)
        engine.listeners.clear()  # there is no event loop that reads
        return client

    return client_of


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    """A server with the default settings."""
    return serve()


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    """OpenAI's own client of ``server``."""
    with server.client() as client:
        yield client


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that wait for answers."""
    with ThreadPoolExecutor(16) as pool:
        yield pool
