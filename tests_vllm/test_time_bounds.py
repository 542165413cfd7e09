"""Steps bounded in time: by the targets of classes, for all requests, and for riders.

A step costs 10 ms, each token of a prompt 1 ms, and each request that decodes 1 ms.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from story import BACKGROUND, Story
from vllm.v1.core.sched.scheduler import Scheduler

from headway.vllm import HeadwayScheduler, HeadwaySyncScheduler

COSTS = (10, 1, 1)

in_both = pytest.mark.parametrize("cls", [HeadwayScheduler, HeadwaySyncScheduler])


def story_with(
    bare_model: Path, cls: type[Scheduler] = HeadwaySyncScheduler, **headway: Any
) -> Story:
    return Story(bare_model, cls, headway=headway, costs=COSTS)


# ---------------------------------------------------------------------- targets of classes


@in_both
@pytest.mark.parametrize("policy", ["priority", "aging", "deadline"])
def test_beside_a_request_that_decodes_a_step_takes_what_its_tpot_target_allows(
    cls: type[Scheduler], policy: str, bare_model: Path
) -> None:
    targets = ["0:tpot=30ms", "9:ttft=100s"]
    story = story_with(bare_model, cls, policy=policy, slos=targets)
    story.urgent(max_tokens=20)
    story.next()
    story.next()
    story.add("long", 600, priority=9)
    # 27 ms of the 30 ms are planned.
    assert story.next() == ({"urgent": 1, "long": 16}, set())
    assert story.next() == ({"urgent": 1, "long": 16}, set())
    story.abort("urgent")
    assert story.next()[0]["long"] > 16
    story.end()


@in_both
def test_no_step_takes_longer_than_an_arrival_of_the_most_urgent_class_may_wait(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = story_with(bare_model, cls, slos=["0:ttft=100ms"])
    story.add("long", 600, priority=BACKGROUND)
    for _ in range(3):
        assert story.next() == ({"long": 26}, set())
    story.end()


def test_the_step_with_a_first_token_may_take_half_of_its_ttft_target(bare_model: Path) -> None:
    story = story_with(bare_model, slos=["0:ttft=100ms"])
    story.background("a")
    story.urgent(prompt=60)
    assert story.next()[0] == {"urgent": 40}
    assert story.next()[0] == {"urgent": 20}
    assert story.next()[0] == {"urgent": 1, "a": 1}
    story.end()


def test_a_less_urgent_class_gets_no_more_for_its_first_token_beside_a_tpot_target(
    bare_model: Path,
) -> None:
    story = story_with(bare_model, slos=["0:tpot=30ms", "5:ttft=200ms"], prefill_share=1)
    # By itself it has half of its target.
    story.add("long", 90, priority=BACKGROUND, max_tokens=1)
    assert story.next()[0] == {"long": 90}
    story.urgent(max_tokens=20)
    story.next()
    story.add("late", 90, priority=BACKGROUND)
    assert story.next()[0] == {"urgent": 1, "late": 16}
    story.end()


# ---------------------------------------------------------------------- the first-token barrier


@in_both
@pytest.mark.parametrize(
    "headway", [{"slos": ["0:ttft=10s"]}, {"max_step_ms": 5000}], ids=["slos", "max_step_ms"]
)
def test_a_first_token_does_not_wait_for_less_urgent_requests(
    cls: type[Scheduler], headway: dict[str, Any], bare_model: Path
) -> None:
    story = story_with(bare_model, cls, **headway)
    story.background("a", "b")
    story.urgent()
    story.urgent("peer", prompt=20)
    assert story.next() == ({"urgent": 10, "peer": 20}, set())
    assert story.next() == ({"urgent": 1, "peer": 1, "a": 1, "b": 1}, set())
    story.end()


@in_both
def test_a_prompt_that_is_computed_again_awaits_no_first_token(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = Story(bare_model, cls, num_blocks=6, headway={"slos": ["0:ttft=10s"]}, costs=COSTS)
    story.background("victim", prompt=60, max_tokens=20)
    story.urgent(prompt=60, max_tokens=2)
    assert story.next() == ({"urgent": 60}, {"victim"})
    story.add("small", 4, priority=9)
    while "victim" not in (counts := story.next()[0]):
        assert "small" not in counts
    assert counts["victim"] > 1
    assert counts["small"] == 4
    story.end()


# ---------------------------------------------------------------------- turns


def test_where_time_is_short_equals_take_turns_behind_the_first(bare_model: Path) -> None:
    story = story_with(bare_model, max_step_ms=100)
    names = [f"r{index}" for index in range(6)]
    story.background(*names, max_tokens=100)
    # There is time for the first of all, and two more.
    story.costs = (76, 8, 8)
    story.next()
    turns: Counter[str] = Counter()
    for _ in range(5):
        counts, evicted = story.next()
        assert len(counts) == 3
        assert not evicted
        turns.update(counts.keys())
    assert turns == {"r0": 5, "r1": 2, "r2": 2, "r3": 2, "r4": 2, "r5": 2}
    story.end()


def test_a_request_that_gets_no_block_uses_up_no_time(bare_model: Path) -> None:
    story = Story(bare_model, num_blocks=6, headway={"max_step_ms": 30}, costs=COSTS)
    story.urgent("first", prompt=16, max_tokens=20)
    story.background("a", prompt=28, max_tokens=12)
    story.background("b", prompt=20, max_tokens=12)
    while story.scheduler.running:
        counts, _ = story.next()
        assert sum(counts.values()) <= 20
    story.end()


# ---------------------------------------------------------------------- preemptions without bound


def test_without_a_bound_a_request_is_evicted_as_often_as_it_takes(bare_model: Path) -> None:
    story = Story(bare_model, num_blocks=4, headway={"max_preemptions": None})
    story.background("a", prompt=40, max_tokens=8)
    for number in range(5):
        story.urgent(f"urgent {number}", prompt=30)
        assert story.next()[1] == {"a"}
        while "a" not in story.next()[0]:
            pass
    assert story.scheduler.requests["a"].num_preemptions == 5
    story.end()
