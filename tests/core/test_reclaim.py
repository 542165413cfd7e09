"""Who yields blocks: classes from the last up, within a class whoever costs least."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headway.core.reclaim import cheapest_last, plan_victims


@dataclass(frozen=True)
class One:
    """Somebody with a rank, blocks, and a price."""

    key: tuple[Any, ...]
    block_table: tuple[int, ...] = ()
    cost: float = 0.0

    @property
    def threshold(self) -> tuple[Any, ...]:
        return (self.key[0], 99)


def of(request: One) -> float:
    return request.cost


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_classes_stay_in_order_and_the_cheapest_of_each_come_last(
    ones: list[tuple[int, int]],
) -> None:
    ranked = [One((place, i), (), cost) for i, (place, cost) in enumerate(sorted(ones))]
    ordered = cheapest_last(ranked, of)
    assert sorted(ordered, key=lambda one: one.key) == ranked
    steps = list(itertools.pairwise(ordered))
    assert all(a.key[0] <= b.key[0] for a, b in steps)
    assert all(a.cost >= b.cost for a, b in steps if a.key[0] == b.key[0])
    # Whoever costs the same as another yields before it if it is ranked below.
    assert all(a.key < b.key for a, b in steps if a.key[0] == b.key[0] and a.cost == b.cost)


def test_a_cheap_equal_yields_before_the_last_ranked_but_not_before_a_lower_class() -> None:
    dear, cheap = One((5, 1), (0, 1), 9.0), One((5, 0), (2, 3), 1.0)
    lower = One((7, 2), (4, 5), 100.0)
    counts = [1] * 6
    ordered = cheapest_last([cheap, dear, lower], of)
    assert plan_victims(ordered, 2, counts, takes_all=True) == [(lower, 0)]
    assert plan_victims(ordered, 4, counts, takes_all=True) == [(lower, 0), (cheap, 0)]
    assert plan_victims(ordered, 7, counts, takes_all=True) == []
