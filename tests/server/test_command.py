"""``headway serve``, as users run it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BYTE_VOCAB_SIZE, TinyModel

HEADWAY = [sys.executable, "-W", "error", "-m", "headway", "serve"]
TIMEOUT = 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nothing worth reading, fast."""
    path = tmp_path_factory.mktemp("models") / "tiny.model.gguf"
    return TinyModel(vocab_size=BYTE_VOCAB_SIZE, context_length=100_000).write(path)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where nothing of the user's is found."""
    return os.environ | {"HEADWAY_HOME": str(tmp_path_factory.mktemp("home"))}


class Process:
    """A server that has said that it answers at ``port``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._connections: list[HTTPConnection] = []
        self.announcement = self.read_until("curl")
        match = re.search(r"answers at http://127\.0\.0\.1:(\d+)/v1\n", self.announcement)
        assert match is not None, self.announcement
        self.port = int(match[1])

    def read_until(self, words: str) -> str:
        """What it says next on standard error, up to the line with ``words``."""
        said = ""
        assert self._process.stderr is not None
        while words not in said:
            line = self._process.stderr.readline()
            assert line, said
            said += line
        return said

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        self._connections.append(connection)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
        return connection.getresponse()

    def stream(self, **fields: Any) -> HTTPResponse:
        """A stream that has begun, of which at least one event is left."""
        body = {"prompt": "a", "ignore_eos": True, "stream": True} | fields
        response = self.send("POST", "/v1/completions", body)
        assert response.status == 200
        assert response.readline().startswith(b"data: {")
        return response

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Its exit status, and what it has said on standard output and still says on the other."""
        output, errors = self._process.communicate(timeout=TIMEOUT)
        return self._process.returncode, output, errors

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections:
            connection.close()


@contextmanager
def running(
    environment: dict[str, str], model: Path | None, *args: str, **more: str
) -> Iterator[Process]:
    command = [*HEADWAY, *([] if model is None else [str(model)]), "--port", "0", *args]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | more,
    ) as process:
        try:
            with closing(Process(process)) as ready:
                yield ready
        finally:
            process.kill()


def refused(environment: dict[str, str], *args: str) -> str:
    """The one line with which a command that is wrong ends."""
    result = subprocess.run(
        [*HEADWAY, "--port", "0", *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=environment,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("headway: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "65536"], ["port is 65536", "65535"]),
        (["--host", "0.0.0.0"], ["0.0.0.0", "--allow-unauthenticated"]),
        (["--host", ""], ["host is ''"]),
        (["--api-key", "sk secret"], ["visible ASCII"]),
        (["--api-key", "sk", "--api-key", "sk"], ["'key-2'", "'key-1'"]),
        (["--api-key-file", "no/such.json"], ["no/such.json", "No such file"]),
        (["--allowed-origins", "*"], ["allowed_origins is '*'", "JSON"]),
        (["--slo", "0:fast"], ["'0:fast'", "0:ttft=200ms,tpot=40ms"]),
        (["--slo", "0:ttft=1s", "--slo", "0:tpot=1s"], ["two SLOs", "0"]),
        (["--service-tier", "vip"], ["'vip'", "NAME=PRIORITY"]),
        (["--service-tier", "=3"], ["'=3'", "NAME=PRIORITY"]),
        (["--default-priority", str(2**63)], ["default_priority", "int64"]),
        (["--max-step-ms", "0"], ["max_step_ms is 0.0", "above 0"]),
        (["--max-num-seqs", "0"], ["max_num_seqs is 0", "at least 1"]),
        (["--max-num-queued-reqs", "0"], ["max_num_queued_reqs is 0", "at least 1"]),
        (["--queue-timeout", "-1"], ["queue_timeout is -1.0", "above 0"]),
        (["--max-body-bytes", "0"], ["max_body_bytes is 0", "at least 1"]),
        (["--send-timeout", "nan"], ["send_timeout is nan", "above 0"]),
        (["--scheduling-policy", "lottery"], ["'lottery'", "aging"]),
        (["--uvicorn-log-level", "loud"], ["'loud'", "warning"]),
        (["--otlp-endpoint", "collector"], ["'collector'", "http://localhost:4318"]),
        (["gpt-17"], ["unknown model 'gpt-17'", "known are"]),
    ],
)
def test_what_is_wrong_is_refused_in_a_line_before_a_model_is_loaded(
    environment: dict[str, str], args: list[str], words: list[str]
) -> None:
    message = refused(environment, *args)
    for word in words:
        assert word in message
    assert "secret" not in message


def test_a_port_that_is_taken_is_refused(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = refused(environment, "--port", str(port))
    assert message == (
        f"headway: error: cannot listen on 127.0.0.1 port {port}: address already in use\n"
    )


def test_a_block_size_that_the_model_does_not_have_is_refused(
    environment: dict[str, str], tiny: Path
) -> None:
    message = refused(environment, str(tiny), "--block-size", "7")
    assert "block_size is 7, must be" in message


# --- a life ---------------------------------------------------------------------------------------


def test_it_says_where_and_how_it_serves(environment: dict[str, str], tiny: Path) -> None:
    args = ["--slo", "0:ttft=20s,tpot=4s", "--max-num-seqs", "8", "--max-step-ms", "30"]
    args += ["--slo", "-3:tpot=1us"]
    with running(environment, tiny, *args) as process:
        for words in (
            "tiny.model",
            "priority, preemption auto",
            "8 requests and 256 tokens, about 30 ms",
            "-3:tpot=0.001ms  0:ttft=20000ms,tpot=4000ms",
            "a first token within about",
            "target -3:tpot=0.001ms is beyond reach, about",
            "results   ",
            "everybody who can connect",
            f"curl http://127.0.0.1:{process.port}/v1/completions",
        ):
            assert words in process.announcement
        example = re.search(r"-d '(.*)'", process.read_until("-d"))
        assert example is not None
        response = process.send("POST", "/v1/completions", json.loads(example[1]))
        assert response.status == 200
        assert json.load(response)["model"] == "tiny.model"
        process.signal(signal.SIGTERM)
        status, output, errors = process.end()
    assert (status, output) == (0, "")
    assert errors.count("\n") == 1, errors


def test_names_tiers_and_keys_are_the_operators(
    environment: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    file.write_text('[{"key": "sk-file", "tenant": "web", "most_urgent_priority": 3}]')
    args = ["--served-model-name", "first", "--served-model-name", "second"]
    args += ["--api-key-file", str(file), "--service-tier", "vip=2", "--service-tier", "slow=9"]
    with running(environment, tiny, *args, HEADWAY_API_KEY="sk-one sk-two") as process:
        said = process.announcement + process.read_until("-d")
        assert "with 3 API keys" in said
        assert "Bearer KEY" in said
        assert "sk-" not in said
        for key, tier, expected in [
            ("sk-one", "vip", 200),
            ("sk-two", "slow", 200),
            ("sk-file", "slow", 200),
            ("sk-file", "vip", 403),
            ("sk-file", "normal", 400),
            ("sk-three", "vip", 401),
        ]:
            body = {"prompt": "a", "max_tokens": 1, "service_tier": tier, "model": "second"}
            headers = {"Authorization": f"Bearer {key}"}
            assert process.send("POST", "/v1/completions", body, **headers).status == expected
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0


def test_every_request_is_logged_if_wanted(environment: dict[str, str], tiny: Path) -> None:
    with running(environment, tiny, "--access-log") as process:
        process.send("GET", "/health?a=b")
        assert '"GET /health?a=b HTTP/1.1" 200' in process.read_until("/health")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_finished_and_nothing_new_is_begun(
    environment: dict[str, str], tiny: Path, number: signal.Signals
) -> None:
    with running(environment, tiny) as process:
        stream = process.stream(max_tokens=1500)
        process.signal(number)
        process.read_until("stopping")
        refused = process.send("POST", "/v1/completions", {"prompt": "a"})
        assert refused.status == 503
        assert json.load(refused)["error"]["code"] == "engine_stopped"
        assert process.send("GET", "/health").status == 503
        events = stream.read().split(b"\n\n")
        status, _, errors = process.end()
    assert events[-2:] == [b"data: [DONE]", b""]
    assert json.loads(events[-3][6:])["choices"][0]["finish_reason"] == "length"
    assert status == 0
    assert "Traceback" not in errors


def test_what_takes_too_long_is_ended_with_an_error(
    environment: dict[str, str], tiny: Path
) -> None:
    with running(environment, tiny, "--shutdown-timeout", "0.1") as process:
        stream = process.stream(max_tokens=90_000)
        process.signal(signal.SIGTERM)
        last = stream.read().split(b"\n\n")[-2]
        status, _, errors = process.end()
    assert last.startswith(b"event: error\ndata: ")
    assert json.loads(last.split(b"data: ")[1])["error"]["code"] == "engine_stopped"
    assert status == 0
    assert "Traceback" not in errors


def test_a_second_signal_ends_it_at_once(environment: dict[str, str], tiny: Path) -> None:
    with running(environment, tiny) as process:
        process.stream(max_tokens=90_000)
        process.signal(signal.SIGTERM)
        process.read_until("stopping")
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 128 + signal.SIGTERM


def test_a_client_that_does_not_read_does_not_keep_it_from_stopping(
    environment: dict[str, str], tiny: Path
) -> None:
    with (
        running(environment, tiny, "--shutdown-timeout", "0.1") as process,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", process.port))
        body = json.dumps({"prompt": "a" * 20_000, "echo": True, "n": 128, "stream": True})
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body.encode()
        )
        assert connection.recv(10)
        process.signal(signal.SIGTERM)
        status, _, errors = process.end()
    assert status == 0
    assert "Traceback" not in errors


@pytest.mark.model
def test_the_default_model() -> None:
    with running(dict(os.environ), None) as process:
        text = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        answer = json.load(process.send("POST", "/v1/completions", text))
        assert "Paris" in answer["choices"][0]["text"]
        url = f"http://127.0.0.1:{process.port}/v1/chat/completions"
        chat = {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 64,
            "temperature": 0,
            "priority": -1,
        }
        curl = subprocess.run(
            ["curl", "-sS", url, "-H", "Content-Type: application/json", "-d", json.dumps(chat)],
            capture_output=True,
            timeout=TIMEOUT,
            check=True,
        )
        assert json.loads(curl.stdout)["choices"][0]["message"]["content"]
        stream = process.stream(max_tokens=100)
        process.signal(signal.SIGTERM)
        assert stream.read().endswith(b"data: [DONE]\n\n")
        assert process.end()[0] == 0
