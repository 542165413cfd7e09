"""Who is in the next step, who waits, and who yields: slots, blocks, tokens, and riding along."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from story import BACKGROUND, Story
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

from headway.vllm import HeadwayScheduler, HeadwaySyncScheduler

in_both = pytest.mark.parametrize("cls", [HeadwayScheduler, HeadwaySyncScheduler])


# ---------------------------------------------------------------------- slots


@in_both
def test_an_urgent_request_is_in_the_next_step_and_whom_it_displaces_recomputes_nothing(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = Story(bare_model, cls, max_num_seqs=2)
    story.background("a", "b")
    blocks = story.scheduler.kv_cache_manager.get_block_ids("b")
    story.urgent()
    assert story.next() == ({"urgent": 10, "a": 1}, set())
    assert story.scheduler.kv_cache_manager.get_block_ids("b") == blocks
    story.end()
    # The last token of an answer is not computed.
    assert story.computed["b"] == 10 + 50 - 1


@in_both
def test_with_rows_for_running_requests_only_one_is_evicted(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = Story(bare_model, cls, max_num_seqs=2, v2=True)
    story.background("a", "b")
    story.urgent()
    assert story.next() == ({"urgent": 10, "a": 1}, {"b"})
    story.end()


@in_both
def test_with_a_row_to_spare_it_is_paused_instead(cls: type[Scheduler], bare_model: Path) -> None:
    story = Story(bare_model, cls, max_num_seqs=3, max_num_active_seqs=2, v2=True)
    story.background("a", "b")
    story.urgent()
    assert story.next() == ({"urgent": 10, "a": 1}, set())
    story.end()
    assert story.computed["b"] == 10 + 50 - 1


@pytest.mark.parametrize("v2", [False, True])
def test_equals_never_displace_each_other(bare_model: Path, v2: bool) -> None:
    story = Story(bare_model, max_num_seqs=2, v2=v2)
    story.background("a", "b", arrival_time=2.0)
    story.add("older", 10, priority=BACKGROUND, arrival_time=1.0)
    while story.scheduler.running:
        counts, evicted = story.next()
        assert not evicted
        if len(story.answers["a"].turns) == 1:
            assert "older" not in counts
    story.end()


def test_whom_a_paused_request_waits_for_may_be_aborted(bare_model: Path) -> None:
    story = Story(bare_model, max_num_seqs=1)
    story.background("paused")
    story.urgent()
    assert story.next()[0] == {"urgent": 10}
    story.abort("urgent")
    assert story.next()[0] == {"paused": 1}
    story.end()


@in_both
def test_paused_waiting_and_evicted_requests_may_be_aborted(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = Story(bare_model, cls, max_num_seqs=2, num_blocks=4)
    story.background("paused", "evicted")
    story.urgent("first")
    assert story.next() == ({"first": 10, "paused": 1}, set())
    story.urgent("second", prompt=20)
    assert story.next() == ({"first": 1, "second": 20}, {"evicted"})
    story.add("waiting", 10, priority=BACKGROUND)
    story.next()
    story.abort("paused", "evicted", "waiting")
    story.end()
    assert all(story.answers[name].finish_reason == "length" for name in ("first", "second"))


# ---------------------------------------------------------------------- blocks


def crowd(bare_model: Path, victim: str, **settings: Any) -> Story:
    """Of 14 blocks ``small`` has 2, ``big`` 10, and ``better``, of a higher class, 1."""
    story = Story(bare_model, num_blocks=14, headway={"victim": victim}, **settings)
    story.add("better", 2, priority=3, max_tokens=10)
    story.background("small", prompt=20, max_tokens=10)
    story.background("big", prompt=150, max_tokens=9)
    return story


@pytest.mark.parametrize(
    ("victim", "evicted"), [("cheapest", {"small"}), ("last", {"big"})], ids=["cheapest", "last"]
)
def test_who_yields_blocks_is_of_the_lowest_class(
    bare_model: Path, victim: str, evicted: set[str]
) -> None:
    story = crowd(bare_model, victim)
    story.urgent(prompt=40)
    counts, gone = story.next()
    assert gone == evicted
    assert counts["urgent"] == 40
    story.end()


def test_a_higher_class_yields_only_once_the_lower_ones_are_gone(bare_model: Path) -> None:
    story = crowd(bare_model, "cheapest")
    story.urgent(prompt=14 * 16 - 10)
    counts, gone = story.next()
    assert gone == {"small", "big", "better"}
    assert counts == {"urgent": 14 * 16 - 10}
    story.end()


@pytest.mark.parametrize("prompt", [5 * 16, 6 * 16])
def test_no_request_is_evicted_unless_the_whole_need_is_met(bare_model: Path, prompt: int) -> None:
    story = Story(bare_model, num_blocks=10)
    story.urgent("peer", prompt=70, max_tokens=9)
    story.background("a", prompt=35, max_tokens=9)
    story.urgent(prompt=prompt)
    # There are five blocks that the peer has not.
    if prompt <= 5 * 16:
        assert story.next() == ({"peer": 1, "urgent": prompt}, {"a"})
    else:
        assert story.next() == ({"peer": 1, "a": 1}, set())
    story.end()


def test_equals_do_not_take_blocks_from_each_other(bare_model: Path) -> None:
    story = Story(bare_model, num_blocks=6)
    story.background("a", prompt=60, max_tokens=10)
    story.add("older", 60, priority=BACKGROUND, arrival_time=-1.0)
    assert story.next() == ({"a": 1}, set())
    story.end()


def test_a_request_that_was_evicted_often_keeps_its_blocks_from_waiting_requests(
    bare_model: Path,
) -> None:
    story = Story(bare_model, num_blocks=4, headway={"max_preemptions": 1})
    story.background("a", prompt=40, max_tokens=8)
    for name in ("first", "second"):
        story.urgent(name, prompt=30)
        while "a" not in story.next()[0]:
            pass
    # The first evicted it; the second waits until it has ended.
    assert story.scheduler.requests["a"].num_preemptions == 1
    assert story.next() == ({"a": 1}, set())
    story.end()


def test_to_a_running_request_that_grows_it_yields_all_the_same(bare_model: Path) -> None:
    story = Story(bare_model, num_blocks=5, headway={"max_preemptions": 1})
    story.background("a", prompt=40, max_tokens=20)
    story.urgent("first", prompt=40)
    while "a" not in story.next()[0]:
        pass
    story.urgent("second", prompt=30, max_tokens=10)
    while "a" in story.next()[0]:
        pass
    assert story.scheduler.requests["a"].num_preemptions == 2
    story.end()


@in_both
def test_no_request_is_evicted_for_a_request_whose_last_token_is_in_flight(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = Story(bare_model, cls, num_blocks=4)
    story.background("a", prompt=40, max_tokens=6)
    # If there were another token, it would need a block.
    story.urgent(prompt=15, max_tokens=2)
    while "urgent" in story.scheduler.requests:
        assert not story.next()[1]
    story.end()


def test_no_request_is_evicted_while_the_engine_is_paused(bare_model: Path) -> None:
    story = Story(bare_model, num_blocks=4)
    story.urgent(prompt=32, max_tokens=10)
    story.background("a", prompt=20, max_tokens=10)
    story.add("gone", 10)
    story.abort("gone")
    story.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    # The urgent one will need a block, and none is free.
    assert story.next() == ({}, set())
    story.scheduler.set_pause_state(PauseState.UNPAUSED)
    story.end()


# ---------------------------------------------------------------------- tokens


def test_a_background_prompt_does_not_take_the_tokens_of_an_urgent_one(bare_model: Path) -> None:
    story = Story(bare_model, max_num_batched_tokens=64, headway={"prefill_share": 1})
    story.add("long", 600, priority=BACKGROUND)
    assert story.next()[0] == {"long": 64}
    story.urgent(prompt=40)
    # vLLM serves running requests first; what the urgent request leaves is not for ``long``.
    assert story.next()[0] == {"urgent": 40}
    assert story.next()[0] == {"urgent": 1, "long": 63}
    story.end()


def test_while_urgent_work_is_about_background_prompts_have_a_part_of_the_tokens(
    bare_model: Path,
) -> None:
    story = Story(bare_model, max_num_batched_tokens=64, headway={"prefill_share": 0.5})
    story.background("a")
    story.add("long", 600, priority=BACKGROUND)
    assert story.next()[0] == {"a": 1, "long": 63}
    story.urgent(prompt=60, max_tokens=2)
    assert story.next()[0] == {"urgent": 60, "a": 1}
    assert story.next()[0] == {"urgent": 1, "a": 1, "long": 32}
    # It has ended; the next one may come at any time.
    assert story.next()[0] == {"a": 1, "long": 32}
    story.end()


def test_a_slot_that_one_cannot_use_goes_to_the_next(bare_model: Path) -> None:
    story = Story(
        bare_model, max_num_seqs=3, max_num_batched_tokens=32, headway={"prefill_share": 1}
    )
    story.background("a", "b", "c", arrival_time=1.0)
    story.add("long", 200, priority=3)
    while story.scheduler.requests["long"].num_computed_tokens < 50:
        story.next()
    story.urgent(prompt=20)
    # What the urgent one leaves is too little for ``long``, and it may not come last: 3 slots.
    assert story.next()[0] == {"urgent": 20, "a": 1, "b": 1}
    story.end()


# ---------------------------------------------------------------------- steps without prompts


@in_both
def test_where_the_engine_asks_for_a_step_without_prompts_urgent_ones_are_in_it_all_the_same(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = Story(bare_model, cls, max_num_batched_tokens=64)
    story.background("a")
    story.throttles = True
    story.add("b", 10, priority=BACKGROUND)
    assert story.next() == ({"a": 1}, set())
    story.urgent(prompt=40)
    # As there is a prompt in the step, others may be.
    assert story.next() == ({"urgent": 40, "a": 1, "b": 10}, set())
    story.end()


def test_an_urgent_prompt_is_not_held_between_its_parts(bare_model: Path) -> None:
    story = Story(bare_model, max_num_batched_tokens=64)
    story.background("a", arrival_time=1.0)
    story.urgent(prompt=160)
    assert story.next() == ({"urgent": 64}, set())
    story.throttles = True
    assert story.next() == ({"urgent": 64}, set())
    assert story.next() == ({"urgent": 32, "a": 1}, set())
    story.end()


def test_a_prompt_that_is_held_keeps_neither_tokens_nor_a_slot_from_others(
    bare_model: Path,
) -> None:
    story = Story(bare_model, max_num_seqs=2, max_num_batched_tokens=64)
    story.background("a", arrival_time=1.0)
    # It goes before its equal, and could use all tokens.
    story.add("long", 400, priority=BACKGROUND, arrival_time=0.0)
    assert story.next()[0] == {"a": 1, "long": 63}
    story.urgent(max_tokens=4)
    assert story.next()[0] == {"urgent": 10, "a": 1}
    assert story.next()[0] == {"urgent": 1, "long": 16}
    story.throttles = True
    while "urgent" in story.scheduler.requests:
        assert story.next()[0] == {"urgent": 1, "a": 1}
    assert story.next()[0] == {"a": 1}
    story.end()


@pytest.mark.parametrize("num_steps", range(4))
def test_the_interval_between_prompts_does_not_hold_urgent_ones(
    bare_model: Path, num_steps: int
) -> None:
    story = Story(bare_model, prefill_schedule_interval=4)
    story.background("a")
    for _ in range(num_steps):
        assert story.next()[0] == {"a": 1}
    story.urgent()
    assert story.next()[0] == {"urgent": 10, "a": 1}
    story.end()


# ---------------------------------------------------------------------- sharing a step


@pytest.mark.parametrize(
    ("share", "riders"), [("all", {"a": 1, "b": 1}), ("none", {})], ids=["all", "none"]
)
def test_how_much_rides_along(bare_model: Path, share: str, riders: dict[str, int]) -> None:
    story = Story(bare_model, headway={"share": share})
    story.background("a", "b")
    story.urgent()
    assert story.next() == ({"urgent": 10, **riders}, set())
    assert story.next() == ({"urgent": 1, **riders}, set())
    while "urgent" in story.scheduler.requests:
        story.next()
    assert story.next() == ({"a": 1, "b": 1}, set())
    story.end()


def test_with_share_none_no_less_urgent_request_is_admitted_beside_a_more_urgent_one(
    bare_model: Path,
) -> None:
    story = Story(bare_model, headway={"share": "none"})
    story.urgent()
    assert story.next()[0] == {"urgent": 10}
    story.urgent("peer")
    story.add("a", 10, priority=BACKGROUND)
    assert story.next()[0] == {"urgent": 1, "peer": 10}
    story.end()


def test_with_share_none_the_most_urgent_request_decides_which_ride(bare_model: Path) -> None:
    story = Story(
        bare_model, headway={"policy": "aging", "tau_s": 1, "margin_s": 2, "share": "none"}
    )
    for name, arrival_time in (("a", 1.0), ("b", 2.5)):
        story.add(name, 10, arrival_time=arrival_time)
    assert story.next()[0] == {"a": 10, "b": 10}
    story.urgent(arrival_time=0.0)
    # It is not ahead of ``a`` by enough to displace it, but of ``b``.
    assert story.next()[0] == {"urgent": 10, "a": 1}
    story.end()


def test_share_as_a_time_lets_riders_take_turns(bare_model: Path) -> None:
    riders = [f"r{i}" for i in range(6)]
    # 10 ms a step and 1 ms each: the urgent request, and three more.
    story = Story(bare_model, headway={"share": "14ms"}, costs=(10, 1, 1))
    story.background(*riders, max_tokens=100)
    story.urgent(max_tokens=20)
    assert story.next()[0] == {"urgent": 10}
    for _ in range(4):
        turns: Counter[str] = Counter()
        for _ in range(2):
            counts, evicted = story.next()
            assert counts["urgent"] == 1
            assert len(counts) == 4
            assert not evicted
            turns.update(counts.keys() - {"urgent"})
        assert turns == Counter(riders)
    story.end()


def test_max_step_ms_bounds_every_step(bare_model: Path) -> None:
    story = Story(bare_model, headway={"max_step_ms": 40}, costs=(10, 1, 1))
    story.add("long", 600, priority=BACKGROUND)
    assert story.next()[0] == {"long": 30}
    story.urgent(prompt=20)
    assert story.next()[0] == {"urgent": 20}
    assert story.next()[0] == {"urgent": 1, "long": 29}
    story.end()
