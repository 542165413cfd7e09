"""Where each request is, what is counted, and who is told of changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from headway.core.errors import InvalidTransition, UnknownRequest
from headway.core.life import HISTORY, Phase, RequestStatus
from headway.core.request import Request
from headway.core.request_table import RequestTable, StatusChange

if TYPE_CHECKING:
    from tests.core.conftest import Lab

STATUS = RequestStatus


def added(table: RequestTable, request_id: str, priority: int, n: int = 1) -> Request:
    request = Request(request_id, priority, [1, 2, 3], arrival_time=1.0, n=n)
    request.key = (priority, request_id)
    table.add(request, 2.0)
    return request


def test_each_move_changes_the_collections_that_the_statuses_stand_for() -> None:
    table = RequestTable()
    b, a = added(table, "b", 2), added(table, "a", 1, n=3)
    assert (table.num_queued, table.num_queued_tokens, table.num_groups) == (2, 6, 1)
    assert table.next_waiting() is a
    for request in (b, a):
        table.move(request, STATUS.RUNNING, 3.0)
    assert table.resident == [a, b]
    assert table.next_waiting() is None
    assert (table.num_queued, table.num_queued_tokens) == (0, 0)
    table.move(a, STATUS.PAUSED, 4.0)
    assert table.resident == [a, b]
    table.move(a, STATUS.SWAPPED, 5.0)
    assert table.resident == [b]
    assert table.next_waiting() is a
    table.move(a, STATUS.PREEMPTED, 6.0)
    assert table.next_waiting() is a
    table.move(a, STATUS.FINISHED_ABORTED, 7.0)
    table.move(b, STATUS.FINISHED_STOPPED, 7.0)
    assert not table.resident and not table.waiting and not table.by_id
    assert (table.num_finished, table.num_groups) == (2, 0)
    assert set(table.num_by_status.values()) == {0}


def test_a_move_that_does_not_exist_changes_nothing() -> None:
    table = RequestTable()
    request = added(table, "a", 1)
    with pytest.raises(InvalidTransition):
        table.move(request, STATUS.PAUSED, 3.0)
    assert request.status is STATUS.WAITING
    assert table.next_waiting() is request
    assert table.num_by_status[STATUS.WAITING] == 1


def test_an_unknown_id() -> None:
    with pytest.raises(UnknownRequest, match="no unfinished request has the id 'x'"):
        RequestTable().get("x")


def test_changes_are_told_as_values(lab: type[Lab]) -> None:
    told: list[StatusChange] = []
    one = lab(max_num_seqs=1)
    one.scheduler.table.on_change = told.append
    one.add("batch", 1, num_prompt=6, max_tokens=3)
    one.now = 1.0
    one.step()
    one.now = 2.0
    one.add("urgent", 0, max_tokens=1)
    one.step()
    one.scheduler.set_priority("batch", -5)
    one.now = 3.0
    one.drain()
    assert [(each.request_id, each.status.value, each.time) for each in told] == [
        ("batch", "waiting", 0.0),
        ("batch", "running", 1.0),
        ("urgent", "waiting", 2.0),
        ("urgent", "running", 2.0),
        ("batch", "paused", 2.0),
        ("urgent", "finished_length_capped", 2.0),
        ("batch", "paused", 2.0),
        ("batch", "running", 3.0),
        ("batch", "finished_length_capped", 3.0),
    ]
    assert [each.priority for each in told if each.request_id == "batch"] == [1] * 3 + [-5] * 3
    assert told[4].num_computed_tokens == 6


def test_what_a_request_keeps_does_not_grow_with_its_pauses(lab: type[Lab]) -> None:
    """Its totals are right all the same."""
    one = lab(max_num_seqs=1, num_blocks=400)
    request = one.add("batch", 1, max_tokens=1000)
    one.now = 1.0
    one.step()
    for number in range(300):
        one.now += 2.0
        one.add(f"urgent-{number}", 0, max_tokens=1)
        one.step()
        one.now += 1.0
        one.step()
    one.now += 0.5
    one.scheduler.abort("batch", one.now)
    life = request.life
    assert len(life.history) == HISTORY
    assert (life.num_pauses, life.num_changes) == (300, 2 + 600 + 1)
    assert life.phase_seconds == {
        Phase.WAITING: 1.0,
        Phase.PREFILL: 0.0,
        Phase.DECODE: 600.5,
        Phase.PAUSED: 300.0,
    }
    assert one.scheduler.statistics().preemptions == {"pause": 300}
