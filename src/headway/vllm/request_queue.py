"""vLLM's waiting queue as an indexed heap: a request that leaves it early is found in O(log n)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from headway.core.priority_queue import PriorityQueue

__all__ = ["RankedRequestQueue"]


class RankedRequestQueue(RequestQueue):  # type: ignore[misc]
    """Requests in the order of their rank; every request in it is ranked.

    There is no front to prepend to: a request that returns goes where its rank says.
    """

    def __init__(self) -> None:
        self._queue: PriorityQueue[Request] = PriorityQueue()

    def add_request(self, request: Request) -> None:
        """O(log n)."""
        self._queue.push(request.request_id, request.headway.key, request)

    def pop_request(self) -> Request:
        """O(log n); raises IndexError if empty."""
        return self._queue.pop()

    def peek_request(self) -> Request:
        """O(1); raises IndexError if empty."""
        return self._queue.peek()

    def prepend_request(self, request: Request) -> None:
        """O(log n)."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """O(k log n)."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """O(log n); raises UnknownRequest if it is not here."""
        self._queue.remove(request.request_id)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """O(k log n); requests that are not here are passed over, as vLLM's queues do."""
        for request in requests:
            if request.request_id in self._queue:
                self._queue.remove(request.request_id)

    def __bool__(self) -> bool:
        return bool(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return self._queue.in_order()
