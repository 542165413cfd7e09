"""The bounded queue: who waits too long, and who is one too many.

Only requests that have never been in a step are in the queue: nobody who has begun to answer is
turned away. The limits are applied after a step has been scheduled, to those who got no place in
it: the least urgent leaves first, be it the newcomer or somebody it outranks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from operator import attrgetter

from headway.core.errors import Overloaded, QueueFull, QueueTimeout
from headway.core.forecast import Forecast
from headway.core.request import Request, RequestStatus
from headway.core.scheduler import PriorityScheduler

__all__ = ["QueueLimits"]

_KEY = attrgetter("key")


class QueueLimits:
    """Finds whom to turn away; touched by the stepping thread only.

    Args:
        scheduler: whose queue it is.
        forecast: says when to try again.
        max_num_reqs: requests that may be queued.
        max_tokens: tokens of their prompts; None = no limit.
        timeout: seconds that a request may be queued; None = no limit.
    """

    def __init__(
        self,
        scheduler: PriorityScheduler,
        forecast: Forecast,
        max_num_reqs: int,
        max_tokens: int | None,
        timeout: float | None,
    ) -> None:
        self._scheduler = scheduler
        self._forecast = forecast
        self.max_num_reqs = max_num_reqs
        self.max_tokens = max_tokens
        self.timeout = timeout
        #: (when it is overdue, request), in order of arrival at the scheduler.
        self._due: deque[tuple[float, Request]] = deque()

    def enter(self, request: Request, now: float) -> None:
        """``request`` has been added to the scheduler. O(1)."""
        if self.timeout is not None:
            self._due.append((now + self.timeout, request))

    def overdue(self, now: float) -> Iterator[tuple[Request, Overloaded]]:
        """Those who have waited too long. O(1) a request, in all."""
        while self._due and self._due[0][0] <= now:
            _, request = self._due.popleft()
            if request.status is RequestStatus.WAITING:
                yield (
                    request,
                    QueueTimeout(
                        f"request {request.request_id!r} has waited for {self.timeout:g} s, "
                        "longer than a request may",
                        self._retry_after(1),
                    ),
                )

    def surplus(self) -> Iterator[tuple[Request, Overloaded]]:
        """Those for whom there is no room, least urgent first; each must leave the queue at once.

        O(1) while the limits hold, else O(waiting) and a step.
        """
        scheduler = self._scheduler
        num_refused = 0
        while (excess := self._excess()) is not None:
            num_excess, reason = excess
            queued = (one for one in scheduler.waiting_heap if one.status is RequestStatus.WAITING)
            for request in heapq.nlargest(num_excess, queued, key=_KEY):
                num_refused += 1
                yield request, QueueFull(reason, self._retry_after(num_refused))

    def _excess(self) -> tuple[int, str] | None:
        """How many at least must leave, and why."""
        num_queued, num_tokens = self._scheduler.num_queued, self._scheduler.num_queued_tokens
        if num_queued > self.max_num_reqs:
            return (
                num_queued - self.max_num_reqs,
                f"{self.max_num_reqs} requests at least as urgent are waiting, no more may",
            )
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            return (
                1,
                f"{num_tokens} prompt tokens are waiting, at most {self.max_tokens} may, and this "
                "request is the least urgent",
            )
        return None

    def _retry_after(self, count: int) -> float:
        return self._forecast.next_slot_ms(count) / 1e3
