"""What ``limits`` and ``run`` take from uvicorn beside its documented interface is still there.

``pyproject.toml`` allows the versions that were looked at; this is what to look at in the next one.
"""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from headway.server import run
from headway.server.edge import limits

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(limits._LimitedProtocol, HttpToolsProtocol), (run.Server, uvicorn.Server)],
)
def test_methods_that_are_overridden_exist_and_take_as_much(ours: type, theirs: type) -> None:
    overridden = {
        name
        for name, value in vars(ours).items()
        if inspect.isfunction(value) and hasattr(theirs, name)
    }
    assert (
        overridden
        >= {
            HttpToolsProtocol: {
                "_start_asgi_task",
                "connection_lost",
                "connection_made",
                "data_received",
                "on_headers_complete",
                "on_message_begin",
                "on_message_complete",
                "pause_writing",
                "resume_writing",
            },
            uvicorn.Server: {"handle_exit", "on_tick", "shutdown", "startup"},
        }[theirs]
    )
    for name in overridden - {"__init__"}:
        names = list(inspect.signature(getattr(ours, name)).parameters)
        assert names == list(inspect.signature(getattr(theirs, name)).parameters), name


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (HttpToolsProtocol, ["cycle", "loop", "transport"]),
        (
            RequestResponseCycle,
            ["disconnected", "message_event", "response_complete", "response_started"],
        ),
        (uvicorn.Server, ["server_state", "should_exit"]),
    ],
)
def test_attributes_that_are_read_are_set_at_the_start(cls: type, names: list[str]) -> None:
    source = inspect.getsource(cls.__init__)  # type: ignore[misc]
    for name in names:
        assert re.search(rf"self\.{name}\b.*=", source), name


def test_status_lines() -> None:
    assert STATUS_LINE[408].startswith(b"HTTP/1.1 408 ")


def test_the_bound_is_the_version_after_the_one_that_was_looked_at() -> None:
    bound = re.search(r'"uvicorn>=0\.(\d+),<0\.(\d+)"', PYPROJECT.read_text())
    assert bound is not None
    installed = int(metadata.version("uvicorn").split(".")[1])
    assert int(bound[1]) <= installed < int(bound[2])
