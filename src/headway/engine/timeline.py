"""A request's life as stretches of time: what pictures and live views are drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from headway.core.life import Phase, RequestStatus
from headway.core.request import Request
from headway.core.request_table import StatusChange

__all__ = ["Phase", "Segment", "TimelineRecorder", "timeline"]


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
    """The latest part of a request's life: segments that touch and do not overlap.

    It goes back to the request's arrival if its status has not changed more often than a request
    remembers; ``TimelineRecorder`` keeps whole lives.

    Args:
        request: added to a scheduler, or still on its way there.
        now: seconds on the same clock; where an unfinished request's last segment ends. None =
            where its last change of status was.

    O(changes that it remembers). Stretches of no length are left out; neighbours of one phase
    are one segment.
    """
    if request.arrival_time is None:
        return []
    life = request.life
    changes = life.history.copy()
    if len(changes) == life.num_changes:
        # It waited from its arrival on, not from when the engine took it in.
        changes[:1] = [(request.arrival_time, RequestStatus.WAITING)]
    return _segments(changes, life.first_token_time, now)


class TimelineRecorder:
    """Keeps the whole lives of requests; a listener's helper, for pictures of a limited time."""

    def __init__(self) -> None:
        #: request id → its changes as (seconds, status), oldest first.
        self._changes: dict[str, list[tuple[float, RequestStatus]]] = {}

    def record(self, changes: Iterable[StatusChange]) -> None:
        """Take in what has moved in a step."""
        for change in changes:
            known = self._changes.setdefault(change.request_id, [])
            if not known or known[-1][1] is not change.status:
                known.append((change.time, change.status))

    def timeline(
        self,
        request_id: str,
        arrival_time: float,
        first_token_time: float | None,
        now: float | None = None,
    ) -> list[Segment]:
        """As the function of this name, for a request of which everything was recorded."""
        changes = list(self._changes.get(request_id, ()))
        changes[:1] = [(arrival_time, RequestStatus.WAITING)]
        return _segments(changes, first_token_time, now)


def _segments(
    changes: list[tuple[float, RequestStatus]], first_token_time: float | None, now: float | None
) -> list[Segment]:
    segments: list[Segment] = []
    first_token = math.inf if first_token_time is None else first_token_time
    last = changes[-1][0] if now is None else now
    following = [*(time for time, _ in changes[1:]), last]
    for (start, status), until in zip(changes, following, strict=True):
        if status.is_finished:
            break
        if status is RequestStatus.RUNNING:
            border = min(max(first_token, start), until)
            _append(segments, Phase.PREFILL, start, border)
            _append(segments, Phase.DECODE, border, until)
        else:
            _append(segments, _PHASES[status], start, until)
    return segments


def _append(segments: list[Segment], phase: Phase, start: float, end: float) -> None:
    if end <= start:
        return
    if segments and segments[-1].phase is phase and segments[-1].end == start:
        segments[-1] = segments[-1]._replace(end=end)
    else:
        segments.append(Segment(phase, start, end))
