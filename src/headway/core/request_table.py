"""Every unfinished request, in the one collection that its status stands for.

- ``waiting`` (WAITING, PREEMPTED, SWAPPED): no blocks in the pool; an indexed heap by key;
- ``resident`` (RUNNING, PAUSED): blocks in the pool; a list sorted by key.

``move`` is the one way to another status. A table says which collections each move changes, so that
no status changes without its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Final, NamedTuple

from headway.core.errors import UnknownRequest
from headway.core.life import TRANSITIONS, RequestStatus
from headway.core.priority_queue import PriorityQueue
from headway.core.ranking import rank_of
from headway.core.request import Request

__all__ = ["RequestTable", "StatusChange"]

_RESIDENT: Final = frozenset({RequestStatus.RUNNING, RequestStatus.PAUSED})
_KEY = attrgetter("key")


class StatusChange(NamedTuple):
    """A request has moved, or got another rank.

    Attributes:
        request_id: which one.
        status: where it stands from now on.
        time: when it moved (seconds); of a new rank, when it moved last.
        num_computed_tokens: whose keys and values are in the pool now, of its leader.
        num_preemptions: how often it has lost blocks.
        priority: its priority.
        key: its rank.
    """

    request_id: str
    status: RequestStatus
    time: float
    num_computed_tokens: int
    num_preemptions: int
    priority: int
    key: tuple[Any, ...]


class RequestTable:
    """Where each unfinished request is."""

    def __init__(self) -> None:
        #: Unfinished requests without blocks in the pool, by key.
        self.waiting: PriorityQueue[Request] = PriorityQueue()
        #: Unfinished requests with blocks in the pool, sorted by key.
        self.resident: list[Request] = []
        #: Every unfinished request by id: those of ``waiting`` and of ``resident``.
        self.by_id: dict[str, Request] = {}
        #: Unfinished requests by status.
        self.num_by_status = dict.fromkeys(
            (status for status in RequestStatus if not status.is_finished), 0
        )
        #: Prompt tokens of the requests that are WAITING: that have never been in a step.
        self.num_queued_tokens = 0
        #: Unfinished requests of several choices.
        self.num_groups = 0
        #: Requests that have ended.
        self.num_finished = 0
        #: Told of every change; None = nothing wants to know.
        self.on_change: Callable[[StatusChange], None] | None = None

    # ------------------------------------------------------------------ reading

    @property
    def num_queued(self) -> int:
        """Requests that have never been in a step."""
        return self.num_by_status[RequestStatus.WAITING]

    def next_waiting(self) -> Request | None:
        """The first waiting request; None if there is none. O(1)."""
        return self.waiting.peek() if self.waiting else None

    def get(self, request_id: str) -> Request:
        """The unfinished request with this id.

        Raises:
            UnknownRequest: there is none.
        """
        try:
            return self.by_id[request_id]
        except KeyError:
            raise UnknownRequest(f"no unfinished request has the id {request_id!r}") from None

    # ------------------------------------------------------------------ moving

    def add(self, request: Request, now: float) -> None:
        """Let a ranked request wait. O(log n)."""
        request.life.begin(request.arrival, now)
        self.by_id[request.request_id] = request
        self.num_groups += request.n > 1
        self.num_by_status[RequestStatus.WAITING] += 1
        self.num_queued_tokens += request.num_prompt_tokens
        self._push(request)
        self._note(request, now)

    def move(self, request: Request, status: RequestStatus, now: float) -> None:
        """Move a request to ``status``. O(1), or O(log n + residents) to another collection.

        Raises:
            InvalidTransition: there is no such move.
        """
        before = request.life.status
        request.life.enter(status, now)
        if before is RequestStatus.RUNNING:
            for sequence in request.live:
                sequence.quiet_until = 0
        effect = _EFFECTS.get((before, status))
        if effect is not None:
            effect(self, request)
        self.num_by_status[before] -= 1
        if before is RequestStatus.WAITING:
            self.num_queued_tokens -= request.num_prompt_tokens
        if status.is_finished:
            del self.by_id[request.request_id]
            self.num_finished += 1
            self.num_groups -= request.n > 1
        else:
            self.num_by_status[status] += 1
        if self.on_change is not None:
            self._note(request, now)

    def rerank(self, request: Request, rank: Callable[[Request], None]) -> None:
        """Let ``rank`` give a request another key. O(log n), O(residents) if it is resident."""
        if request.status in _RESIDENT:
            self._remove(request)
            rank(request)
            self._insert(request)
        else:
            rank(request)
            self.waiting.rekey(request.request_id, request.key)
        self._note(request, request.life.history[-1][0])

    # ------------------------------------------------------------------ effects of moves

    def _note(self, request: Request, now: float) -> None:
        if self.on_change is not None:
            self.on_change(
                StatusChange(
                    request.request_id,
                    request.status,
                    now,
                    request.leader.num_computed_tokens,
                    request.num_preemptions,
                    request.priority,
                    request.key,
                )
            )

    def _push(self, request: Request) -> None:
        self.waiting.push(request.request_id, request.key, request)

    def _pop(self, request: Request) -> None:
        self.waiting.remove(request.request_id)

    def _insert(self, request: Request) -> None:
        self.resident.insert(rank_of(request, self.resident), request)

    def _remove(self, request: Request) -> None:
        position = rank_of(request, self.resident)
        assert self.resident[position] is request
        del self.resident[position]

    def _admit(self, request: Request) -> None:
        self._pop(request)
        self._insert(request)

    def _evict(self, request: Request) -> None:
        self._remove(request)
        self._push(request)


def _effects() -> Mapping[
    tuple[RequestStatus, RequestStatus], Callable[[RequestTable, Request], None]
]:
    effects = {}
    for before, ends in TRANSITIONS.items():
        for after in ends:
            was_resident, is_resident = before in _RESIDENT, after in _RESIDENT
            if after.is_finished:
                effect = RequestTable._remove if was_resident else RequestTable._pop
            elif was_resident and not is_resident:
                effect = RequestTable._evict
            elif is_resident and not was_resident:
                effect = RequestTable._admit
            else:
                continue
            effects[before, after] = effect
    return effects


#: What each move does to the collections; moves that are left out change none.
_EFFECTS: Final = _effects()
