"""The reclaim ladder's last rung: which residents lose which blocks.

Free blocks and cached blocks that nobody references have been counted before; this chooses among
blocks that are held, from the last-ranked request upwards, and never more than is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from headway.core.request import Request

__all__ = ["Victim", "plan_victims"]


class Victim(NamedTuple):
    """Who yields blocks, and how many of its first blocks it keeps."""

    request: Request
    num_kept: int


def plan_victims(
    candidates: Sequence[Request],
    shortage: int,
    ref_counts: Sequence[int],
    shared: int | None = None,
    *,
    takes_all: bool = False,
) -> list[Victim]:
    """Choose whom to take ``shortage`` blocks from. O(candidates + blocks looked at).

    A block that several requests share is gained only when all of them are victims. Whoever
    holds only blocks that would not be gained is spared.

    Args:
        candidates: residents that may be displaced, in rank order.
        shortage: blocks to gain; at least 1.
        ref_counts: block → tables it is in.
        shared: a block that the beneficiary would have to copy; if all others that have it are
            victims, it need not, which counts as a block gained.
        takes_all: a victim loses all its blocks instead of as many as are needed, from its end.

    Returns:
        The victims, last-ranked first; none if even all candidates hold too little.
    """
    taken: Counter[int] = Counter()
    tried: list[Victim] = []
    for position in range(len(candidates) - 1, -1, -1):
        table = candidates[position].block_table
        num_kept = len(table)
        while num_kept and shortage:
            num_kept -= 1
            block = table[num_kept]
            taken[block] += 1
            shortage -= taken[block] == ref_counts[block] - (block == shared)
        tried.append(Victim(candidates[position], num_kept))
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
            victims.append(Victim(request, 0 if takes_all else gained[0]))
    return victims
