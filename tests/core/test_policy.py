"""The ranking: order of keys, who may displace whom, and the starvation bound of ageing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core.errors import ConfigError
from headway.core.policy import (
    POLICIES,
    AgingPolicy,
    DeadlinePolicy,
    FCFSPolicy,
    Key,
    PriorityPolicy,
    SchedulingPolicy,
    make_policy,
    may_preempt,
)
from headway.core.request import MAX_PRIORITY, MIN_PRIORITY, Request
from headway.core.slo import SLO, SLOTable

if TYPE_CHECKING:
    from tests.core.conftest import Lab

TIMES = st.floats(0, 1e6, allow_nan=False)
PRIORITIES = st.integers(-5, 5)


def ranked(
    policy: SchedulingPolicy,
    arrival: float = 0.0,
    priority: int = 0,
    sequence: int = 0,
    deadline: float | None = None,
) -> Request:
    """A request as the scheduler ranks it."""
    request = Request(f"r{sequence}", priority, [1], arrival_time=arrival, deadline=deadline)
    request.arrival_order = sequence
    request.key = (*policy.key(request), sequence)
    request.threshold = request.displaces = policy.threshold(request)
    return request


# ---------------------------------------------------------------------- order


def test_fcfs_goes_by_arrival_whatever_the_priority() -> None:
    early = ranked(FCFSPolicy(), arrival=1.0, priority=9)
    late = ranked(FCFSPolicy(), arrival=2.0, priority=0, sequence=1)
    assert early < late
    assert not may_preempt(late, early)
    assert not may_preempt(early, late)


def test_priority_goes_by_priority_then_arrival_then_order_of_adding() -> None:
    policy = PriorityPolicy()
    requests = [
        ranked(policy, 0.0, 1, 0),
        ranked(policy, 2.0, 0, 1),
        ranked(policy, 2.0, 0, 2),
        ranked(policy, 1.0, 0, 6),
        ranked(policy, 9.0, -1, 7),
    ]
    assert [request.arrival_order for request in sorted(requests)] == [7, 6, 1, 2, 0]


def test_deadline_goes_by_deadline_with_a_default_from_the_class() -> None:
    policy = DeadlinePolicy(SLOTable([SLO(0, ttft_ms=1000.0)]), default_target=100.0, margin=0.5)
    own = ranked(policy, arrival=0.0, priority=5, deadline=10.2)
    urgent = ranked(policy, arrival=9.0, priority=0, sequence=1)
    other = ranked(policy, arrival=0.0, priority=5, sequence=2)
    assert [r.key[0] for r in (urgent, own, other)] == [10.0, 10.2, 100.0]
    assert sorted([other, own, urgent]) == [urgent, own, other]
    assert may_preempt(urgent, other)
    assert not may_preempt(urgent, own)  # ahead, but not by the margin


@given(TIMES, TIMES, PRIORITIES, PRIORITIES, st.floats(0.1, 1e3))
def test_aging_is_priority_minus_waited_time_at_every_instant(
    arrival: float, other_arrival: float, priority: int, other: int, tau: float
) -> None:
    policy = AgingPolicy(tau)
    a, b = ranked(policy, arrival, priority), ranked(policy, other_arrival, other, 1)
    for elapsed in (0.0, 1.0, 1e4):
        now = max(arrival, other_arrival) + elapsed
        effective = [p - (now - t) / tau for p, t in ((priority, arrival), (other, other_arrival))]
        if not math.isclose(effective[0], effective[1], rel_tol=1e-6, abs_tol=1e-3):
            assert (a < b) is (effective[0] < effective[1])


# ---------------------------------------------------------------------- who may displace whom


@given(TIMES, TIMES, PRIORITIES, PRIORITIES)
def test_only_a_strictly_more_urgent_class_preempts(
    arrival: float, other_arrival: float, priority: int, other: int
) -> None:
    policy = PriorityPolicy()
    a, b = ranked(policy, arrival, priority), ranked(policy, other_arrival, other, 1)
    assert may_preempt(a, b) is (priority < other)


@given(
    st.sampled_from(sorted(POLICIES)),
    st.tuples(TIMES, PRIORITIES, st.none() | TIMES),
    st.tuples(TIMES, PRIORITIES, st.none() | TIMES),
)
def test_nobody_preempts_one_of_better_rank_or_is_preempted_in_turn(
    name: str, one: tuple[float, int, float | None], two: tuple[float, int, float | None]
) -> None:
    policy = make_policy(name)
    a = ranked(policy, one[0], one[1], 0, one[2])
    b = ranked(policy, two[0], two[1], 1, two[2])
    for first, second in ((a, b), (b, a)):
        if may_preempt(first, second):
            assert first < second
            assert not may_preempt(second, first)
    assert not may_preempt(a, a)


def test_one_level_displaces_at_equal_arrival_under_aging() -> None:
    policy = AgingPolicy(tau=10.0)
    urgent, batch = ranked(policy, 5.0, 0), ranked(policy, 5.0, 1, 1)
    assert may_preempt(urgent, batch)
    assert not may_preempt(ranked(policy, 11.0, 0, 2), batch)  # ahead by 4 s, the margin is 5 s
    assert ranked(policy, 11.0, 0, 2) < batch
    assert may_preempt(ranked(AgingPolicy(10.0, margin=0.0), 11.0, 0, 2), batch)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("priority", [MIN_PRIORITY, MAX_PRIORITY])
def test_the_extreme_priorities_have_keys(name: str, priority: int) -> None:
    extreme = ranked(make_policy(name), 1.0, priority, 0)
    middle = ranked(make_policy(name), 1.0, 0, 1)
    assert extreme < middle if priority < 0 or name in {"fcfs", "deadline"} else middle < extreme


# ---------------------------------------------------------------------- the starvation bound


@given(TIMES, TIMES, st.integers(-50, 50), st.integers(-50, 50), st.floats(0.01, 1e4))
def test_aging_bounds_who_overtakes(
    arrival: float, later: float, priority: int, other: int, tau: float
) -> None:
    """One of priority p that was there first is overtaken only by p′ < p within (p − p′)·τ."""
    arrival, later = sorted((arrival, later))
    policy = AgingPolicy(tau)
    first, second = ranked(policy, arrival, priority), ranked(policy, later, other, 1)
    slack = 1e-6 * (1 + abs(later) + abs(tau) * 50)  # of floating point
    if second < first:
        assert other < priority
        assert later - arrival <= (priority - other) * tau + slack
    elif other < priority:
        assert later - arrival >= (priority - other) * tau - slack


def steps_until_done(
    lab: type[Lab], policy: str | SchedulingPolicy, priority: int, length: int, limit: int
) -> int | None:
    """How long a request takes while urgent ones keep coming; None if longer than ``limit``.

    A step takes a second. Two urgent requests arrive every second, each takes at least two
    steps of the only slot: the stream alone is four times what the machine can serve.
    """
    lab_ = lab(max_num_seqs=1, policy=policy, num_blocks=100)
    lab_.add("urgent", 0, 4, length)
    patient = lab_.add("patient", priority, 4, 3)
    for second in range(limit):
        for i in range(2):
            lab_.add(f"u{second}.{i}", 0, 2, length)
        lab_.step()
        lab_.now += 1.0
        if patient.is_finished:
            return second + 1
    return None


@settings(max_examples=10)
@given(tau=st.integers(1, 5), priority=st.integers(1, 3), length=st.integers(2, 5))
def test_nobody_starves_under_aging(lab: type[Lab], tau: int, priority: int, length: int) -> None:
    """Those that may overtake arrive within p·τ seconds and are of bounded length."""
    ahead = 1 + 2 * (priority * tau + 1)
    bound = ahead * length + 3
    done = steps_until_done(lab, AgingPolicy(tau), priority, length, bound)
    assert done is not None
    assert done > priority * tau / 2  # it did wait for the urgent ones, or this tests nothing


def test_under_strict_priority_the_same_request_does_starve(lab: type[Lab]) -> None:
    """As promised: the bound above is a property of ageing, not of the load."""
    assert steps_until_done(lab, "priority", priority=1, length=2, limit=80) is None
    assert steps_until_done(lab, AgingPolicy(2), priority=1, length=2, limit=80) is not None


# ---------------------------------------------------------------------- making policies


def test_policies_are_made_by_name() -> None:
    for name, kind in POLICIES.items():
        assert type(make_policy(name)) is kind
    assert sorted(POLICIES) == ["aging", "deadline", "fcfs", "priority"]


def test_a_policy_of_ones_own(lab: type[Lab]) -> None:
    class ShortestFirst:
        name = "shortest"

        def key(self, request: Request) -> Key:
            return (request.max_tokens,)

        def threshold(self, request: Request) -> Key:
            return (request.max_tokens, math.inf)

    policy = ShortestFirst()
    assert make_policy(policy) is policy
    lab_ = lab(max_num_seqs=2, policy=policy)
    for name, length in (("long", 30), ("short", 3), ("middle", 9)):
        lab_.add(name, max_tokens=length)
    assert lab_.step().ids == ["short", "middle"]


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'fair', must be one of fcfs, priority, aging, deadline"):
        make_policy("fair")
    with pytest.raises(ConfigError, match="must have name, key and threshold"):
        make_policy(42)  # type: ignore[arg-type]


@pytest.mark.parametrize("tau", [0, -1.0, math.nan, math.inf])
def test_a_bad_tau_is_refused(tau: float) -> None:
    with pytest.raises(ConfigError, match=r"tau is .* must be above 0"):
        AgingPolicy(tau)


@pytest.mark.parametrize("margin", [-1.0, math.nan, math.inf])
def test_a_bad_margin_is_refused(margin: float) -> None:
    for make in (AgingPolicy, DeadlinePolicy):
        with pytest.raises(ConfigError, match=r"margin is .* must be at least 0"):
            make(margin=margin)


@pytest.mark.parametrize("target", [-1.0, math.nan, math.inf])
def test_a_bad_target_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match=r"default_target is .* must be at least 0"):
        DeadlinePolicy(default_target=target)
