"""Who computes when a step has no time for everybody.

Slots, tokens and blocks go strictly by rank. If step time did, too, the last of many equals would
stand still until others end, although it has begun to answer. So among equals time goes to those
who have waited longest for it, and each gets its turn within a few steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from headway.core.cost_model import TimeBudget

__all__ = ["NO_SHARES", "Sharer", "share_time"]

#: Everybody may compute as much as fits, in order of rank.
NO_SHARES: Final[Mapping[str, int]] = {}


class Sharer(Protocol):
    """A resident request, as far as sharing time goes."""

    @property
    def request_id(self) -> str: ...

    #: The tokens that its next ones attend to.
    @property
    def num_computed_tokens(self) -> int: ...

    #: The last step it was in.
    @property
    def last_step(self) -> int: ...


def share_time(
    equals: Sequence[tuple[Sharer, int]], time: TimeBudget, has_first: bool
) -> dict[str, int]:
    """Divide what is left of ``time`` among residents that do not outrank each other.

    Args:
        equals: each with the tokens that it would compute if time were no object, at least 1; in
            order of rank, which decides between those that have waited equally long.
        time: spent by what is given.
        has_first: whether nobody ranks above them. The first of all gets a token in every step,
            however little time is left: it can have the blocks of all others, so that whatever
            these lack, the step makes progress.

    Returns:
        How many tokens each may compute, by request id; 0 = it sits this step out. O(n log n).
    """
    shares = dict.fromkeys((request.request_id for request, _ in equals), 0)
    first = equals[0][0] if has_first else None
    reserved = 0.0
    if first is not None:
        shares[first.request_id] = 1
        reserved = time.price(1, first.num_computed_tokens)
        time.spent_ms += reserved
    for request, wanted in sorted(equals, key=lambda one: one[0].last_step):
        computed = request.num_computed_tokens
        if request is first:
            time.spent_ms -= reserved
        count = time.affordable(wanted, computed, is_first=request is first)
        if count:
            time.spend(count, computed)
            shares[request.request_id] = count
    return shares
