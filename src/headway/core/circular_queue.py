"""A queue of fixed capacity in a ring of slots (LeetCode 622, "Design Circular Queue").

The engine's ingress: requests enter here first come, first served, from any thread, and the
step loop drains them. The capacity is the back-pressure: a full ring refuses, it never grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from headway.core.errors import ConfigError

__all__ = ["CircularQueue"]

T = TypeVar("T")


class CircularQueue(Generic[T]):
    """First in, first out, at most ``capacity`` items; every operation is O(1).

    The slots are allocated once, by the constructor. ``enqueue`` and ``dequeue`` report a full
    or an empty ring by their result, as the LeetCode problem does, because for a queue under
    load both are ordinary.

    One thread may enqueue while another dequeues: each side writes its own end only (the
    producer ``_tail``, the consumer ``_head``) and publishes it after the slot. Several
    producers must take turns by a lock of their own.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity is {capacity}, must be at least 1")
        #: One slot more than the capacity: it keeps a full ring (tail just behind head)
        #: distinguishable from an empty one (tail == head) without a shared counter.
        self._slots: list[T | None] = [None] * (capacity + 1)
        #: Index of the oldest item; only the consumer writes it.
        self._head = 0
        #: Index of the slot the next item goes to; only the producer writes it.
        self._tail = 0

    @property
    def capacity(self) -> int:
        """The largest number of items the ring can hold."""
        return len(self._slots) - 1

    def enqueue(self, item: T) -> bool:
        """Append ``item``; False, and nothing changed, if the ring is full."""
        following = (self._tail + 1) % len(self._slots)
        if following == self._head:
            return False
        self._slots[self._tail] = item
        self._tail = following
        return True

    def dequeue(self) -> T | None:
        """Remove and return the oldest item, or None if the ring is empty."""
        if self._head == self._tail:
            return None
        item = self._slots[self._head]
        self._slots[self._head] = None  # the ring must not keep a finished request alive
        self._head = (self._head + 1) % len(self._slots)
        return item

    def front(self) -> T | None:
        """The oldest item, left in place, or None if the ring is empty."""
        return self._slots[self._head]

    def rear(self) -> T | None:
        """The newest item, left in place, or None if the ring is empty."""
        return None if self.is_empty() else self._slots[self._tail - 1]

    def is_empty(self) -> bool:
        """Whether there is nothing to dequeue."""
        return self._head == self._tail

    def is_full(self) -> bool:
        """Whether ``enqueue`` would refuse."""
        return len(self) == self.capacity

    def __len__(self) -> int:
        return (self._tail - self._head) % len(self._slots)

    def __iter__(self) -> Iterator[T]:
        """From the oldest to the newest, without removing."""
        for offset in range(len(self)):
            item = self._slots[(self._head + offset) % len(self._slots)]
            assert item is not None
            yield item

    def __repr__(self) -> str:
        return f"CircularQueue({list(self)!r}, capacity={self.capacity})"
