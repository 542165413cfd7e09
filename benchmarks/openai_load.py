"""A light client and server starter for load on any OpenAI-compatible server.

The client shares the machine's cores with the server it measures, so it does little for a token:
one C parser, one search in the line, one time stamp. Times are those at which bytes reached this
process; a request's clock starts before its connection is opened.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools
import psutil

#: Common words; in most vocabularies each is one token.
_TEXT = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work number night point home
water room mother area money story fact month lot right study book eye job word business issue side
kind head house service friend father power hour game line end member law car city community name
president team minute idea kid body information back parent face others level office door health
person art war history party result change morning reason research girl guy moment air teacher
force education foot boy age policy music market sense nation plan college interest death
experience effect use class control field development role effort rate heart drug show leader light
voice wife
"""
_WORDS = _TEXT.split()


class Prompts:
    """Texts that differ from their first words on, so that no prefix cache helps."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self, num_words: int) -> str:
        return " ".join(self._random.choices(_WORDS, k=num_words))


class Connection(asyncio.Protocol):
    """One HTTP connection with one request; keeps when the events of its response came.

    Attributes:
        status: of the response; None before it.
        start: when the request was made, in seconds; ``times`` and ``end`` are on the same clock.
        times: of the events that hold a choice.
        end: when the response was complete, or the connection gone.
        num_tokens: as the server counted them; None if it did not say.
        error: why the response is not whole; None if it is.
        body: of a response that is not a stream.
        begun: set at the first event, or at the end.
        done: set at the end.
    """

    def __init__(self, request: bytes, is_stream: bool) -> None:
        self._request = request
        self._is_stream = is_stream
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now = 0.0
        self._transport: asyncio.Transport | None = None
        self.start = perf_counter()
        self.status: int | None = None
        self.times: list[float] = []
        self.end: float | None = None
        self.num_tokens: int | None = None
        self.error: str | None = None
        self._is_closed = False
        self.body = b""
        self.begun = asyncio.Event()
        self.done = asyncio.Event()

    @property
    def tokens_per_event(self) -> float:
        """An event is a token, but for characters of several tokens and a last, empty event."""
        if self.num_tokens is None or not self.times:
            return 1.0
        return self.num_tokens / len(self.times)

    def close(self) -> None:
        """Hang up; the response may not be whole, and that is no error."""
        self._is_closed = True
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.status != 200 or not self._is_stream:
            self.body += body
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if b'"choices":[{' in line or b'"choices": [{' in line:
                self.times.append(self._now)
                self.begun.set()
            elif b'"error":' in line:
                self.error = line.decode(errors="replace")
            if b'"completion_tokens":' in line:
                self.num_tokens = json.loads(line[5:])["usage"]["completion_tokens"]

    def on_message_complete(self) -> None:
        self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(None if self._is_closed else f"the connection was closed: {exc}")

    def _finish(self, error: str | None) -> None:
        if self.end is None:
            self.end = perf_counter()
            if self.status not in (None, 200):
                error = f"status {self.status}: {self.body.decode(errors='replace')}"
            elif self._is_stream and not self.times and not self._is_closed:
                error = error or "the stream was empty"
            self.error = self.error or error
            self.begun.set()
            self.done.set()


class Client:
    """Makes requests to one server, each on a connection of its own.

    Args:
        base_url: ``http://host:port``; a trailing ``/v1`` is accepted.
        model: as the server calls it; ``prepare`` finds the first that it serves if None.
        api_key: sent as a bearer token.
    """

    def __init__(self, base_url: str, model: str | None = None, api_key: str | None = None) -> None:
        url = urlsplit(base_url)
        if url.scheme != "http" or url.hostname is None:
            raise SystemExit(f"base URL is {base_url!r}, must be http://host:port")
        self.host, self.port = url.hostname, url.port or 80
        self.model = model
        authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n{authorization}"

    async def prepare(self) -> None:
        if self.model is None:
            self.model = json.loads(await self.get("/v1/models"))["data"][0]["id"]

    async def get(self, path: str) -> bytes:
        """The body at ``path``.

        Raises:
            OSError: no answer, or another status than 200.
        """
        connection = await self.open(path)
        await connection.done.wait()
        connection.close()
        if connection.error is not None:
            raise OSError(f"{path}: {connection.error}")
        return connection.body

    async def open(self, path: str) -> Connection:
        """Ask for ``path``; the connection stays open after the answer."""
        return await self._connect(f"GET {path} {self._headers}\r\n".encode(), is_stream=False)

    async def stream(self, prompt: str, max_tokens: int, priority: int) -> Connection:
        """Begin a streaming completion of exactly ``max_tokens`` tokens."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return await self._post(prompt, max_tokens, priority, options, is_stream=True)

    async def complete(
        self, prompt: str, max_tokens: int, priority: int, timeout: float = 300.0
    ) -> Connection:
        """A streaming completion, to its end; what went wrong is in its ``error``."""
        connection = await self.stream(prompt, max_tokens, priority)
        try:
            await asyncio.wait_for(connection.done.wait(), timeout)
        except asyncio.TimeoutError:
            connection.error = f"no end within {timeout:.0f} s"
        finally:
            connection.close()
        return connection

    async def answer(
        self, prompt: str, max_tokens: int, priority: int, **options: Any
    ) -> dict[str, Any]:
        """A completion of exactly ``max_tokens`` tokens as one object.

        Raises:
            OSError: no answer, or another status than 200.
        """
        connection = await self._post(prompt, max_tokens, priority, options, is_stream=False)
        await connection.done.wait()
        connection.close()
        if connection.error is not None:
            raise OSError(f"/v1/completions: {connection.error}")
        answer: dict[str, Any] = json.loads(connection.body)
        return answer

    async def _post(
        self,
        prompt: str,
        max_tokens: int,
        priority: int,
        options: dict[str, Any],
        is_stream: bool,
    ) -> Connection:
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "priority": priority,
                **options,
            }
        ).encode()
        head = (
            f"POST /v1/completions {self._headers}content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return await self._connect(head.encode() + body, is_stream)

    async def _connect(self, request: bytes, is_stream: bool) -> Connection:
        connection = Connection(request, is_stream)
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: connection, self.host, self.port)
        except OSError as error:
            connection.connection_lost(error)
        return connection


class Background:
    """Streams in a closed loop: each begins its next completion when the last has ended.

    Args:
        spread: the first completions are of lengths between one token and all, evenly spread.
            Without, all are as long as each other, as when a batch is submitted at once, and the
            streams go through the server in waves.
    """

    def __init__(
        self,
        client: Client,
        prompts: Prompts,
        num_words: int,
        max_tokens: int,
        priority: int,
        spread: bool = True,
    ) -> None:
        self.client = client
        self.prompts = prompts
        self.num_words = num_words
        self.max_tokens = max_tokens
        self.priority = priority
        self.spread = spread
        self.connections: list[Connection] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()

    def start(self, num_streams: int) -> None:
        for index in range(num_streams):
            first = -(-self.max_tokens * (index + 1) // num_streams)
            tokens = first if self.spread else self.max_tokens
            self._tasks.append(asyncio.create_task(self._run(tokens)))

    async def window(self, seconds: float) -> tuple[float, float]:
        """Let at least the time pass, on to the end of a completion; returns begin and end.

        Streams in waves give no tokens while their prompts are computed; a window from one end of
        a wave to another holds as much of that as there is.
        """
        start = perf_counter()
        await asyncio.sleep(seconds)
        self._ended.clear()
        await self._ended.wait()
        return start, perf_counter()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def errors(self) -> list[str]:
        return [stream.error for stream in self.connections if stream.error is not None]

    async def _run(self, max_tokens: int) -> None:
        while True:
            prompt = self.prompts.next(self.num_words)
            connection = await self.client.stream(prompt, max_tokens, self.priority)
            self.connections.append(connection)
            try:
                await connection.done.wait()
            finally:
                connection.close()
            self._ended.set()
            if connection.error is not None:
                await asyncio.sleep(1.0)  # a server that refuses must not be flooded
            max_tokens = self.max_tokens

    def tokens(self, start: float, end: float) -> float:
        """Received between the two times."""
        return sum(
            stream.tokens_per_event * sum(start <= time < end for time in stream.times)
            for stream in self.connections
        )

    def gaps(self, start: float, end: float) -> list[tuple[float, float]]:
        """Times without an event, within a completion, that ended between the two times."""
        return [
            (before, after)
            for stream in self.connections
            for before, after in zip(stream.times, stream.times[1:], strict=False)
            if start <= after < end
        ]


class Server(NamedTuple):
    """A server that was started here."""

    base_url: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def memory_mb(self) -> float:
        """Resident, in 10⁶ bytes."""
        return sum(process.memory_info().rss for process in self._processes()) / 1e6

    def _processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


@contextmanager
def serve(command: str, api_key: str | None = None, timeout: float = 600.0) -> Iterator[Server]:
    """Run a server for the time of the context, from when it answers.

    Args:
        command: with ``{port}`` in it; ``headway`` is the one of this environment.
        api_key: that it asks for.
        timeout: seconds until it must answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            shlex.split(command.format(port=port)),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            if not asyncio.run(_answers(Client(base_url, None, api_key), process, timeout)):
                print(f"{command!r} did not answer within {timeout:.0f} s", file=sys.stderr)
                raise SystemExit(1)
            yield Server(base_url, psutil.Process(process.pid))
        finally:
            is_alive = process.poll() is None
            process.terminate()
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if not is_alive or status not in (0, -signal.SIGTERM):
                log.seek(0)
                said = log.read()[-4000:].decode(errors="replace")
                how = "when told to" if is_alive else "by itself"
                print(f"{said}\n{command!r} ended {how} with status {status}", file=sys.stderr)


async def _answers(client: Client, process: subprocess.Popen[bytes], timeout: float) -> bool:
    deadline = perf_counter() + timeout
    while perf_counter() < deadline and process.poll() is None:
        try:
            await client.get("/health")
            await client.get("/v1/models")
            return True
        except OSError:
            await asyncio.sleep(0.2)
    return False


async def window(seconds: float) -> tuple[float, float]:
    """Let the time pass; returns begin and end."""
    start = perf_counter()
    await asyncio.sleep(seconds)
    return start, perf_counter()


def cpu_seconds() -> float:
    """Of this process, since it began."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def allow_open_files(number: int) -> None:
    """Each connection is a file, here and in the servers started from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
