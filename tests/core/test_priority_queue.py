"""The indexed heap: like a sorted list, found by id, in O(log n) comparisons."""

from __future__ import annotations

import math
from bisect import insort

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headway.core.errors import DuplicateRequest, UnknownRequest
from headway.core.priority_queue import PriorityQueue


class PriorityQueueMachine(RuleBasedStateMachine):
    """Against a list of (key, id), kept sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: PriorityQueue[str] = PriorityQueue()
        self.model: list[tuple[tuple[int, int], str]] = []
        self.count = 0

    def new_key(self, rank: int) -> tuple[int, int]:
        self.count += 1  # unique, as the scheduler's keys are
        return rank, self.count

    def pick(self, data: st.DataObject) -> tuple[tuple[int, int], str]:
        return data.draw(st.sampled_from(self.model))

    @rule(rank=st.integers(-3, 3))
    def push(self, rank: int) -> None:
        key = self.new_key(rank)
        item_id = f"r{self.count}"
        self.queue.push(item_id, key, f"item {item_id}")
        insort(self.model, (key, item_id))

    @precondition(lambda self: self.model)
    @rule()
    def pop(self) -> None:
        _, item_id = self.model.pop(0)
        assert self.queue.pop() == f"item {item_id}"
        assert item_id not in self.queue

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entry = self.pick(data)
        self.model.remove(entry)
        assert self.queue.remove(entry[1]) == f"item {entry[1]}"

    @precondition(lambda self: self.model)
    @rule(data=st.data(), rank=st.integers(-4, 4))
    def rekey(self, data: st.DataObject, rank: int) -> None:
        entry = self.pick(data)
        key = self.new_key(rank)
        self.queue.rekey(entry[1], key)
        self.model.remove(entry)
        insort(self.model, (key, entry[1]))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def push_again(self, data: st.DataObject) -> None:
        with pytest.raises(DuplicateRequest):
            self.queue.push(self.pick(data)[1], (0, 0), "other")

    @rule()
    def name_an_unknown_one(self) -> None:
        with pytest.raises(UnknownRequest):
            self.queue.remove("unknown")
        with pytest.raises(UnknownRequest):
            self.queue.rekey("unknown", (0, 0))

    @invariant()
    def equals_the_model(self) -> None:
        items = [f"item {item_id}" for _, item_id in self.model]
        assert list(self.queue.in_order()) == items
        assert sorted(self.queue) == sorted(items)
        assert len(self.queue) == len(items)
        assert bool(self.queue) is bool(items)
        if items:
            assert self.queue.peek() == items[0]
        for _, item_id in self.model:
            assert item_id in self.queue
            assert self.queue.get(item_id) == f"item {item_id}"

    @invariant()
    def is_a_heap_with_an_index(self) -> None:
        entries = self.queue._entries
        for position in range(1, len(entries)):
            assert not entries[position][0] < entries[(position - 1) // 2][0]
        assert self.queue._index == {entry[1]: i for i, entry in enumerate(entries)}


PriorityQueueMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestPriorityQueueMachine = PriorityQueueMachine.TestCase


def test_the_errors_name_the_request() -> None:
    queue: PriorityQueue[int] = PriorityQueue()
    queue.push("a", (1,), 1)
    with pytest.raises(DuplicateRequest, match="'a' is already in the queue"):
        queue.push("a", (0,), 2)
    with pytest.raises(UnknownRequest, match="'b' is not in the queue"):
        queue.remove("b")
    assert list(queue.in_order()) == [1]


def test_an_empty_queue() -> None:
    queue: PriorityQueue[int] = PriorityQueue()
    assert not queue
    assert queue.get("a") is None
    with pytest.raises(IndexError, match="pop from an empty"):
        queue.pop()
    with pytest.raises(IndexError, match="peek into an empty"):
        queue.peek()


@given(st.lists(st.integers(0, 3)))
def test_a_counter_in_the_key_makes_ties_first_come_first_served(ranks: list[int]) -> None:
    queue: PriorityQueue[tuple[int, int]] = PriorityQueue()
    for position, rank in enumerate(ranks):
        queue.push(position, (rank, position), (rank, position))
    popped = [queue.pop() for _ in ranks]
    assert popped == sorted(popped)


class CountingKey:
    """Orders like its value and counts the comparisons of all keys."""

    comparisons = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __lt__(self, other: CountingKey) -> bool:
        CountingKey.comparisons += 1
        return self.value < other.value


@pytest.mark.parametrize("size", [10, 1000, 20_000])
def test_every_operation_takes_o_log_n_comparisons(size: int) -> None:
    queue: PriorityQueue[int] = PriorityQueue()
    # Levels of the heap, each with a comparison of two children and one on the way back up.
    bound = 2 * math.ceil(math.log2(size + 2)) + 2

    def comparisons_of(operation: str, *arguments: object) -> int:
        CountingKey.comparisons = 0
        getattr(queue, operation)(*arguments)
        return CountingKey.comparisons

    for i in range(size):
        value = i * 7919 % size
        assert comparisons_of("push", i, CountingKey(value), i) <= bound
    for i in range(0, size, max(2, size // 100)):
        if i not in queue:
            continue
        assert comparisons_of("rekey", i, CountingKey(-i)) <= bound
        assert comparisons_of("rekey", i, CountingKey(size + i)) <= bound
        assert comparisons_of("peek") == comparisons_of("get", i) == 0
        assert comparisons_of("remove", i) <= bound
        if queue:
            assert comparisons_of("pop") <= bound
    worst = CountingKey(10 * size)
    assert comparisons_of("push", "last", worst, 0) == 1
