"""A request's life as stretches of time: what pictures and live views are drawn from."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from headway.core.request import Request, RequestStatus

__all__ = ["Phase", "Segment", "timeline"]


class Phase(Enum):
    """What a request is doing, as somebody who waits for it would say it."""

    #: Not begun.
    WAITING = "waiting"
    #: In the steps that lead to its first token.
    PREFILL = "prefill"
    #: In the steps after it; what is recomputed then counts as decode, too.
    DECODE = "decode"
    #: Sits out, with blocks in the pool.
    PAUSED = "paused"
    #: Sits out, its contents in the swap space.
    SWAPPED = "swapped"
    #: Sits out, without contents.
    PREEMPTED = "preempted"


class Segment(NamedTuple):
    """A stretch of one phase, from ``start`` to ``end`` in seconds on the engine's clock."""

    phase: Phase
    start: float
    end: float


_PHASES = {
    RequestStatus.WAITING: Phase.WAITING,
    RequestStatus.PAUSED: Phase.PAUSED,
    RequestStatus.SWAPPED: Phase.SWAPPED,
    RequestStatus.PREEMPTED: Phase.PREEMPTED,
}


def timeline(request: Request, now: float | None = None) -> list[Segment]:
    """The request's life so far, from its arrival: segments that touch and do not overlap.

    Args:
        request: added to a scheduler, or still on its way there.
        now: seconds on the same clock; where an unfinished request's last segment ends. None =
            where its last change of status was.

    O(times its status changed). Stretches of no length are left out; neighbours of one phase
    are one segment.
    """
    if request.arrival_time is None:
        return []
    changes = [(time, status) for time, status in request.transitions if not status.is_finished]
    if not changes or changes[0][1] is RequestStatus.WAITING:
        # It waited from its arrival on, not from when the engine took it in.
        changes[:1] = [(request.arrival_time, RequestStatus.WAITING)]
    end = request.finish_time
    if end is None:
        end = changes[-1][0] if now is None else now
    segments: list[Segment] = []
    for index, (start, status) in enumerate(changes):
        until = changes[index + 1][0] if index + 1 < len(changes) else end
        if status is not RequestStatus.RUNNING:
            _append(segments, _PHASES[status], start, until)
            continue
        first_token = request.first_token_time
        border = until if first_token is None else min(max(first_token, start), until)
        _append(segments, Phase.PREFILL, start, border)
        _append(segments, Phase.DECODE, border, until)
    return segments


def _append(segments: list[Segment], phase: Phase, start: float, end: float) -> None:
    if end <= start:
        return
    if segments and segments[-1].phase is phase and segments[-1].end == start:
        segments[-1] = segments[-1]._replace(end=end)
    else:
        segments.append(Segment(phase, start, end))
