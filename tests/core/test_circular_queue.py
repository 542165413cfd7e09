"""The ring: LeetCode 622, first in first out, bounded, and safe for one producer, one consumer."""

from __future__ import annotations

import tracemalloc
from collections import deque
from threading import Thread

import hypothesis.strategies as st
import pytest
from hypothesis import given

from headway.core.circular_queue import CircularQueue
from headway.core.errors import ConfigError


def test_leetcode_622() -> None:
    queue: CircularQueue[int] = CircularQueue(3)
    assert queue.enqueue(1)
    assert queue.enqueue(2)
    assert queue.enqueue(3)
    assert not queue.enqueue(4)
    assert queue.rear() == 3
    assert queue.is_full()
    assert queue.dequeue() == 1
    assert queue.enqueue(4)
    assert queue.rear() == 4


def test_an_empty_ring_has_no_ends() -> None:
    queue: CircularQueue[int] = CircularQueue(2)
    assert queue.is_empty()
    assert queue.dequeue() is None
    assert queue.front() is None
    assert queue.rear() is None
    queue.enqueue(1)
    queue.dequeue()
    assert queue.front() is None
    assert queue.rear() is None


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_refused(capacity: int) -> None:
    with pytest.raises(ConfigError, match=f"capacity is {capacity}, must be at least 1"):
        CircularQueue(capacity)


def test_repr_shows_items_and_capacity() -> None:
    queue: CircularQueue[str] = CircularQueue(2)
    queue.enqueue("a")
    assert repr(queue) == "CircularQueue(['a'], capacity=2)"


@given(st.integers(1, 5), st.lists(st.none() | st.integers()))
def test_is_a_bounded_deque(capacity: int, operations: list[int | None]) -> None:
    """An integer is enqueued, None dequeues."""
    queue: CircularQueue[int] = CircularQueue(capacity)
    model: deque[int] = deque()
    for item in operations:
        if item is None:
            assert queue.dequeue() == (model.popleft() if model else None)
        else:
            assert queue.enqueue(item) is (len(model) < capacity)
            if len(model) < capacity:
                model.append(item)
        assert list(queue) == list(model)
        assert len(queue) == len(model)
        assert queue.is_empty() is (not model)
        assert queue.is_full() is (len(model) == capacity)
        assert queue.front() == (model[0] if model else None)
        assert queue.rear() == (model[-1] if model else None)
        assert queue.capacity == capacity


def test_nothing_is_allocated_after_construction() -> None:
    queue: CircularQueue[str] = CircularQueue(1000)
    slots = queue._slots

    def fill_and_empty() -> None:
        for _ in range(1500):
            queue.enqueue("item")
        while not queue.is_empty():
            queue.dequeue()

    fill_and_empty()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        fill_and_empty()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 1000  # a few integers; the slots alone are 8,008 bytes
    assert queue._slots is slots
    assert len(slots) == 1001


def test_a_dequeued_item_is_let_go() -> None:
    queue: CircularQueue[list[int]] = CircularQueue(4)
    queue.enqueue([1])
    queue.dequeue()
    assert all(slot is None for slot in queue._slots)


def test_one_producer_and_one_consumer() -> None:
    queue: CircularQueue[int] = CircularQueue(64)
    count = 5_000
    received: list[int] = []

    def produce() -> None:
        for item in range(count):
            while not queue.enqueue(item):
                pass

    def consume() -> None:
        while len(received) < count:
            item = queue.dequeue()
            if item is not None:
                received.append(item)

    threads = [Thread(target=produce, daemon=True), Thread(target=consume, daemon=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert received == list(range(count))
    assert queue.is_empty()
