"""The command line, as users run it: in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import headway

HEADWAY = [sys.executable, "-W", "error", "-m", "headway"]
TIMEOUT = 300


def run(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*HEADWAY, *args], input=stdin, capture_output=True, timeout=TIMEOUT, check=False
    )


def read_terminal(terminal: int) -> bytes:
    """All that was written to a pseudo-terminal whose other side is closed by now."""
    data = b""
    try:
        while chunk := os.read(terminal, 65536):
            data += chunk
    except OSError:  # Linux's way to say that it is the end
        pass
    os.close(terminal)
    return data


# ---------------------------------------------------------------------- without a model


def test_version() -> None:
    result = run("--version")
    assert result.stdout.decode() == f"headway {headway.__version__}\n"
    assert result.returncode == 0


@pytest.mark.parametrize("command", [(), ("generate",), ("serve",), ("demo",), ("models",)])
def test_help_names_everything_in_full(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    text = result.stdout.decode()
    assert result.returncode == 0
    assert "  headway " in text, "an example"
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    if command in (("generate",), ("serve",)):
        for option in (
            "--scheduling-policy",
            "--preemption-mode",
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--max-model-len",
            "--kv-cache-bytes",
            "--swap-space-bytes",
            "--no-enable-prefix-caching",
        ):
            assert option in text


def test_help_does_not_wait_for_the_libraries_that_run_models() -> None:
    code = (
        "import sys, headway.cli; "
        "print({'openvino', 'numpy', 'matplotlib', 'gguf', 'jinja2', 'tokenizers', 'fastapi', "
        "'uvicorn', 'pydantic', 'prometheus_client', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", ""], ["prompt is empty"]),
        (["generate", "hi", "--max-tokens", "0"], ["max_tokens is 0", "at least 1"]),
        (["generate", "hi", "--max-tokens", "-5"], ["max_tokens is -5", "at least 1"]),
        (["generate", "hi", "--temperature", "-1"], ["temperature is -1.0", "0 … 100"]),
        (["generate", "hi", "--top-p", "0"], ["top_p is 0.0"]),
        (["generate", "hi", "--priority", str(2**63)], [str(2**63), "int64"]),
        (["generate", "hi", "--seed", "-1"], ["seed is -1"]),
        (["generate", "hi", "--stop", ""], ["stop is"]),
        (["generate", "hi", "--raw", "--system", "Be brief."], ["--system", "--raw"]),
        (["generate", "hi", "--model", "gpt-17"], ["unknown model 'gpt-17'", "known are"]),
        (["generate", "hi", "--model", "no/such.gguf"], ["no/such.gguf", "no such file"]),
        (["generate", "hi", "--scheduling-policy", "lottery"], ["'lottery'", "aging"]),
        (["generate", "hi", "--preemption-mode", "politely"], ["'politely'", "recompute"]),
        (["generate", "hi", "--max-num-seqs", "0"], ["max_num_seqs is 0", "at least 1"]),
        (["demo", "--output", "no/such/directory/x.png"], ["no/such/directory/x.png"]),
        (["demo", "--model", "gpt-17"], ["unknown model 'gpt-17'"]),
    ],
)
def test_what_is_refused_is_refused_in_one_line(args: list[str], words: list[str]) -> None:
    result = run(*args)
    message = result.stderr.decode()
    assert result.returncode == 2
    assert result.stdout == b""
    assert message.startswith("headway: error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["generate", "hi", "--no-such-option"], "--no-such-option"),
        (["generate", "hi", "--kv-cache-bytes", "3X"], "512M"),
        (["generate", "hi", "--max-tokens", "many"], "--max-tokens"),
        (["generate"], "PROMPT"),
        (["dance"], "dance"),
    ],
)
def test_wrong_usage_is_explained(args: list[str], word: str) -> None:
    result = run(*args)
    assert result.returncode == 2
    assert result.stdout == b""
    assert word in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()


def test_standard_input_that_is_no_text_is_refused() -> None:
    result = run("generate", "-", stdin=b"ab\xff")
    assert result.returncode == 2
    assert result.stderr == b"headway: error: standard input is not UTF-8 at byte 2\n"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(400), b"\x89PNG" * 100])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    result = run("generate", "hi", "--model", str(path))
    assert result.returncode == 2
    message = result.stderr.decode()
    assert message.startswith("headway: error: ")
    assert message.count("\n") == 1


def test_models_are_listed() -> None:
    assert b"smollm2-135m-instruct" in run("models").stdout
    models = json.loads(run("models", "--json").stdout)["models"]
    assert models[0]["default"] is True
    assert models[0]["license"] == "Apache-2.0"


# ---------------------------------------------------------------------- with the default model


@pytest.mark.model
def test_text_goes_to_standard_output_and_nothing_else_does() -> None:
    result = run("generate", "--raw", "The capital of France is", "--max-tokens", "12")
    assert result.returncode == 0
    assert result.stderr == b""
    assert b"Paris" in result.stdout
    assert result.stdout.endswith(b"\n")
    assert b"\x1b" not in result.stdout


@pytest.mark.model
def test_json_from_standard_input() -> None:
    result = run(
        *["generate", "-", "--raw", "--json", "--max-tokens", "4", "--temperature", "0.8"],
        *["--kv-cache-bytes", "64M", "--swap-space-bytes", "0", "--priority", "-3"],
        stdin=b"One, two,\n",
    )
    answer = json.loads(result.stdout)
    assert answer["prompt"] == "One, two,"
    assert answer["finish_reason"] == "length"
    assert answer["num_output_tokens"] == len(answer["token_ids"]) == 4
    assert answer["priority"] == -3
    assert isinstance(answer["seed"], int), "so that it can be repeated"
    assert 0 < answer["ttft_seconds"] <= answer["latency_seconds"]


@pytest.mark.model
def test_a_prompt_that_is_too_long_is_refused() -> None:
    result = run("generate", "far too long " * 100, "--max-model-len", "64")
    assert result.returncode == 2
    assert result.stdout == b""
    assert result.stderr.startswith(b"headway: error: prompt of request")
    assert b"64 tokens" in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.model
def test_an_interrupt_ends_it_cleanly() -> None:
    with subprocess.Popen(
        [*HEADWAY, "generate", "Tell me a long story.", "--max-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert errors == b"headway: stopped\n"
    assert (first + rest).endswith(b"\n")


@pytest.mark.model
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [*HEADWAY, "generate", "Tell me a long story.", "--max-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(TIMEOUT)
    assert errors == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.model
def test_the_demo_as_json(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    result = run("demo", "--seconds", "4", "--json", "--output", str(path))
    assert result.returncode == 0, result.stderr.decode()
    data = json.loads(result.stdout)
    assert [one["policy"] for one in data["runs"]] == ["priority", "fcfs"]
    assert data["num_equal_outputs"] == data["num_compared_outputs"]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert b"\x1b" not in result.stderr


@pytest.mark.model
def test_the_demo_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    terminal, other_side = pty.openpty()
    with subprocess.Popen(
        [*HEADWAY, "demo", "--output", str(tmp_path / "picture.png")],
        stdout=subprocess.PIPE,
        stderr=other_side,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    ) as process:
        os.close(other_side)
        seen = b""
        while b"batch-08" not in seen:
            seen += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        seen += read_terminal(terminal)
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert output == b""
    assert seen.endswith(b"headway: stopped\r\n")
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h"), "the other screen is left"
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor is back"
    assert b"Traceback" not in seen
    assert not list(tmp_path.iterdir()), "no empty picture is left behind"
