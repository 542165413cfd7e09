"""Where a request stands, the only ways it may move, and how long it has been where.

The life of a request is a small graph (``TRANSITIONS``), and ``Life.enter`` is the one method that
walks it. ``RequestTable.move`` is its one caller, so that a status never changes without the
collections that it stands for.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from headway.core.errors import InvalidTransition

__all__ = ["HISTORY", "TRANSITIONS", "Life", "Phase", "RequestStatus"]

#: Status changes that a request remembers; of older ones it only has the totals.
HISTORY: Final = 128


class RequestStatus(Enum):
    """Where a request stands. ``is_finished`` separates the two halves."""

    #: Never scheduled; holds no blocks.
    WAITING = "waiting"
    #: In the step that was scheduled last.
    RUNNING = "running"
    #: Sat the last step out; its blocks are in the pool.
    PAUSED = "paused"
    #: Holds no blocks in the pool; its contents are in the swap space.
    SWAPPED = "swapped"
    #: Holds no blocks in the pool; what is not found in the prefix cache is recomputed.
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH_CAPPED = "finished_length_capped"
    FINISHED_ABORTED = "finished_aborted"
    FINISHED_TIMED_OUT = "finished_timed_out"
    FINISHED_REJECTED = "finished_rejected"

    is_finished: bool
    finish_reason: str | None

    # Members are compared by identity; the hash that enumerations come with is a Python function.
    __hash__ = object.__hash__

    def __init__(self, value: str) -> None:
        self.is_finished = value.startswith("finished")
        self.finish_reason = {
            "finished_stopped": "stop",
            "finished_length_capped": "length",
            "finished_aborted": "abort",
            "finished_timed_out": "timeout",
            "finished_rejected": "rejected",
        }.get(value)


class Phase(Enum):
    """What a request is doing, as its sender would say it."""

    __hash__ = object.__hash__

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


def _transitions() -> dict[RequestStatus, frozenset[RequestStatus]]:
    status = RequestStatus
    unfinished = {
        status.WAITING: {status.RUNNING},
        status.RUNNING: {status.PAUSED, status.SWAPPED, status.PREEMPTED},
        status.PAUSED: {status.RUNNING, status.SWAPPED, status.PREEMPTED},
        status.SWAPPED: {status.RUNNING, status.PREEMPTED},
        status.PREEMPTED: {status.RUNNING},
    }
    finished = {end for end in status if end.is_finished}
    table = {start: frozenset(ends | finished) for start, ends in unfinished.items()}
    return table | dict.fromkeys(finished, frozenset())


#: Every move that exists: from a status to those it may become.
TRANSITIONS: Final = _transitions()

_PHASES: Final = {
    RequestStatus.WAITING: Phase.WAITING,
    RequestStatus.PAUSED: Phase.PAUSED,
    RequestStatus.SWAPPED: Phase.SWAPPED,
    RequestStatus.PREEMPTED: Phase.PREEMPTED,
}


class Life:
    """The status of one request, and when things happened to it (seconds on the engine's clock).

    Memory does not grow with the number of changes.
    """

    __slots__ = (
        "_since",
        "finish_time",
        "first_scheduled_time",
        "first_token_time",
        "history",
        "num_changes",
        "num_pauses",
        "phase_seconds",
        "status",
    )

    def __init__(self) -> None:
        #: Where it stands.
        self.status = RequestStatus.WAITING
        #: The latest ``HISTORY`` changes as (seconds, new status), oldest first.
        self.history: list[tuple[float, RequestStatus]] = []
        #: All changes so far.
        self.num_changes = 0
        #: How often it sat a step out while its blocks stayed.
        self.num_pauses = 0
        #: Time spent in each phase that it has left.
        self.phase_seconds: dict[Phase, float] = {}
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.finish_time: float | None = None
        self._since = 0.0

    def begin(self, arrival_time: float, now: float) -> None:
        """The request arrived at ``arrival_time``, and waits in a scheduler from ``now`` on."""
        self._since = arrival_time
        self._note(RequestStatus.WAITING, now)

    def enter(self, status: RequestStatus, now: float) -> None:
        """Move to ``status`` at time ``now``.

        Raises:
            InvalidTransition: the table has no such move; the message holds the history.
        """
        if status not in TRANSITIONS[self.status]:
            latest = self.history[-20:]
            history = " → ".join(f"{past.value}@{time:.3f}" for time, past in latest)
            raise InvalidTransition(
                f"a request cannot go from {self.status.value} to {status.value} "
                f"(history: {history or 'none'})"
            )
        self._leave_phase(now)
        if status is RequestStatus.RUNNING:
            if self.first_scheduled_time is None:
                self.first_scheduled_time = now
        elif status is RequestStatus.PAUSED:
            self.num_pauses += 1
        elif status.is_finished:
            self.finish_time = now
        self.status = status
        self._note(status, now)

    def _note(self, status: RequestStatus, now: float) -> None:
        self.history.append((now, status))
        if len(self.history) > HISTORY:
            del self.history[0]
        self.num_changes += 1

    def _leave_phase(self, now: float) -> None:
        start, seconds = self._since, self.phase_seconds
        self._since = now
        if self.status is not RequestStatus.RUNNING:
            phase = _PHASES[self.status]
            seconds[phase] = seconds.get(phase, 0.0) + now - start
            return
        first_token = self.first_token_time
        border = now if first_token is None else min(max(first_token, start), now)
        seconds[Phase.PREFILL] = seconds.get(Phase.PREFILL, 0.0) + border - start
        seconds[Phase.DECODE] = seconds.get(Phase.DECODE, 0.0) + now - border
