"""Which requests compute when a step has no time for all of them.

Slots, tokens and blocks go strictly by rank. If step time did, too, the last of many equals would
stand still until others end, although it has begun to answer. So among equals time goes to the
requests that have waited longest for it, and each gets its turn within a few steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from headway.core.ranking import Ranked
from headway.core.slo import SLO
from headway.core.time_budget import TimeBudget

__all__ = ["NO_SHARES", "Sharer", "Want", "affordable", "share_time", "spend"]

#: Every request may compute as much as fits, in order of rank.
NO_SHARES: Final[Mapping[str, int]] = {}


class Sharer(Ranked, Protocol):
    """A resident request, as far as sharing time goes."""

    @property
    def request_id(self) -> str: ...

    #: The tokens that its next ones attend to.
    @property
    def num_computed_tokens(self) -> int: ...

    #: The last step it was in.
    @property
    def last_step(self) -> int: ...

    #: What its class has been promised.
    @property
    def slo(self) -> SLO | None: ...


class Want(NamedTuple):
    """What a resident would compute if time were no object.

    Attributes:
        request: that computes it.
        num_tokens: in all, at least 1.
        num_rows: sequences that compute them, in equal parts; all of the sequences or none.
        num_logit_rows: rows of logits that are read for them.
        num_drafts: of the tokens, drafts.
    """

    request: Sharer
    num_tokens: int
    num_rows: int = 1
    num_logit_rows: int = 0
    num_drafts: int = 0


def affordable(time: TimeBudget, want: Want, is_first: bool, limit_ms: float | None = None) -> int:
    """How many of a request's tokens still fit; see ``TimeBudget.affordable``.

    The sequences of a group have equal parts of the time; and of ``min_chunk``, but a token each.
    """
    request, count, rows, logit_rows, _ = want
    context = request.num_computed_tokens
    if rows == 1:
        return time.affordable(count, context, is_first, limit_ms, logit_rows)
    left = (time.limit_ms if limit_ms is None else limit_ms) - time.spent_ms
    most, limit_each = count // rows, time.spent_ms + left / rows
    each = time.affordable(most, context, False, limit_each, -(-logit_rows // rows))
    if is_first:
        each = max(each, min(most, max(1, time.min_chunk // rows)))
    return rows * each


def spend(time: TimeBudget, want: Want) -> None:
    """Count a request's tokens as spent."""
    request, count, rows, logit_rows, _ = want
    for _ in range(rows):
        time.spend(count // rows, request.num_computed_tokens, logit_rows // rows)


def share_time(wants: Sequence[Want], time: TimeBudget, has_first: bool) -> dict[str, int]:
    """Divide what is left of ``time`` among residents that do not outrank each other.

    Args:
        wants: of the equals, in order of rank, which decides between requests that have waited
            equally long.
        time: spent by what is given.
        has_first: whether no request ranks above them. The first of all gets a token in every
            step, however little time is left: it can have the blocks of all others, so that
            whatever these lack, the step makes progress.

    Returns:
        How many tokens each may compute, by request id; 0 = it sits this step out. O(n log n).
    """
    shares = dict.fromkeys((want.request.request_id for want in wants), 0)
    first = wants[0] if has_first else None
    reserved = 0.0
    if first is not None:
        shares[first.request.request_id] = first.num_rows
        reserved = first.num_rows * time.price(1, first.request.num_computed_tokens)
        time.spent_ms += reserved
    for want in sorted(wants, key=lambda each: each.request.last_step):
        if want is first:
            time.spent_ms -= reserved
        count = affordable(time, want, is_first=want is first)
        if count:
            spend(time, want._replace(num_tokens=count))
            shares[want.request.request_id] = count
    return shares
