"""The bounded queue: which requests wait too long, and which are too many.

Only requests that have never been in a step are in the queue: a request that has begun to answer
is never turned away. The limits are applied after a step has been scheduled, to the requests that
got no place in it. The least urgent of them leaves first, be it the newcomer or a request that the
newcomer outranks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator

from headway.core.errors import Overloaded, QueueFull, QueueTimeout
from headway.core.policy import Key
from headway.core.request import Request, RequestStatus
from headway.core.scheduler import PriorityScheduler

__all__ = ["QueueLimits"]

#: While there is a queue, so few entries of requests that have left it are not worth a clean-up.
_SLACK = 64


class _Ranked:
    """A queued request in the heap, which has the least urgent request at its root."""

    __slots__ = ("key", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        #: The rank that the heap is ordered by; the request's own is another once it is re-ranked.
        self.key: Key = request.key

    def __lt__(self, other: _Ranked) -> bool:
        return other.key < self.key

    @property
    def is_queued(self) -> bool:
        """Whether the request is queued, with this rank."""
        return self.request.status is RequestStatus.WAITING and self.request.key is self.key


class QueueLimits:
    """Finds the requests to turn away; touched by the stepping thread only.

    A request that has left the queue is not searched for: its entries are passed over, and dropped
    when they are more than half of all, or the queue is empty.

    Args:
        scheduler: whose queue it is.
        slots_ms: times until one, two, three … residents have made room; see ``Forecast``.
        max_num_reqs: requests that may be queued.
        max_tokens: tokens of their prompts; None = no limit.
        timeout: seconds that a request may be queued; None = no limit.
    """

    def __init__(
        self,
        scheduler: PriorityScheduler,
        slots_ms: Callable[[], Iterator[float]],
        max_num_reqs: int,
        max_tokens: int | None,
        timeout: float | None,
    ) -> None:
        self._scheduler = scheduler
        self._slots_ms = slots_ms
        self.max_num_reqs = max_num_reqs
        self.max_tokens = max_tokens
        self.timeout = timeout
        #: A heap of all queued requests, the least urgent at the root; and of some that have left.
        self._ranked: list[_Ranked] = []
        #: (when it is overdue, request) in order of arrival; likewise.
        self._due: deque[tuple[float, Request]] = deque()

    def enter(self, request: Request, now: float) -> None:
        """``request`` has been added to the scheduler. O(log queued)."""
        heapq.heappush(self._ranked, _Ranked(request))
        if self.timeout is not None:
            self._due.append((now + self.timeout, request))

    def rerank(self, request: Request) -> None:
        """``request`` has another rank than before. O(log queued)."""
        if request.status is RequestStatus.WAITING:
            heapq.heappush(self._ranked, _Ranked(request))

    def overdue(self, now: float) -> Iterator[tuple[Request, Overloaded]]:
        """The requests that have waited too long; each must leave the queue at once.

        O(1) a request, over all calls, and O(residents · log residents) a step with any.
        """
        self._drop_left()
        slots_ms = self._slots_ms()
        while self._due and self._due[0][0] <= now:
            _, request = self._due.popleft()
            if request.status is RequestStatus.WAITING:
                yield (
                    request,
                    QueueTimeout(
                        f"request {request.request_id!r} has waited for {self.timeout:g} s, "
                        "longer than a request may",
                        next(slots_ms) / 1e3,
                    ),
                )

    def surplus(self) -> Iterator[tuple[Request, Overloaded]]:
        """The requests for which there is no room, least urgent first.

        Each must leave the queue before the next is asked for. O(1) while the limits hold, else
        O(log queued) for each of the requests, and O(residents · log residents) a step.
        """
        slots_ms = self._slots_ms()
        while self._ranked and (reason := self._excess()) is not None:
            entry = heapq.heappop(self._ranked)
            if entry.is_queued:
                yield entry.request, QueueFull(reason, next(slots_ms) / 1e3)

    def _excess(self) -> str | None:
        """Why the least urgent request must leave, if it must."""
        table = self._scheduler.table
        num_queued, num_tokens = table.num_queued, table.num_queued_tokens
        if num_queued > self.max_num_reqs:
            return f"{self.max_num_reqs} requests at least as urgent are waiting, no more may"
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            return (
                f"{num_tokens} prompt tokens are waiting, at most {self.max_tokens} may, and this "
                "request is the least urgent"
            )
        return None

    def _drop_left(self) -> None:
        """Keep about as many entries as requests are queued. O(1) a request, over all calls."""
        num_queued = self._scheduler.table.num_queued
        most = 2 * num_queued + _SLACK if num_queued else 0
        if len(self._ranked) > most:
            self._ranked = [entry for entry in self._ranked if entry.is_queued]
            heapq.heapify(self._ranked)
        if len(self._due) > most:
            waiting = RequestStatus.WAITING
            self._due = deque(entry for entry in self._due if entry[1].status is waiting)
