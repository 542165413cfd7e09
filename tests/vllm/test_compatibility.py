"""Which versions of vLLM the plug-in runs with, and what it says of others and of none.

Runs without vLLM.
"""

from __future__ import annotations

import importlib.util

import pytest

import headway.vllm
from headway.core.errors import ConfigError
from headway.vllm.compatibility import (
    SUPPORTED_VLLM,
    TESTED_VLLM,
    TRY_VLLM,
    check_vllm,
)


@pytest.fixture(autouse=True)
def nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRY_VLLM, raising=False)


@pytest.mark.parametrize(
    "version", [*TESTED_VLLM, "0.32.1", "0.32.0+cpu", "0.32.1rc1", "0.33.0+cu130", "0.33.2"]
)
def test_supported_versions_of_vllm_are_accepted(version: str) -> None:
    check_vllm(version)


OTHERS = ("0.31.1", "0.3.2", "1.32.0", "0.320.0", "0.34.0.dev1", "dev")


@pytest.mark.parametrize("version", OTHERS)
def test_another_version_is_refused_with_those_that_are_supported(version: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_vllm(version)
    supported = ", ".join(f"{known}.*" for known in SUPPORTED_VLLM)
    assert str(caught.value).startswith(
        f"headway.vllm: vLLM is {version}, must be one of {supported}"
    )


@pytest.mark.parametrize("version", OTHERS)
def test_the_refusal_says_how_to_try_it_and_trying_says_so_in_one_line(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_vllm(version)
    name, _, value = str(caught.value).rpartition("(")[2].split()[0].partition("=")
    monkeypatch.setenv(name, value)
    check_vllm(version)
    (line,) = caplog.messages
    assert line.startswith(f"Headway was never tested with vLLM {version}, only with ")


@pytest.mark.parametrize("tried", ["", "1", "0.35", "0.3", "0.34.0"])
def test_only_the_version_that_is_named_is_tried(
    tried: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRY_VLLM, tried)
    with pytest.raises(ConfigError, match=r"vLLM is 0\.34\.0, must be one of"):
        check_vllm("0.34.0")


def test_what_is_supported_is_not_called_untested(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TRY_VLLM, SUPPORTED_VLLM[0])
    check_vllm(TESTED_VLLM[0])
    assert not caplog.messages


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("name", ["HeadwayScheduler", "HeadwaySyncScheduler"])
def test_without_vllm_there_is_no_scheduler(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'vllm'"):
        getattr(headway.vllm, name)


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match=r"'headway\.vllm' has no attribute 'Scheduler'"):
        _ = headway.vllm.Scheduler
