"""Which blocks are taken: classes from the last up, within a class from the cheapest request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headway.core.reclaim import VictimOrder, cheapest_last, plan_victims, victim_candidates


@dataclass(frozen=True)
class Resident:
    """A request with a rank, blocks, a price, and a past."""

    key: tuple[Any, ...]
    block_table: tuple[int, ...] = ()
    cost: float = 0.0
    num_preemptions: int = 0

    @property
    def threshold(self) -> tuple[Any, ...]:
        return (self.key[0], 99)

    @property
    def displaces(self) -> tuple[Any, ...]:
        return self.threshold


def cost_of(resident: Resident) -> float:
    return resident.cost


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_classes_stay_in_order_and_the_cheapest_of_each_come_last(
    places: list[tuple[int, int]],
) -> None:
    ranked = [Resident((place, i), (), cost) for i, (place, cost) in enumerate(sorted(places))]
    ordered = cheapest_last(ranked, cost_of)
    assert sorted(ordered, key=lambda resident: resident.key) == ranked
    steps = list(itertools.pairwise(ordered))
    assert all(a.key[0] <= b.key[0] for a, b in steps)
    assert all(a.cost >= b.cost for a, b in steps if a.key[0] == b.key[0])
    # Of requests that cost the same, the last-ranked yields first.
    assert all(a.key < b.key for a, b in steps if a.key[0] == b.key[0] and a.cost == b.cost)


def test_a_cheap_equal_yields_before_the_last_ranked_but_not_before_a_lower_class() -> None:
    dear, cheap = Resident((5, 1), (0, 1), 9.0), Resident((5, 0), (2, 3), 1.0)
    lower = Resident((7, 2), (4, 5), 100.0)
    counts = [1] * 6
    ordered = cheapest_last([cheap, dear, lower], cost_of)
    assert plan_victims(ordered, 2, counts, takes_all=True) == [(lower, 0)]
    assert plan_victims(ordered, 4, counts, takes_all=True) == [(lower, 0), (cheap, 0)]
    assert plan_victims(ordered, 7, counts, takes_all=True) == []


def test_candidates_are_the_residents_that_have_not_yielded_too_often() -> None:
    spared = Resident((5, 0), (0,), 1.0, num_preemptions=2)
    cheap = Resident((5, 1), (1,), 2.0, num_preemptions=1)
    dear = Resident((5, 2), (2,), 3.0)
    residents = [spared, cheap, dear]
    last, cheapest = VictimOrder.LAST, VictimOrder.CHEAPEST
    assert victim_candidates(residents, last, None, cost_of) == residents
    assert victim_candidates(residents, last, 2, cost_of) == [cheap, dear]
    assert victim_candidates(residents, cheapest, 2, cost_of) == [dear, cheap]
    assert victim_candidates(residents, cheapest, None, cost_of) == [dear, cheap, spared]


@given(
    st.lists(st.lists(st.integers(0, 11), unique=True, max_size=6), min_size=1, max_size=5),
    st.integers(1, 12),
    st.booleans(),
)
def test_victims_give_what_is_short_and_none_yields_for_nothing(
    tables: list[list[int]], shortage: int, takes_all: bool
) -> None:
    """Blocks that several candidates share are gained when all of them lose them."""
    residents = [Resident((i,), tuple(table)) for i, table in enumerate(tables)]
    counts = [sum(block in table for table in tables) for block in range(12)]
    victims = plan_victims(residents, shortage, counts, takes_all=takes_all)

    def gained(cuts: list[tuple[Resident, int]]) -> int:
        kept = {resident.key: num_kept for resident, num_kept in cuts}
        held = {
            block
            for resident in residents
            for block in resident.block_table[: kept.get(resident.key)]
        }
        return sum(counts[block] > 0 and block not in held for block in range(12))

    if not victims:
        assert gained([(resident, 0) for resident in residents]) < shortage
        return
    assert gained(victims) >= shortage
    assert [victim.key for victim, _ in victims] == sorted(
        (victim.key for victim, _ in victims), reverse=True
    )
    for victim in victims:
        assert gained([other for other in victims if other is not victim]) < gained(victims)
    if not takes_all:
        # One block fewer of the most urgent victim would not do.
        victim, num_kept = victims[-1]
        assert gained([*victims[:-1], (victim, num_kept + 1)]) < shortage
