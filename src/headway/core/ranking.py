"""What follows from keys and thresholds: who gets a slot, who may lose what, who are equals.

Every function takes requests in rank order, and finds a place among them by bisection: keys
ascend, and so do thresholds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

__all__ = [
    "Ranked",
    "Slotted",
    "end_of_equals",
    "first_displaceable",
    "fits_slots",
    "rank_of",
    "start_of_equals",
]

_KEY = attrgetter("key")
_THRESHOLD = attrgetter("threshold")


class Ranked(Protocol):
    """A request that a policy has ranked."""

    #: The rank; smaller goes first.
    @property
    def key(self) -> tuple[Any, ...]: ...

    #: It outranks, by enough to displace them, exactly the requests whose key is above this;
    #: never below ``key``, and it ascends with the key.
    @property
    def threshold(self) -> tuple[Any, ...]: ...

    #: While waiting, it may displace exactly the requests whose key is above this: the threshold,
    #: unless waiting requests may displace none.
    @property
    def displaces(self) -> tuple[Any, ...]: ...


class Slotted(Ranked, Protocol):
    """A ranked request that takes slots."""

    #: Slots that it takes in a step.
    @property
    def num_rows(self) -> int: ...


def rank_of(request: Ranked, ranked: Sequence[Ranked], start: int = 0) -> int:
    """How many of ``ranked`` go before ``request``, of which ``start`` are known. O(log n)."""
    return bisect_left(ranked, request.key, lo=start, key=_KEY)


def first_displaceable(request: Ranked, ranked: Sequence[Ranked], start: int = 0) -> int:
    """The index of the first of ``ranked`` that ``request``, waiting, may displace. O(log n).

    It may displace all that follow, too. ``start``: requests before it are known to be safe.
    """
    return bisect_right(ranked, request.displaces, lo=start, key=_KEY)


def fits_slots(
    request: Slotted, residents: Sequence[Slotted], index: int, slots: int, has_groups: bool
) -> bool:
    """Whether a waiting request may have slots. O(log n), with groups O(residents).

    Args:
        request: the next to go in, ranked at ``index`` among the residents.
        residents: from ``index`` on they have no slot in this step yet; the residents that the
            request may displace will have to make room.
        index: see above.
        slots: left in this step, at least 1.
        has_groups: whether any request takes several slots.
    """
    if not has_groups:
        if len(residents) - index < slots:
            return True
        return first_displaceable(request, residents, index) - index < slots
    end = first_displaceable(request, residents, index)
    taken = sum(residents[place].num_rows for place in range(index, end))
    return taken + request.num_rows <= slots


def end_of_equals(ranked: Sequence[Ranked], start: int = 0) -> int:
    """Where the equals of ``ranked[start]`` end, itself included. O(log n).

    The equals of a request are the requests behind it that it does not outrank by enough to
    displace them.
    """
    return bisect_right(ranked, ranked[start].threshold, lo=start + 1, key=_KEY)


def start_of_equals(ranked: Sequence[Ranked], index: int = -1) -> int:
    """Where the equals of ``ranked[index]`` start, itself included. O(log n).

    They are the requests before it that do not outrank it by enough to displace it.
    """
    index %= len(ranked)
    return bisect_left(ranked, ranked[index].key, hi=index, key=_THRESHOLD)
