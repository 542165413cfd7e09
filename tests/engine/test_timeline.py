"""A request's life as segments."""

from __future__ import annotations

from itertools import pairwise

import pytest

from headway.core.config import SchedulerConfig
from headway.core.request import Request, RequestStatus
from headway.core.scheduler import PriorityScheduler
from headway.engine.engine import Engine
from headway.engine.timeline import Phase, Segment, TimelineRecorder, timeline
from headway.executor.simulated import SimulatedExecutor, VirtualClock

STATUS = RequestStatus


def lived(*changes: tuple[float, RequestStatus], first_token: float | None = None) -> Request:
    """A request that arrived at 1.0 and went through ``changes``."""
    request = Request("r", prompt="hello", arrival_time=1.0)
    request.life.begin(1.0, 1.5)
    for time, status in changes:
        request.life.enter(status, time)
    request.life.first_token_time = first_token
    return request


def test_it_waits_from_its_arrival_not_from_when_it_was_taken_in() -> None:
    assert timeline(lived(), now=3.0) == [Segment(Phase.WAITING, 1.0, 3.0)]


def test_before_it_is_taken_in_it_waits_too() -> None:
    request = Request("r", prompt="hello", arrival_time=1.0)
    assert timeline(request, now=2.0) == [Segment(Phase.WAITING, 1.0, 2.0)]


def test_without_an_arrival_there_is_nothing() -> None:
    assert timeline(Request("r", prompt="hello"), now=2.0) == []


def test_the_first_token_divides_prefill_from_decode() -> None:
    request = lived((2.0, STATUS.RUNNING), (5.0, STATUS.FINISHED_STOPPED), first_token=3.0)
    assert timeline(request) == [
        Segment(Phase.WAITING, 1.0, 2.0),
        Segment(Phase.PREFILL, 2.0, 3.0),
        Segment(Phase.DECODE, 3.0, 5.0),
    ]


def test_a_pause_in_the_middle_of_the_prompt() -> None:
    request = lived(
        (2.0, STATUS.RUNNING),
        (3.0, STATUS.PAUSED),
        (4.0, STATUS.RUNNING),
        (6.0, STATUS.FINISHED_LENGTH_CAPPED),
        first_token=5.0,
    )
    assert [segment.phase for segment in timeline(request)] == [
        Phase.WAITING,
        Phase.PREFILL,
        Phase.PAUSED,
        Phase.PREFILL,
        Phase.DECODE,
    ]


def test_moments_are_left_out() -> None:
    request = lived(
        (2.0, STATUS.RUNNING),
        (3.0, STATUS.PAUSED),
        (3.0, STATUS.SWAPPED),
        (4.0, STATUS.RUNNING),
        (4.0, STATUS.PAUSED),
        (4.0, STATUS.RUNNING),
        first_token=2.5,
    )
    assert timeline(request, now=4.5)[2:] == [
        Segment(Phase.DECODE, 2.5, 3.0),
        Segment(Phase.SWAPPED, 3.0, 4.0),
        Segment(Phase.DECODE, 4.0, 4.5),
    ]


def test_without_now_an_unfinished_life_ends_with_the_last_change() -> None:
    assert timeline(lived((2.0, STATUS.RUNNING))) == [Segment(Phase.WAITING, 1.0, 2.0)]


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute", "tail", "pause"])
def test_a_whole_life_is_covered_without_gaps(mode: str) -> None:
    clock = VirtualClock()
    executor = SimulatedExecutor(
        clock, num_blocks=10, block_size=4, num_swap_blocks=20, max_model_len=40
    )
    config = SchedulerConfig(
        max_num_seqs=2,
        num_blocks=10,
        block_size=4,
        num_swap_blocks=20,
        max_model_len=40,
        preemption_mode=mode,
    )
    engine = Engine(executor, PriorityScheduler(config=config), clock=clock)
    recorder = TimelineRecorder()
    engine.listeners.append(lambda step, _: recorder.record(step.changes))
    requests = [Request(f"r{i}", -i, [1] * (6 + i), max_tokens=12) for i in range(6)]
    for request in requests:
        engine.submit(request)
        for _ in range(4):
            engine.step()
    engine.set_priority("r0", -3)  # a new rank is told as a change, and is none of status
    while engine.has_work:
        engine.step()
    for request in requests:
        segments = timeline(request)
        assert segments[0].start == request.arrival_time
        assert segments[-1].end == request.finish_time
        assert all(segment.start < segment.end for segment in segments)
        assert all(a.end == b.start for a, b in pairwise(segments))
        assert all(a.phase is not b.phase for a, b in pairwise(segments))
        recorded = recorder.timeline(request.request_id, request.arrival, request.first_token_time)
        assert recorded == segments


def test_of_a_long_life_the_latest_part_is_known_and_a_recorder_keeps_all() -> None:
    clock = VirtualClock()
    executor = SimulatedExecutor(clock, num_blocks=100, block_size=4, max_model_len=400)
    config = SchedulerConfig(
        max_num_seqs=1, num_blocks=100, block_size=4, max_model_len=400, preemption_mode="pause"
    )
    engine = Engine(executor, PriorityScheduler(config=config), clock=clock)
    recorder = TimelineRecorder()
    engine.listeners.append(lambda step, _: recorder.record(step.changes))
    victim = Request("victim", 1, [1] * 8, max_tokens=101)
    engine.submit(victim)
    engine.step()
    for number in range(100):
        engine.submit(Request(f"urgent{number}", 0, [1], max_tokens=1))
        engine.step()
        engine.step()
    assert not engine.has_work
    latest = timeline(victim)
    whole = recorder.timeline("victim", victim.arrival, victim.first_token_time)
    assert sum(segment.phase is Phase.PAUSED for segment in whole) == victim.life.num_pauses == 100
    assert len(latest) < len(whole)
    assert whole[-len(latest) :] == latest
    assert (whole[0].start, whole[-1].end) == (victim.arrival_time, victim.finish_time)


def test_a_recorder_knows_requests_that_it_has_not_heard_of_to_wait() -> None:
    recorder = TimelineRecorder()
    assert recorder.timeline("r", 1.0, None, now=2.0) == [Segment(Phase.WAITING, 1.0, 2.0)]
