"""Where a request stands: the ways it may move, and what its life remembers."""

from __future__ import annotations

import pytest

from headway.core.errors import InvalidTransition
from headway.core.life import HISTORY, TRANSITIONS, Life, Phase, RequestStatus

UNFINISHED = [status for status in RequestStatus if not status.is_finished]
FINISHED = [status for status in RequestStatus if status.is_finished]

PATHS: dict[RequestStatus, list[RequestStatus]] = {
    RequestStatus.WAITING: [],
    RequestStatus.RUNNING: [RequestStatus.RUNNING],
    RequestStatus.PAUSED: [RequestStatus.RUNNING, RequestStatus.PAUSED],
    RequestStatus.SWAPPED: [RequestStatus.RUNNING, RequestStatus.SWAPPED],
    RequestStatus.PREEMPTED: [RequestStatus.RUNNING, RequestStatus.PREEMPTED],
} | {status: [status] for status in FINISHED}

#: The diagram of the design.
ALLOWED = {
    ("waiting", "running"),
    ("running", "paused"),
    ("running", "swapped"),
    ("running", "preempted"),
    ("paused", "running"),
    ("paused", "swapped"),
    ("paused", "preempted"),
    ("swapped", "running"),
    ("swapped", "preempted"),
    ("preempted", "running"),
} | {(start.value, end.value) for start in UNFINISHED for end in FINISHED}


def walked(*statuses: RequestStatus) -> Life:
    """A life that began at 0 s and has moved once a second."""
    life = Life()
    life.begin(0.0, 0.0)
    for second, status in enumerate(statuses, start=1):
        life.enter(status, float(second))
    return life


def test_the_table_has_every_status() -> None:
    assert TRANSITIONS.keys() == set(RequestStatus)


@pytest.mark.parametrize("start", RequestStatus, ids=lambda status: status.value)
@pytest.mark.parametrize("end", RequestStatus, ids=lambda status: status.value)
def test_transitions(start: RequestStatus, end: RequestStatus) -> None:
    life = walked(*PATHS[start])
    assert life.status is start
    history = list(life.history)
    if (start.value, end.value) in ALLOWED:
        life.enter(end, 9.5)
        assert life.status is end
        assert list(life.history) == [*history, (9.5, end)]
        assert (life.finish_time is not None) is end.is_finished
    else:
        with pytest.raises(InvalidTransition) as caught:
            life.enter(end, 9.5)
        message = str(caught.value)
        assert f"cannot go from {start.value} to {end.value}" in message
        for time, status in history:
            assert f"{status.value}@{time:.3f}" in message
        assert life.status is start
        assert list(life.history) == history


def test_every_finished_status_has_a_reason() -> None:
    assert [status.finish_reason for status in FINISHED] == [
        "stop",
        "length",
        "abort",
        "timeout",
        "rejected",
    ]
    assert all(status.finish_reason is None for status in UNFINISHED)


def test_the_seconds_of_each_phase_add_up_to_the_whole_life() -> None:
    status = RequestStatus
    life = Life()
    life.begin(1.0, 2.0)
    life.enter(status.RUNNING, 4.0)
    life.first_token_time = 7.0
    for time, following in (
        (12.0, status.PAUSED),
        (20.0, status.RUNNING),
        (30.0, status.PREEMPTED),
        (60.0, status.RUNNING),
        (61.0, status.SWAPPED),
        (161.0, status.RUNNING),
        (162.0, status.FINISHED_STOPPED),
    ):
        life.enter(following, time)
    assert life.phase_seconds == {
        Phase.WAITING: 3.0,  # from its arrival on
        Phase.PREFILL: 3.0,
        Phase.DECODE: 5.0 + 10.0 + 1.0 + 1.0,
        Phase.PAUSED: 8.0,
        Phase.PREEMPTED: 30.0,
        Phase.SWAPPED: 100.0,
    }
    assert sum(life.phase_seconds.values()) == 161.0
    assert (life.first_scheduled_time, life.finish_time) == (4.0, 162.0)


def test_what_a_life_remembers_does_not_grow_with_its_pauses() -> None:
    turns = [RequestStatus.RUNNING, RequestStatus.PAUSED] * 5000
    life = walked(*turns)
    assert len(life.history) == HISTORY
    assert life.history[-1] == (10000.0, RequestStatus.PAUSED)
    assert (life.num_changes, life.num_pauses) == (10001, 5000)
    seconds = life.phase_seconds
    assert (seconds[Phase.WAITING], seconds[Phase.PREFILL], seconds[Phase.PAUSED]) == (
        1,
        5000,
        4999,
    )
    assert sum(seconds.values()) == 10000.0
