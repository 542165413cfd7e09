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
    key: tuple[Any, ...]
    #: While waiting, it may displace exactly those whose key is above this; never below ``key``.
    threshold: tuple[Any, ...]


def rank_of(request: Ranked, ranked: Sequence[Ranked]) -> int:
    """How many of ``ranked`` go before ``request``. O(log n)."""
    return bisect_left(ranked, request.key, key=_KEY)


def first_displaceable(request: Ranked, ranked: Sequence[Ranked], start: int = 0) -> int:
    """The index of the first of ``ranked`` that ``request`` may displace. O(log n).

    It may displace all that follow, too. ``start``: those before it are known to be safe.
    """
    return bisect_right(ranked, request.threshold, lo=start, key=_KEY)


def fits_slots(request: Ranked, residents: Sequence[Ranked], index: int, slots: int) -> bool:
    """Whether a waiting request may have one of ``slots``. O(log n).

    Args:
        request: the next to go in, ranked at ``index`` among the residents.
        residents: those from ``index`` on have no slot in this step yet; whom the request may
            displace will have to make room.
        index: see above.
        slots: left in this step, at least 1.
    """
    if len(residents) - index < slots:
        return True
    return first_displaceable(request, residents, index) - index < slots


def end_of_equals(ranked: Sequence[Ranked], start: int = 0) -> int:
    """Where those end that ``ranked[start]`` may not displace, itself included. O(log n)."""
    return first_displaceable(ranked[start], ranked, start + 1)


def start_of_equals(ranked: Sequence[Ranked]) -> int:
    """Where those start that may not displace the last of ``ranked``, itself included. O(log n)."""
    return bisect_left(ranked, ranked[-1].key, hi=len(ranked) - 1, key=_THRESHOLD)
