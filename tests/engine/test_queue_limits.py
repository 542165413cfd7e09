"""The bounded queue: which requests leave when there is no room, and what they are told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from headway.core.errors import Overloaded, QueueFull, QueueTimeout
from headway.core.policy import Key, PriorityPolicy, Rankable
from headway.core.request import Request, RequestStatus, SamplingParams
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput
from headway.executor.simulated import VirtualClock

MakeEngine = Callable[..., Engine]
Drain = Callable[[Engine], list[EngineOutput]]


def ask(request_id: str, priority: int = 0, num_prompt: int = 4, max_tokens: int = 4) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(request_id, priority, prompt_token_ids=[65] * num_prompt, sampling_params=params)


def refusals(outputs: Sequence[EngineOutput]) -> dict[str, Overloaded]:
    """The requests that were turned away, in order, and why."""
    return {
        output.request_id: output.error
        for output in outputs
        if isinstance(output.error, Overloaded)
    }


def test_the_least_urgent_leaves_be_it_the_newcomer_or_not(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=2)
    engine.submit(ask("running", -9))
    engine.step()
    for request_id, priority in (("a", 3), ("b", 5)):
        engine.submit(ask(request_id, priority))
    assert not refusals(engine.step())
    engine.submit(ask("newcomer", 7))
    (refused,) = refusals(engine.step()).items()
    assert refused[0] == "newcomer"
    engine.submit(ask("urgent", 0))
    (refused,) = refusals(engine.step()).items()
    assert refused[0] == "b"
    assert isinstance(refused[1], QueueFull)
    assert str(refused[1]) == "2 requests at least as urgent are waiting, no more may"
    assert [request.request_id for request in engine.scheduler.waiting_heap.in_order()] == [
        "urgent",
        "a",
    ]
    drain(engine)


def test_among_equals_the_last_to_arrive_leaves(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=2)
    for i in range(6):
        engine.submit(ask(f"r{i}"))
    outputs = engine.step()
    assert set(refusals(outputs)) == {"r3", "r4", "r5"}
    ended = [output.request_id for output in drain(engine) if output.finish_reason]
    assert ended == ["r0", "r1", "r2"]


def test_requests_that_get_a_slot_at_once_were_never_queued(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine(max_num_seqs=8, max_num_queued_reqs=1)
    for i in range(9):
        engine.submit(ask(f"r{i}"))
    assert not refusals(drain(engine))


def test_no_request_that_has_begun_is_displaced(make_engine: MakeEngine, drain: Drain) -> None:
    """The pool is so small that the urgent take all of it: the others are preempted, not ended."""
    engine = make_engine(
        max_num_seqs=4,
        num_blocks=10,
        max_num_queued_reqs=1,
        preemption_mode="recompute",
        enable_prefix_caching=False,
    )
    batch = [ask(f"batch{i}", 9, num_prompt=8, max_tokens=8) for i in range(2)]
    for request in batch:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    assert all(request.num_output_tokens for request in batch)
    urgent = [ask(f"urgent{i}", 0, num_prompt=16, max_tokens=2) for i in range(3)]
    for request in urgent:
        engine.submit(request)
    outputs = engine.step()
    assert {request.status for request in batch} == {RequestStatus.PREEMPTED}
    assert not refusals(outputs)
    engine.submit(ask("late", 10))
    assert set(refusals(engine.step())) == {"late"}
    ended = {output.request_id: output.finish_reason for output in drain(engine)}
    assert ended["batch0"] == ended["batch1"] == "length"


def test_the_tokens_in_the_queue_are_bounded(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine(max_num_seqs=1, max_queued_tokens=20)
    engine.submit(ask("running", -1))
    engine.step()
    engine.submit(ask("small", 3, num_prompt=8))
    engine.submit(ask("large", 2, num_prompt=12))
    assert not refusals(engine.step())
    engine.submit(ask("urgent", 1, num_prompt=5))
    (refused,) = refusals(engine.step()).items()
    assert refused[0] == "small"
    assert "25 prompt tokens are waiting, at most 20 may" in str(refused[1])
    engine.submit(ask("huge", 0, num_prompt=21))
    assert set(refusals(engine.step())) == {"large", "urgent", "huge"}
    drain(engine)


class Counted(int):
    """A priority that counts how often it is compared."""

    num_comparisons = 0

    def __lt__(self, other: int) -> bool:
        Counted.num_comparisons += 1
        return int(self) < int(other)

    # Tuples look for the first element that differs before they ask which is smaller.
    def __eq__(self, other: object) -> bool:
        Counted.num_comparisons += 1
        return int(self) == other

    __hash__ = int.__hash__


class CountingPolicy(PriorityPolicy):
    """Priorities whose comparisons are counted."""

    def key(self, request: Rankable) -> Key:
        return (Counted(request.priority), request.arrival_time)


@pytest.mark.parametrize("limits", [{"max_num_queued_reqs": 1000}, {"max_queued_tokens": 4000}])
def test_turning_many_away_takes_a_few_comparisons_for_each(
    make_engine: MakeEngine, limits: dict[str, int]
) -> None:
    """An urgent prompt, or a thousand of them, takes the place of a thousand small ones."""
    engine = make_engine(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        num_blocks=4000,
        ingress_capacity=2000,
        policy=CountingPolicy(),
        **limits,
    )
    engine.submit(ask("running", -9, max_tokens=100))
    engine.step()
    for i in range(1000):
        engine.submit(ask(f"small{i}", i % 7))
    assert not refusals(engine.step())
    Counted.num_comparisons = 0
    assert not list(engine.queue_limits.surplus())
    assert not Counted.num_comparisons, "no request is looked at while the limits hold"
    if "max_queued_tokens" in limits:
        engine.submit(ask("large", -1, num_prompt=3990))
        num_refused = 998
    else:
        num_refused = 1000
        for i in range(num_refused):
            engine.submit(ask(f"urgent{i}", -1))
    Counted.num_comparisons = 0
    assert len(refusals(engine.step())) == num_refused
    assert Counted.num_comparisons < 200 * num_refused
    engine.abort_all()


@pytest.mark.parametrize("queue_timeout", [None, 1e6])
def test_requests_that_have_ended_are_not_kept(
    make_engine: MakeEngine, drain: Drain, queue_timeout: float | None
) -> None:
    engine = make_engine(queue_timeout=queue_timeout, max_num_seqs=1)

    def num_kept() -> int:
        gc.collect()
        requests = (item for item in gc.get_objects() if isinstance(item, Request))
        return sum(request.request_id.startswith("ephemeral") for request in requests)

    engine.submit(ask("patient", 9))
    for i in range(500):
        engine.submit(ask(f"ephemeral{i}", max_tokens=1))
        engine.step()
    assert num_kept() < 100
    drain(engine)
    assert not num_kept()


def test_a_request_that_waits_too_long_ends_with_a_timeout(
    make_engine: MakeEngine, drain: Drain
) -> None:
    clock = VirtualClock()
    engine = make_engine(clock=clock, max_num_seqs=1, queue_timeout=2.0)
    engine.submit(ask("running", max_tokens=30))
    engine.step()
    engine.submit(ask("waiting"))
    outputs = engine.step()
    clock.advance(1.9)
    outputs += engine.step()
    assert not refusals(outputs)
    clock.advance(0.2)
    (refused,) = refusals(engine.step()).items()
    assert refused[0] == "waiting"
    assert isinstance(refused[1], QueueTimeout)
    assert "has waited for 2 s" in str(refused[1])
    clock.advance(100)
    outputs = drain(engine)
    assert not refusals(outputs)  # a request that has begun has all the time in the world
    assert outputs[-1].finish_reason == "length"


def test_a_re_ranked_request_is_displaced_by_its_new_rank(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=2)
    for request_id, priority in (("running", -9), ("a", 1), ("b", 2)):
        engine.submit(ask(request_id, priority))
    engine.step()
    engine.set_priority("a", 9)
    engine.submit(ask("c", 3))
    assert set(refusals(engine.step())) == {"a"}
    drain(engine)


def test_the_wait_it_is_told_grows_with_the_work_before_it(
    make_engine: MakeEngine, drain: Drain
) -> None:
    def told(max_tokens: int) -> float:
        engine = make_engine(max_num_seqs=1, max_num_queued_reqs=1)
        for i in range(3):
            engine.submit(ask(f"r{i}", max_tokens=max_tokens))
        (error,) = refusals(engine.step()).values()
        drain(engine)
        return error.retry_after

    short, long = told(4), told(400)
    assert 0 < short < long
    assert long == pytest.approx(100 * short, rel=0.5)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=6), max_size=12
    ),
    max_num_queued_reqs=st.integers(1, 4),
    max_queued_tokens=st.none() | st.integers(1, 20),
)
def test_every_request_ends_and_none_leaves_for_a_less_urgent_one(
    make_engine: MakeEngine,
    drain: Drain,
    arrivals: list[list[tuple[int, int]]],
    max_num_queued_reqs: int,
    max_queued_tokens: int | None,
) -> None:
    engine = make_engine(
        max_num_seqs=2,
        max_num_queued_reqs=max_num_queued_reqs,
        max_queued_tokens=max_queued_tokens,
    )
    outputs = []
    submitted: dict[str, Request] = {}
    for burst in arrivals:
        for priority, num_prompt in burst:
            request = ask(f"r{len(submitted)}", priority, num_prompt)
            submitted[request.request_id] = request
            engine.submit(request)
        now = engine.step()
        outputs += now
        queued = [
            request
            for request in engine.scheduler.waiting_heap
            if request.status is RequestStatus.WAITING
        ]
        assert len(queued) <= max_num_queued_reqs
        if max_queued_tokens is not None:
            assert sum(request.num_prompt_tokens for request in queued) <= max_queued_tokens
        for output in now:
            if output.error is not None:
                refused = submitted[output.request_id]
                assert all(refused.key >= request.key for request in queued)
    outputs += drain(engine)
    ended = [output.request_id for output in outputs if output.finish_reason]
    assert sorted(ended) == sorted(submitted)
