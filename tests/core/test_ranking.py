"""Places in a ranking found by bisection are those that looking at everybody would find."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from headway.core.policy import may_preempt
from headway.core.ranking import (
    end_of_equals,
    first_displaceable,
    fits_slots,
    rank_of,
    start_of_equals,
)


class One(NamedTuple):
    """Somebody who was given a rank."""

    key: tuple[Any, ...]
    threshold: tuple[Any, ...]


@st.composite
def rankings(draw: st.DrawFn, min_size: int = 0) -> list[One]:
    """In rank order; whoever is ``margin`` ahead may displace."""
    margin = draw(st.sampled_from((0, 1, 3)))
    places = draw(st.lists(st.integers(0, 9), min_size=min_size, max_size=12))
    return [
        One((place, sequence), (place + margin, 99))
        for sequence, place in enumerate(sorted(places))
    ]


@given(rankings(min_size=1), st.data())
def test_whoever_follows_the_first_displaceable_may_be_displaced(
    ranked: list[One], data: st.DataObject
) -> None:
    request = data.draw(st.sampled_from(ranked))
    others = [one for one in ranked if one is not request]
    index = first_displaceable(request, others)
    assert [may_preempt(request, one) for one in others] == [
        position >= index for position in range(len(others))
    ]
    assert [one.key < request.key for one in others] == [
        position < rank_of(request, others) for position in range(len(others))
    ]


@given(rankings(min_size=1))
def test_equals_are_those_who_cannot_displace_each_other(ranked: list[One]) -> None:
    assert ranked[: end_of_equals(ranked)] == [
        one for one in ranked if not may_preempt(ranked[0], one)
    ]
    assert ranked[start_of_equals(ranked) :] == [
        one for one in ranked if not may_preempt(one, ranked[-1])
    ]


@given(rankings(min_size=1), st.integers(1, 12), st.data())
def test_a_slot_is_there_if_those_who_keep_theirs_leave_one(
    ranked: list[One], slots: int, data: st.DataObject
) -> None:
    request = data.draw(st.sampled_from(ranked))
    residents = [one for one in ranked if one is not request]
    index = rank_of(request, residents)
    keep = [one for one in residents[index:] if not may_preempt(request, one)]
    assert fits_slots(request, residents, index, slots) == (
        len(residents) - index < slots or len(keep) < slots
    )
