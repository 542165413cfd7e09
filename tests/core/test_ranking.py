"""Places in a ranking found by bisection are the places that a look at every request would find."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from headway.core.policy import NOBODY, may_preempt
from headway.core.ranking import (
    end_of_equals,
    first_displaceable,
    fits_slots,
    rank_of,
    start_of_equals,
)


class RankedRequest(NamedTuple):
    """A request as far as its rank and its slots go."""

    key: tuple[Any, ...]
    threshold: tuple[Any, ...]
    displaces: tuple[Any, ...]
    num_rows: int = 1


@st.composite
def rankings(draw: st.DrawFn, min_size: int = 0, max_rows: int = 1) -> list[RankedRequest]:
    """In rank order; a request outranks those that are more than a margin behind it.

    In some rankings no waiting request may displace any, as in the preemption mode ``none``.
    """
    margin = draw(st.sampled_from((0, 1, 3)))
    may_displace = draw(st.booleans())
    places = draw(st.lists(st.integers(0, 9), min_size=min_size, max_size=12))
    ranked = []
    for order, place in enumerate(sorted(places)):
        threshold = (place + margin, 99)
        displaces = threshold if may_displace else NOBODY
        num_rows = draw(st.integers(1, max_rows))
        ranked.append(RankedRequest((place, order), threshold, displaces, num_rows))
    return ranked


def outranks(a: RankedRequest, b: RankedRequest) -> bool:
    return a.threshold < b.key


@given(rankings(min_size=1), st.data())
def test_all_that_follow_the_first_displaceable_may_be_displaced(
    ranked: list[RankedRequest], data: st.DataObject
) -> None:
    request = data.draw(st.sampled_from(ranked))
    others = [other for other in ranked if other is not request]
    index = first_displaceable(request, others)
    assert [may_preempt(request, other) for other in others] == [
        position >= index for position in range(len(others))
    ]
    assert [other.key < request.key for other in others] == [
        position < rank_of(request, others) for position in range(len(others))
    ]
    known = data.draw(st.integers(0, rank_of(request, others)))
    assert rank_of(request, others, known) == rank_of(request, others)


@given(rankings(min_size=1), st.data())
def test_equals_cannot_outrank_each_other(ranked: list[RankedRequest], data: st.DataObject) -> None:
    """Whatever waiting requests may displace: equals share time also where none may."""
    index = data.draw(st.integers(0, len(ranked) - 1))
    start, end = start_of_equals(ranked, index), end_of_equals(ranked, index)
    assert ranked[start : index + 1] == [
        other for other in ranked[: index + 1] if not outranks(other, ranked[index])
    ]
    assert ranked[index:end] == [
        other for other in ranked[index:] if not outranks(ranked[index], other)
    ]
    assert start_of_equals(ranked) == start_of_equals(ranked, len(ranked) - 1)
    assert end_of_equals(ranked) == end_of_equals(ranked, 0)


@given(rankings(min_size=1), st.integers(1, 12), st.booleans(), st.data())
def test_a_slot_is_there_if_the_requests_that_keep_theirs_leave_one(
    ranked: list[RankedRequest], slots: int, has_groups: bool, data: st.DataObject
) -> None:
    request = data.draw(st.sampled_from(ranked))
    residents = [other for other in ranked if other is not request]
    index = rank_of(request, residents)
    keep = [other for other in residents[index:] if not may_preempt(request, other)]
    assert fits_slots(request, residents, index, slots, has_groups) == (len(keep) < slots)


@given(rankings(min_size=1, max_rows=3), st.integers(1, 12), st.data())
def test_a_group_has_slots_if_they_are_left_for_all_its_rows(
    ranked: list[RankedRequest], slots: int, data: st.DataObject
) -> None:
    request = data.draw(st.sampled_from(ranked))
    residents = [other for other in ranked if other is not request]
    index = rank_of(request, residents)
    kept = sum(other.num_rows for other in residents[index:] if not may_preempt(request, other))
    assert fits_slots(request, residents, index, slots, has_groups=True) == (
        kept + request.num_rows <= slots
    )
