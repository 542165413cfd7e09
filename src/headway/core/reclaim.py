"""The reclaim ladder's last rung: which residents lose which blocks.

Free blocks and cached blocks that no table references have been counted before; this chooses among
blocks that are held, from the last-ranked request upwards, and never more than is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol, TypeVar

from headway.core.ranking import Ranked, start_of_equals

__all__ = [
    "Holder",
    "Preemptible",
    "RefCounts",
    "VictimOrder",
    "cheapest_last",
    "plan_victims",
    "victim_candidates",
]


class Holder(Protocol):
    """A sequence that holds blocks, or a request that does."""

    @property
    def block_table(self) -> Sequence[int]:
        """Its blocks in order of position."""
        ...


class RefCounts(Protocol):
    """Block → tables it is in."""

    def __getitem__(self, block: int, /) -> int: ...


class Preemptible(Ranked, Protocol):
    """A ranked request that may have been a victim before."""

    @property
    def num_preemptions(self) -> int:
        """How often it lost blocks."""
        ...


HolderT = TypeVar("HolderT", bound=Holder)
RankedT = TypeVar("RankedT", bound=Ranked)
PreemptibleT = TypeVar("PreemptibleT", bound=Preemptible)


class VictimOrder(Enum):
    """Whose blocks are taken first among equals."""

    #: The last-ranked one's.
    LAST = "last"
    #: Those of the one with the fewest tokens to recompute for each block gained.
    CHEAPEST = "cheapest"


def victim_candidates(
    residents: Sequence[PreemptibleT],
    order: VictimOrder,
    max_preemptions: int | None,
    cost: Callable[[PreemptibleT], float],
) -> list[PreemptibleT]:
    """The residents that may lose blocks, in the order that ``plan_victims`` takes. O(n log n).

    Args:
        residents: that the beneficiary may displace, in rank order.
        order: among equals.
        max_preemptions: a resident that has lost blocks so often is spared; None = none is.
        cost: of making a resident yield, in any one unit.
    """
    able = list(residents)
    if max_preemptions is not None:
        able = [resident for resident in able if resident.num_preemptions < max_preemptions]
    return cheapest_last(able, cost) if order is VictimOrder.CHEAPEST else able


def cheapest_last(candidates: Sequence[RankedT], cost: Callable[[RankedT], float]) -> list[RankedT]:
    """The candidates in an order in which ``plan_victims`` spares the dear among equals.

    Classes stay in rank order, whatever their members cost: a less urgent request yields before a
    more urgent one. The last class is the last candidate and the candidates that may not displace
    it; the class before that is found in the same way. In a class the cheapest candidate comes
    last, and of candidates that cost the same the last-ranked. O(n log n).

    Args:
        candidates: in rank order.
        cost: of making a request yield, in any one unit; called once for each.
    """
    ordered: list[RankedT] = []
    rest = candidates
    while rest:
        start = start_of_equals(rest)
        ordered = sorted(rest[start:], key=cost, reverse=True) + ordered
        rest = rest[:start]
    return ordered


def plan_victims(
    candidates: Sequence[HolderT],
    shortage: int,
    ref_counts: RefCounts,
    *,
    takes_all: bool = False,
) -> list[tuple[HolderT, int]]:
    """Choose whose ``shortage`` blocks are taken. O(candidates + blocks looked at).

    A block that several holders share is gained only when all of them are victims. A holder
    of only blocks that would not be gained is spared.

    Args:
        candidates: that may be displaced, in rank order, or as ``cheapest_last`` has it.
        shortage: blocks to gain; at least 1.
        ref_counts: block → tables it is in.
        takes_all: a victim loses all its blocks instead of as many as are needed, from its end.

    Returns:
        The victims, each with how many of its first blocks it keeps; the last candidate comes
        first. None if even all candidates hold too little.
    """
    taken: Counter[int] = Counter()
    tried: list[tuple[HolderT, int]] = []
    for position in range(len(candidates) - 1, -1, -1):
        table = candidates[position].block_table
        num_kept = len(table)
        while num_kept and shortage:
            num_kept -= 1
            block = table[num_kept]
            taken[block] += 1
            shortage -= taken[block] == ref_counts[block]
        tried.append((candidates[position], num_kept))
        if not shortage:
            break
        if len(tried) == 1:
            # A blocked request asks in every step; not every block should be looked at in vain.
            upper_bound = sum(len(other.block_table) for other in candidates[:position])
            if upper_bound < shortage:
                break
    if shortage:
        return []
    victims = []
    for request, num_kept in tried:
        gained = [
            index
            for index, block in enumerate(request.block_table[num_kept:], num_kept)
            if taken[block] == ref_counts[block]
        ]
        if gained:
            victims.append((request, 0 if takes_all else gained[0]))
    return victims
