"""What less urgent work gets beside more urgent work, and which request yields blocks first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.errors import ConfigError
from headway.core.reclaim import VictimOrder
from headway.core.request import Request
from headway.core.sharing_rules import SharingRules

if TYPE_CHECKING:
    from tests.core.conftest import Lab, Step

Mode = PreemptionMode
COSTS = (2.0, 0.5, 1.0, 0.0)

# ---------------------------------------------------------------------- settings


def test_by_default_work_shares_freely() -> None:
    rules = SharingRules()
    assert rules == SchedulerConfig().sharing
    assert (rules.share_ms, rules.victim_order, rules.is_timed) == (
        math.inf,
        VictimOrder.LAST,
        False,
    )
    assert SharingRules(share="none").share_ms == 0.0
    assert (SharingRules(share="40.5ms").share_ms, SharingRules(share="40ms").is_timed) == (
        40.5,
        True,
    )
    assert SharingRules(victim="cheapest").victim_order is VictimOrder.CHEAPEST


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": "some"}, "share is 'some', must be all, none, or a time such as 40ms"),
        ({"share": "0ms"}, "share is '0ms', must be all, none, or a time such as 40ms"),
        ({"share": "-4ms"}, "share is '-4ms', must be all, none, or a time such as 40ms"),
        ({"share": "40"}, "share is '40', must be all, none, or a time such as 40ms"),
        ({"share": f"{10**400}ms"}, "must be all, none, or a time such as 40ms"),
        ({"share": 40}, "share is 40, must be all, none, or a time such as 40ms"),
        ({"victim": "dearest"}, "victim is 'dearest', must be one of last, cheapest"),
        ({"prefill_share": 0.0}, "prefill_share is 0.0, must be a number above 0, at most 1"),
        ({"prefill_share": 1.5}, "prefill_share is 1.5, must be a number above 0, at most 1"),
        ({"prefill_share": math.nan}, "prefill_share is nan, must be a number above 0, at most 1"),
        ({"prefill_share": True}, "prefill_share is True, must be a number above 0, at most 1"),
        ({"max_preemptions": 0}, "max_preemptions is 0, must be at least 1"),
        ({"max_preemptions": True}, "max_preemptions is True, must be an integer"),
        ({"max_preemptions": 1.5}, "max_preemptions is 1.5, must be an integer"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SharingRules(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- share


def test_with_share_none_an_urgent_request_has_the_step_to_itself(lab: type[Lab]) -> None:
    alone = lab(sharing=SharingRules(share="none"))
    for name in "ab":
        alone.add(name, 1, max_tokens=9)
    assert alone.step().ids == ["a", "b"]
    alone.add("urgent", 0, max_tokens=3)
    alone.add("equal", 0, max_tokens=2)
    alone.add("waiting", 5)
    steps = alone.steps(3)
    assert [step.ids for step in steps] == [["urgent", "equal"], ["urgent", "equal"], ["urgent"]]
    assert steps[0].yields == [("a", Mode.PAUSE), ("b", Mode.PAUSE)]
    assert alone.step().ids == ["a", "b"]
    alone.drain()


def test_with_a_time_as_share_others_ride_along_as_far_as_it_goes(lab: type[Lab]) -> None:
    timed = lab(cost_model=CostModel(COSTS), sharing=SharingRules(share="6ms"), max_num_seqs=20)
    for i in range(10):
        timed.add(f"b{i}", 1, num_prompt=1, max_tokens=30)
    without = timed.steps(2)[-1]
    assert len(without.ids) == 10  # the bound is for steps with an urgent request
    assert without.output.predicted_ms == 12.0
    timed.add("urgent", 0, num_prompt=1, max_tokens=9)
    steps = timed.steps(8)[1:]
    for step in steps:
        assert step.ids[0] == "urgent"
        assert len(step.ids) == 4
        assert step.output.predicted_ms <= 6.0
    # Equals take turns for what is left.
    assert len({name for step in steps for name in step.ids}) == 11
    timed.drain()


def test_a_share_that_is_over_already_lets_no_other_ride_along(lab: type[Lab]) -> None:
    timed = lab(cost_model=CostModel(COSTS), sharing=SharingRules(share="6ms"))
    timed.add("batch", 1, max_tokens=9)
    timed.step()
    timed.add("urgent", 0, num_prompt=60, max_tokens=2)
    assert timed.step().counts == {"urgent": 60}
    assert timed.step().counts == {"urgent": 1, "batch": 1}
    timed.drain()


# ---------------------------------------------------------------------- prefill_share


def test_beside_urgent_work_less_urgent_prompts_get_a_part_of_the_tokens(lab: type[Lab]) -> None:
    shared = lab(
        sharing=SharingRules(prefill_share=0.25), max_num_batched_tokens=32, max_num_seqs=8
    )
    shared.add("urgent", 0, max_tokens=9)
    shared.step()
    for name in "ab":
        shared.add(name, 1, num_prompt=30, max_tokens=2)
    assert shared.step().counts == {"urgent": 1, "a": 8}
    assert shared.step().counts == {"urgent": 1, "a": 8}
    shared.drain()


def test_beside_an_urgent_prompt_they_get_no_more_than_that_prompt(lab: type[Lab]) -> None:
    shared = lab(sharing=SharingRules(prefill_share=0.5), max_num_batched_tokens=32, max_num_seqs=8)
    shared.add("batch", 1, num_prompt=100, max_tokens=2)
    shared.add("urgent", 0, num_prompt=6, max_tokens=2)
    shared.step()
    shared.add("another", 0, num_prompt=6, max_tokens=2)
    counts = shared.step().counts
    assert counts["another"] == 6
    assert counts["batch"] <= 6
    shared.drain()


def test_urgent_work_is_expected_for_a_minute_after_it_was_seen(lab: type[Lab]) -> None:
    shared = lab(
        sharing=SharingRules(prefill_share=0.25),
        max_num_batched_tokens=32,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    shared.add("urgent", 0, max_tokens=3)
    shared.add("decoding", 1, max_tokens=400)
    shared.steps(4)
    for seconds, expected in ((0.0, 8), (59.0, 8), (61.0, 31)):
        shared.now = seconds
        shared.add(f"batch-{seconds}", 1, num_prompt=60, max_tokens=1)
        assert shared.step().counts[f"batch-{seconds}"] == expected
        shared.scheduler.abort(f"batch-{seconds}")


def test_alone_a_prompt_has_the_whole_step(lab: type[Lab]) -> None:
    shared = lab(sharing=SharingRules(prefill_share=0.25), max_num_batched_tokens=32)
    shared.add("batch", 1, num_prompt=60, max_tokens=2)
    assert shared.step().counts == {"batch": 32}


# ---------------------------------------------------------------------- victim


@pytest.mark.parametrize(("victim", "yields"), [("last", "last"), ("cheapest", "cheap")])
def test_among_equals_the_last_or_the_cheapest_yields_blocks(
    lab: type[Lab], victim: str, yields: str
) -> None:
    """The first has a block whose only token would be computed again; the last has four."""
    crowd = lab(
        num_blocks=4,
        preemption_mode="recompute",
        sharing=SharingRules(victim=victim),
        enable_prefix_caching=False,
    )
    crowd.add("cheap", 1, num_prompt=1, max_tokens=3)
    crowd.add("last", 1, num_prompt=8, max_tokens=3)
    crowd.step()
    crowd.add("urgent", 0, num_prompt=7, max_tokens=1)  # lacks one block
    step = crowd.step()
    assert [each.request_id for each in step.output.preemptions if each.num_blocks] == [yields]
    crowd.drain()


def test_a_lower_class_yields_before_a_cheaper_request(lab: type[Lab]) -> None:
    crowd = lab(
        num_blocks=5,
        preemption_mode="recompute",
        sharing=SharingRules(victim="cheapest"),
        enable_prefix_caching=False,
    )
    crowd.add("cheap", 1, num_prompt=1, max_tokens=3)
    crowd.add("dear", 2, num_prompt=12, max_tokens=3)
    crowd.step()
    crowd.add("urgent", 0, num_prompt=7, max_tokens=1)
    step = crowd.step()
    assert [each.request_id for each in step.output.preemptions if each.num_blocks] == ["dear"]
    crowd.drain()


# ---------------------------------------------------------------------- max_preemptions


def evictions(steps: list[Step]) -> list[str]:
    return [
        each.request_id for step in steps for each in step.output.preemptions if each.num_blocks
    ]


@pytest.mark.parametrize(("limit", "expected"), [(None, 4), (2, 2), (1, 1)])
def test_after_so_many_preemptions_a_request_keeps_its_blocks(
    lab: type[Lab], limit: int | None, expected: int
) -> None:
    crowd = lab(
        num_blocks=5,
        preemption_mode="recompute",
        sharing=SharingRules(max_preemptions=limit),
        enable_prefix_caching=False,
    )
    victim = crowd.add("victim", 1, num_prompt=10, max_tokens=9)
    steps = crowd.steps(1)
    for i in range(4):
        crowd.add(f"urgent-{i}", 0, num_prompt=10, max_tokens=1)
        steps += crowd.steps(3)
    steps += crowd.drain()
    assert victim.num_preemptions == expected
    assert evictions(steps) == ["victim"] * expected
    assert victim.num_output_tokens == 9


def test_a_request_that_is_spared_yields_if_a_running_one_could_not_grow(lab: type[Lab]) -> None:
    crowd = lab(
        num_blocks=6,
        preemption_mode="recompute",
        sharing=SharingRules(max_preemptions=1),
        enable_prefix_caching=False,
    )
    first = crowd.add("first", 0, num_prompt=10, max_tokens=9)
    victim = crowd.add("victim", 1, num_prompt=10, max_tokens=9)
    crowd.step()
    crowd.scheduler.preempt("victim")
    crowd.step()
    assert victim.num_preemptions == 1
    steps = crowd.drain()
    assert evictions(steps)[0] == "victim"
    assert (first.num_preemptions, victim.num_output_tokens) == (0, 9)


# ---------------------------------------------------------------------- all together


@settings(max_examples=60)
@given(
    mode=st.sampled_from(list(Mode)),
    share=st.sampled_from(["all", "none", "9ms"]),
    prefill_share=st.sampled_from([0.2, 1.0]),
    victim=st.sampled_from(list(VictimOrder)),
    max_preemptions=st.sampled_from([None, 1, 2]),
    load=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 6), st.integers(1, 2)),
        min_size=2,
        max_size=8,
    ),
)
def test_with_any_rules_every_request_is_served_to_its_end(
    lab: type[Lab],
    mode: Mode,
    share: str,
    prefill_share: float,
    victim: VictimOrder,
    max_preemptions: int | None,
    load: list[tuple[int, int, int, int]],
) -> None:
    crowd = lab(
        cost_model=CostModel(COSTS),
        num_blocks=16,
        num_swap_blocks=6,
        preemption_mode=mode,
        max_num_batched_tokens=16,
        sharing=SharingRules(share, prefill_share, victim, max_preemptions),
    )
    asked: dict[str, Request] = {}
    for i, (priority, num_prompt, max_tokens, n) in enumerate(load):
        asked[f"r{i}"] = crowd.add(f"r{i}", priority, num_prompt, max_tokens, n=n)
        step = crowd.step()
        urgency = [asked[name].priority for name in step.ids]
        if share == "none":
            assert len(set(urgency)) <= 1
        elif share == "9ms" and len(set(urgency)) > 1:
            alone = [asked[name] for name in step.ids if asked[name].priority == min(urgency)]
            bound = max(9.0, 2.5)
            riders = step.output.predicted_ms > bound + 1e-6
            assert not riders or len(alone) == len(step.ids)
    crowd.drain()
    assert all(
        each.num_output_tokens == max_tokens * n
        for each, (_, _, max_tokens, n) in zip(asked.values(), load, strict=True)
    )
