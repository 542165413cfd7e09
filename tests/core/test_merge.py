"""Residents and waiting requests as one queue."""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
from hypothesis import given

from headway.core.merge import Merge
from headway.core.request import Request


def request_of(priority: int) -> Request:
    request = Request(f"r{priority}", priority, [1])
    request.key = (priority,)
    return request


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.integers(0, 12))
def test_it_walks_down_the_ranking_until_no_more_may_be_admitted(
    resident_ranks: set[int], waiting_ranks: set[int], num_admitted: int
) -> None:
    waiting_ranks = waiting_ranks - resident_ranks
    residents = [request_of(rank) for rank in sorted(resident_ranks)]
    waiting = deque(request_of(rank) for rank in sorted(waiting_ranks))
    merge = Merge(residents, lambda: waiting[0] if waiting else None)
    seen, admitted, stopped_at = [], 0, None
    while (request := merge.first) is not None:
        if request is merge.head:
            if admitted == num_admitted:
                stopped_at = request.priority
                merge.stop_admitting()
                continue
            admitted += 1
            residents.insert(merge.index, waiting.popleft())
            merge.refresh()
        else:
            assert next(merge.run) is request
        seen.append(request.priority)
        merge.index += 1
        assert [each.priority for each in merge.rest] == [
            rank for rank in (each.priority for each in residents) if rank > request.priority
        ]
    assert merge.first is None and not merge.rest
    expected = sorted(
        resident_ranks | {rank for rank in waiting_ranks if stopped_at is None or rank < stopped_at}
    )
    assert seen == expected


def test_a_victim_that_waits_again_is_seen_after_a_refresh() -> None:
    first, victim = request_of(1), request_of(5)
    residents = [first, victim]
    waiting: list[Request] = []
    merge = Merge(residents, lambda: waiting[0] if waiting else None)
    merge.index = 1
    waiting.append(residents.pop())
    merge.refresh()
    assert merge.first is merge.head is victim
    merge.stop_admitting()
    assert merge.first is None
