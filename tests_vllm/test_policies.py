"""Ageing and deadlines inside vLLM: what the plug-in takes from vLLM's requests."""

from __future__ import annotations

from pathlib import Path

import pytest
from story import Story


def test_aging_lets_a_request_that_has_waited_long_outrank_a_more_urgent_one(
    bare_model: Path,
) -> None:
    headway = {"policy": "aging", "tau_s": 10, "margin_s": 5}
    story = Story(bare_model, max_num_seqs=1, headway=headway)
    story.background("old", arrival_time=0.0)
    # Five levels are worth 50 s, and displacing takes 5 s more.
    for late in (46.0, 60.0):
        story.urgent(f"at {late}", arrival_time=late)
        assert story.next()[0] == {"old": 1}
    story.urgent("at 44", arrival_time=44.0)
    assert story.next()[0] == {"at 44": 10}
    story.end()


def test_aging_bounds_how_often_a_request_is_overtaken(bare_model: Path) -> None:
    story = Story(bare_model, max_num_seqs=1, headway={"policy": "aging", "tau_s": 10})
    story.add("first", 10, priority=-9, arrival_time=0.0)
    story.add("old", 10, priority=1, arrival_time=0.0)
    for i in range(20):
        story.add(f"at {i}.5", 10, max_tokens=1, arrival_time=i + 0.5)
    admitted: list[str] = []
    while story.scheduler.requests:
        admitted += [name for name in story.next()[0] if name not in admitted]
    # The requests that are one level more urgent and come within 10 s.
    assert admitted.index("old") == 1 + 10
    assert admitted[1:11] == [f"at {i}.5" for i in range(10)]
    story.end()


def test_a_deadline_comes_from_the_request_or_from_its_class(bare_model: Path) -> None:
    headway = {"policy": "deadline", "slos": ["0:ttft=2s"], "default_target_s": 9, "margin_s": 0}
    story = Story(bare_model, max_num_seqs=1, headway=headway)
    story.add("first", 10, arrival_time=-9.0)
    story.next()
    story.add("says 3 s", 10, extra_args={"headway_ttft_ms": 3000})
    story.add("default", 10, priority=1)
    story.add("class", 10)
    story.add("says 1 s", 10, priority=7, extra_args={"headway_ttft_ms": 1000.0})
    admitted: list[str] = []
    while story.scheduler.requests:
        admitted += [name for name in story.next()[0] if name not in admitted]
    assert admitted == ["first", "says 1 s", "class", "says 3 s", "default"]
    story.end()


@pytest.mark.parametrize("value", [-1, "300", float("nan"), [300]])
def test_a_deadline_that_is_none_is_ignored_and_said_so(
    bare_model: Path, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    story = Story(bare_model, headway={"policy": "deadline", "default_target_s": 9})
    request = story.add("a", 10, arrival_time=1.0, extra_args={"headway_ttft_ms": value})
    assert request.headway.key[0] == 10.0
    assert f"headway_ttft_ms is {value!r}, must be milliseconds" in caplog.text
    story.end()
