"""The reclaim ladder's last rung: which residents lose which blocks.

Free blocks and cached blocks that nobody references have been counted before; this chooses among
blocks that are held, from the last-ranked request upwards, and never more than is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from headway.core.ranking import Ranked, start_of_equals

__all__ = ["Holder", "RefCounts", "cheapest_last", "plan_victims"]


class Holder(Protocol):
    """A request that holds blocks."""

    @property
    def block_table(self) -> Sequence[int]:
        """Its blocks in order of position."""
        ...


class RefCounts(Protocol):
    """Block → tables it is in."""

    def __getitem__(self, block: int, /) -> int: ...


HolderT = TypeVar("HolderT", bound=Holder)
RankedT = TypeVar("RankedT", bound=Ranked)


def cheapest_last(candidates: Sequence[RankedT], cost: Callable[[RankedT], float]) -> list[RankedT]:
    """The candidates in an order in which ``plan_victims`` spares the dear among equals.

    Classes stay in rank order, whatever their members cost: a less urgent request yields before a
    more urgent one. Equals are those that the last of a class may not be displaced by; among them
    the cheapest come last, and of those that cost the same the last-ranked. O(n log n).

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
    shared: int | None = None,
    *,
    takes_all: bool = False,
) -> list[tuple[HolderT, int]]:
    """Choose whom to take ``shortage`` blocks from. O(candidates + blocks looked at).

    A block that several requests share is gained only when all of them are victims. Whoever
    holds only blocks that would not be gained is spared.

    Args:
        candidates: residents that may be displaced, in rank order, or as ``cheapest_last`` has it.
        shortage: blocks to gain; at least 1.
        ref_counts: block → tables it is in.
        shared: a block that the beneficiary would have to copy; if all others that have it are
            victims, it need not, which counts as a block gained.
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
            shortage -= taken[block] == ref_counts[block] - (block == shared)
        tried.append((candidates[position], num_kept))
        if not shortage:
            break
        if len(tried) == 1:
            # Whoever is blocked asks in every step; do not look at every block in vain.
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
            if taken[block] == ref_counts[block] - (block == shared)
        ]
        if gained:
            victims.append((request, 0 if takes_all else gained[0]))
    return victims
