"""The scheduler: requests in, schedule out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core import invariants
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.errors import DuplicateRequest, InvalidRequest, RequestTooLong, UnknownRequest
from headway.core.policy import AgingPolicy
from headway.core.request import PriorityRequest, Request, RequestStatus, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.slo import HEADROOM, SLO, TTFT_SHARE

if TYPE_CHECKING:
    from tests.core.conftest import Lab, Step

Mode = PreemptionMode
#: Modes in which a waiting request may take blocks.
TAKING = ["tail", "swap", "recompute", "auto"]


# ---------------------------------------------------------------------- on its own


def test_usable_on_its_own_exactly_as_documented() -> None:
    s = PriorityScheduler(max_batch_size=4)
    s.add_request(PriorityRequest("a", priority=1, prompt="…", max_tokens=8))
    batch = s.schedule()
    assert [row.request_id for row in batch] == ["a"]
    assert len(batch) == 1
    assert [request.request_id for request in s.running_queue] == ["a"]
    assert not s.waiting_heap
    assert batch[0].token_ids == tuple("…".encode())  # "…" is three bytes
    s.preempt("a")
    assert s.waiting_heap.peek() is s.requests["a"]
    assert s.running_queue == []
    assert s.requests["a"].token_ids == list("…".encode())
    batch = s.schedule()
    assert [row.request_id for row in batch] == ["a"]
    assert s.update_from_output(batch, [(42,)]) == []
    assert s.requests["a"].output_token_ids == [42]
    invariants.check(s)


def test_an_idle_scheduler_schedules_nothing(lab: type[Lab]) -> None:
    idle = lab()
    output = idle.step().output
    assert len(output) == 0
    assert output.is_empty
    assert not idle.scheduler.has_unfinished_requests


def test_a_request_from_its_prompt_to_its_last_token(lab: type[Lab]) -> None:
    one = lab()
    request = one.add("a", num_prompt=6, max_tokens=3)
    steps = one.drain()
    assert [step.counts for step in steps] == [{"a": 6}, {"a": 1}, {"a": 1}]
    assert [step.finished for step in steps] == [[], [], ["a"]]
    assert request.output_token_ids == [1, 1, 1]
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED


# ---------------------------------------------------------------------- ranking


def test_a_batch_is_ordered_by_priority_then_arrival(lab: type[Lab]) -> None:
    mixed = lab(max_num_seqs=3)
    for name, priority in (("d", 5), ("b", 0), ("c", 0), ("a", -1)):
        mixed.add(name, priority)
    assert mixed.step().ids == ["a", "b", "c"]


def test_fcfs_ignores_priority(lab: type[Lab]) -> None:
    fcfs = lab(max_num_seqs=2, policy="fcfs")
    for name, priority in (("a", 5), ("b", 0), ("c", -9)):
        fcfs.add(name, priority)
    assert fcfs.step().ids == ["a", "b"]
    assert all(not step.yields for step in fcfs.drain())


def test_the_earliest_deadline_goes_first(lab: type[Lab]) -> None:
    edf = lab(max_num_seqs=2, policy="deadline")
    edf.add("default")
    edf.add("late", deadline=50.0)
    edf.add("soon", deadline=5.0)
    assert edf.step().ids == ["soon", "late"]
    edf.add("blink", deadline=49.5)  # ahead of "late", but by less than the margin
    assert edf.step().ids == ["soon", "late"]
    edf.add("sooner", deadline=4.0 - 1e-9)
    assert edf.step().ids == ["sooner", "soon"]


def test_the_arrival_that_a_request_brings_counts(lab: type[Lab]) -> None:
    one = lab(max_num_seqs=1)
    one.now = 10.0
    late = one.add("now")
    early = one.add("earlier", arrival_time=3.0)
    assert (late.arrival_time, early.arrival_time) == (10.0, 3.0)
    assert one.step().ids == ["earlier"]


@settings(max_examples=60)
@given(
    mode=st.sampled_from(TAKING),
    batch=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 12)), max_size=8
    ),
    warm_up=st.integers(0, 6),
    num_prompt=st.integers(1, 30),
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(3, 20),
)
def test_the_urgent_request_goes_next(
    lab: type[Lab],
    mode: str,
    batch: list[tuple[int, int, int]],
    warm_up: int,
    num_prompt: int,
    max_num_seqs: int,
    budget: int,
) -> None:
    """Whatever is going on, the one most urgent request is first in the very next step."""
    busy = lab(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        num_blocks=8,
        num_swap_blocks=6,
        preemption_mode=mode,
    )
    for i, (priority, length, max_tokens) in enumerate(batch):
        busy.add(f"r{i}", priority, length, max_tokens)
    busy.steps(warm_up)
    urgent = busy.add("urgent", 0, num_prompt, 2)
    while not urgent.is_finished:
        step = busy.step()
        assert step.ids[0] == "urgent"
        assert "urgent" not in dict(step.yields)
    busy.drain()


@settings(max_examples=40)
@given(data=st.data(), policy=st.sampled_from(["fcfs", "priority", "aging", "deadline"]))
def test_the_same_inputs_give_the_same_schedule(
    lab: type[Lab], data: st.DataObject, policy: str
) -> None:
    mode = data.draw(st.sampled_from(list(Mode)))
    arrivals = data.draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 14), st.integers(1, 9)),
            min_size=1,
            max_size=10,
        )
    )

    def trace() -> list[Any]:
        run = lab(
            max_num_seqs=2,
            max_num_batched_tokens=8,
            num_blocks=6,
            num_swap_blocks=4,
            policy=policy,
            preemption_mode=mode,
        )
        seen = []
        for i, (gap, priority, num_prompt, max_tokens) in enumerate(arrivals):
            run.add(f"r{i}", priority, num_prompt, max_tokens)
            for step in run.steps(gap):
                run.now += 0.5
                seen.append(step)
        return [
            (
                step.counts,
                step.finished,
                step.output.preemptions,
                step.output.swap_out,
                step.output.swap_in,
                step.output.block_copies,
            )
            for step in seen + run.drain()
        ]

    assert trace() == trace()


# ---------------------------------------------------------------------- slots


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.NONE])
def test_an_urgent_request_takes_a_slot_by_pausing_the_last(lab: type[Lab], mode: Mode) -> None:
    two = lab(max_num_seqs=2, preemption_mode=mode)
    two.add("a", 1, max_tokens=9)
    last = two.add("b", 1, max_tokens=9)
    two.steps(2)
    table = last.block_table
    two.add("urgent", 0, max_tokens=2)
    step = two.step()
    assert step.ids == ["urgent", "a"]
    assert step.yields == [("b", Mode.PAUSE)]
    assert last.status is RequestStatus.PAUSED
    assert last.block_table == table  # its blocks stay in the pool
    assert two.step().finished == ["urgent"]
    assert two.step().counts == {"a": 1, "b": 1}  # back at once, nothing to compute again
    two.drain()
    assert last.num_recomputed_tokens == last.num_preemptions == 0
    assert two.scheduler.statistics().preemptions == {"pause": 1}


def test_a_request_of_middle_rank_pauses_only_those_below_it(lab: type[Lab]) -> None:
    three = lab(max_num_seqs=3)
    for name, priority in (("high", 0), ("equal", 1), ("low", 2)):
        three.add(name, priority, max_tokens=9)
    three.step()
    three.add("middle", 1)
    step = three.step()
    assert step.ids == ["high", "equal", "middle"]
    assert step.yields == [("low", Mode.PAUSE)]
    three.add("another", 1)
    step = three.step()
    assert step.ids == ["high", "equal", "middle"]
    assert step.yields == []


@pytest.mark.parametrize("policy", ["fcfs", "priority", "aging"])
@pytest.mark.parametrize("mode", Mode)
def test_equals_never_take_each_others_slots(lab: type[Lab], policy: str, mode: Mode) -> None:
    equal = lab(max_num_seqs=2, policy=policy, preemption_mode=mode)
    for i in range(6):
        equal.add(f"r{i}", 1, max_tokens=3 + i)
        equal.step()
    equal.drain()
    assert equal.scheduler.statistics().preemptions == {}


# ---------------------------------------------------------------------- blocks


def crowded(lab: type[Lab], **settings: Any) -> tuple[Lab, Request, Request]:
    """Two batch requests that hold three blocks each of eight and do not grow for two steps.

    An urgent one of four blocks then lacks two.
    """
    crowd = lab(**({"num_blocks": 8, "preemption_mode": "tail"} | settings))
    a = crowd.add("a", 1, num_prompt=10, max_tokens=3)
    b = crowd.add("b", 1, num_prompt=10, max_tokens=5)
    crowd.step()
    return crowd, a, b


def test_the_tail_of_the_last_ranked_goes_and_no_more(lab: type[Lab]) -> None:
    crowd, a, b = crowded(lab)
    kept = b.block_table[:1]
    urgent = crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    step = crowd.step()
    assert step.counts == {"urgent": 14, "a": 1}
    (tail,) = step.output.preemptions
    assert tail == ("b", Mode.TAIL, "urgent", 2, 6, 1, "")  # two blocks, six computed tokens
    assert b.block_table == kept
    assert (b.status, b.num_computed_tokens) == (RequestStatus.PAUSED, 4)
    assert crowd.scheduler.statistics().blocks.held == 8
    crowd.drain()
    assert (a.num_preemptions, urgent.num_preemptions, b.num_preemptions) == (0, 0, 1)
    assert b.num_recomputed_tokens == 6
    assert b.num_output_tokens == 5


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_without_swap_space_a_whole_victim_is_recomputed(lab: type[Lab], mode: str) -> None:
    crowd, _, b = crowded(lab, preemption_mode=mode)
    crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    step = crowd.step()
    assert step.output.preemptions == (("b", Mode.RECOMPUTE, "urgent", 3, 10, 1, ""),)
    assert b.status is RequestStatus.PREEMPTED
    assert b.request_id in crowd.scheduler.waiting_heap
    assert b.num_computed_tokens == 0
    assert b.num_tokens == 11  # what it generated is kept
    crowd.drain()
    assert b.num_output_tokens == 5


def test_several_victims_yield_from_the_last_upwards(lab: type[Lab]) -> None:
    many = lab(num_blocks=8, preemption_mode="tail")
    for i in range(4):
        many.add(f"r{i}", 1 + i, num_prompt=6, max_tokens=9)
    many.step()
    many.add("urgent", 0, num_prompt=20, max_tokens=2)
    step = many.step()
    assert [one[:2] for one in step.output.preemptions if one.num_blocks] == [
        ("r3", Mode.RECOMPUTE),
        ("r2", Mode.RECOMPUTE),
        ("r1", Mode.TAIL),
    ]
    assert step.ids == ["urgent", "r0"]


@pytest.mark.parametrize("mode", ["none", "pause"])
def test_in_these_modes_a_waiting_request_takes_no_blocks(lab: type[Lab], mode: str) -> None:
    crowd, a, b = crowded(lab, preemption_mode=mode)
    crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    step = crowd.step()
    assert step.ids == ["a", "b"]
    assert step.yields == []
    assert crowd.step().finished == ["a"]
    assert crowd.step().ids == ["urgent", "b"]
    crowd.drain()
    assert a.num_preemptions == b.num_preemptions == 0


def test_mode_none_takes_no_slots_either(lab: type[Lab]) -> None:
    one = lab(max_num_seqs=1, preemption_mode="none")
    one.add("batch", 1, max_tokens=3)
    one.step()
    one.add("urgent", 0)
    assert one.step().ids == ["batch"]
    assert one.step().finished == ["batch"]
    assert one.step().ids == ["urgent"]


def test_in_mode_none_an_urgent_request_outranks_others_once_it_runs(lab: type[Lab]) -> None:
    """It displaces none while it waits; but time, and blocks to grow into, go by rank."""
    timed = lab(
        cost_model=CostModel((0.0, 0.01, 10.0, 0.0)),
        max_step_ms=30.0,
        max_num_seqs=8,
        preemption_mode="none",
    )
    batch = [timed.add(name, 5, max_tokens=20) for name in "abcd"]
    timed.steps(4)
    urgent = [timed.add(name, 0, max_tokens=10) for name in "XY"]
    assert all(each.displaces > each.threshold for each in (*batch, *urgent))
    assert all(each.threshold < batch[0].key for each in urgent)
    steps = timed.steps(11)[1:]
    assert all(step.ids[:2] == ["X", "Y"] for step in steps[:9])
    timed.drain()


def test_in_mode_none_a_running_request_that_outranks_takes_blocks_to_grow(
    lab: type[Lab],
) -> None:
    full = lab(num_blocks=6, preemption_mode="none")
    low = full.add("low", 1, num_prompt=10, max_tokens=9)
    high = full.add("high", 0, num_prompt=10, max_tokens=9)
    full.drain()
    assert high.num_preemptions == 0
    assert low.num_preemptions > 0


@pytest.mark.parametrize("mode", TAKING)
def test_nobody_is_evicted_unless_the_whole_need_is_met(lab: type[Lab], mode: str) -> None:
    full = lab(num_blocks=8, num_swap_blocks=8, preemption_mode=mode)
    full.add("equal", 0, num_prompt=10, max_tokens=2)
    batch = full.add("batch", 1, num_prompt=10, max_tokens=9)
    full.step()
    full.add("big", 0, num_prompt=22, max_tokens=2)  # needs 6; 2 are free, "batch" has 3
    full.add("small", 2, num_prompt=2)
    step = full.step()
    assert step.ids == ["equal", "batch"]  # and "small" is not let past "big"
    assert step.yields == []
    assert batch.num_preemptions == 0
    assert step.finished == ["equal"]
    step = full.step()
    assert step.ids[0] == "big"
    assert ("batch", "big") in [one[:3:2] for one in step.output.preemptions]
    full.drain()


@pytest.mark.parametrize("mode", TAKING)
@pytest.mark.parametrize(("arrival", "takes"), [(6.0, False), (4.0, True)])
def test_blocks_are_taken_only_from_those_behind_by_the_margin(
    lab: type[Lab], mode: str, arrival: float, takes: bool
) -> None:
    """Both times the newcomer goes before "first"; only once by more than the margin of 5 s."""
    full = lab(num_blocks=4, policy=AgingPolicy(tau=10.0), preemption_mode=mode)
    first = full.add("first", 1, num_prompt=10, max_tokens=3)
    full.step()
    full.now = arrival
    newcomer = full.add("newcomer", 0, num_prompt=6, max_tokens=2)
    assert newcomer < first
    assert (full.step().ids == ["newcomer"]) is takes
    assert (first.num_preemptions == 1) is takes
    full.drain()


def test_nobody_is_let_past_a_resident_that_cannot_grow(lab: type[Lab]) -> None:
    crowd = lab(num_blocks=9, preemption_mode="tail")
    crowd.add("a", 1, num_prompt=2, max_tokens=3)
    crowd.add("b", 1, num_prompt=22, max_tokens=5)
    crowd.step()
    crowd.add("urgent", 0, num_prompt=17, max_tokens=3)  # takes three blocks of "b"
    crowd.add("small", 2, num_prompt=2)
    assert crowd.step().ids == ["urgent", "a"]
    assert crowd.step().finished == ["a"]
    assert crowd.scheduler.block_manager.num_available == 1  # enough for "small", not for "b"
    assert crowd.step().ids == ["urgent"]
    assert crowd.step().ids == ["b", "small"]
    crowd.drain()


def test_growing_never_takes_from_above(lab: type[Lab]) -> None:
    pair = lab(num_blocks=6, preemption_mode="tail")
    low = pair.add("low", 1, num_prompt=12, max_tokens=6)
    pair.step()
    high = pair.add("high", 0, num_prompt=12, max_tokens=6)
    steps = pair.drain()
    assert high.num_preemptions == 0
    assert low.num_preemptions >= 1
    assert "high" not in {name for step in steps for name, _ in step.yields}


@pytest.mark.parametrize("policy", ["fcfs", "priority", "aging", "deadline"])
@pytest.mark.parametrize("mode", Mode)
def test_among_equals_the_last_yields_so_that_the_first_grows(
    lab: type[Lab], policy: str, mode: Mode
) -> None:
    pair = lab(num_blocks=6, num_swap_blocks=8, policy=policy, preemption_mode=mode)
    first = pair.add("first", 1, num_prompt=10, max_tokens=8)
    last = pair.add("last", 1, num_prompt=10, max_tokens=8)
    steps = pair.drain()
    assert first.num_preemptions == 0
    assert last.num_preemptions >= 1
    assert [step.finished for step in steps if step.finished] == [["first"], ["last"]]
    assert all(step.ids[0] == "first" for step in steps[:8])  # a token in every step
    assert (first.num_output_tokens, last.num_output_tokens) == (8, 8)


def test_a_request_that_fills_the_pool_runs_to_its_end(lab: type[Lab]) -> None:
    small = lab(num_blocks=4)
    request = small.add("a", num_prompt=15, max_tokens=99)
    other = small.add("b", num_prompt=1, max_tokens=99)
    small.drain()
    assert (request.num_tokens, other.num_tokens) == (16, 16)


# ---------------------------------------------------------------------- tokens


def test_a_long_prompt_is_computed_in_chunks(lab: type[Lab]) -> None:
    chunks = lab(max_num_batched_tokens=8)
    chunks.add("a", num_prompt=20, max_tokens=2)
    assert [step.counts["a"] for step in chunks.drain()] == [8, 8, 4, 1]


def test_decoding_above_shares_the_budget_with_a_chunk_below(lab: type[Lab]) -> None:
    chunks = lab(max_num_batched_tokens=8)
    chunks.add("decoding", 0, num_prompt=4, max_tokens=9)
    chunks.step()
    chunks.add("prefilling", 1, num_prompt=20)
    step = chunks.step()
    assert step.counts == {"decoding": 1, "prefilling": 7}
    assert step.output.num_batched_tokens == 8
    assert step.output.features == (7, 1, 4, 7 * 3.5, 1)


def test_a_prefill_takes_the_tokens_of_those_below(lab: type[Lab]) -> None:
    chunks = lab(max_num_batched_tokens=8)
    low = chunks.add("low", 1, max_tokens=9)
    chunks.step()
    chunks.add("urgent", 0, num_prompt=12)
    step = chunks.step()
    assert step.counts == {"urgent": 8}
    assert step.yields == [("low", Mode.PAUSE)]
    assert chunks.step().counts == {"urgent": 4, "low": 1}
    assert low.num_recomputed_tokens == 0


@pytest.mark.parametrize("budget", [1, 2])
def test_the_smallest_budgets_work(lab: type[Lab], budget: int) -> None:
    tiny = lab(max_num_batched_tokens=budget)
    request = tiny.add("a", num_prompt=5, max_tokens=2)
    tiny.drain(at_most=20)
    assert request.num_output_tokens == 2


# ---------------------------------------------------------------------- time


@settings(max_examples=60)
@given(
    limit_ms=st.floats(1.0, 40.0),
    load=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=8
    ),
)
def test_no_step_is_predicted_to_take_longer_but_for_its_first(
    lab: type[Lab], limit_ms: float, load: list[tuple[int, int, int]]
) -> None:
    model = CostModel((2.0, 0.5, 1.0, 0.01))
    timed = lab(cost_model=model, max_step_ms=limit_ms, max_num_seqs=6)
    for i, (priority, num_prompt, max_tokens) in enumerate(load):
        timed.add(f"r{i}", priority, num_prompt, max_tokens)
    for step in timed.drain():
        predicted = model.predict_ms(step.output.features)
        assert predicted <= limit_ms + 1e-6 or len(step.counts) == 1
        if predicted > limit_ms + 1e-6:
            assert step.output.num_batched_tokens <= timed.scheduler.config.block_size


def test_a_step_short_of_time_pauses_the_last(lab: type[Lab]) -> None:
    timed = lab(cost_model=CostModel((0.0, 0.5, 10.0, 0.0)), max_step_ms=20.0)
    for name in "abc":
        timed.add(name, max_tokens=3)
    timed.step()
    assert timed.step().ids == ["a", "b"]
    assert timed.scheduler.statistics().num_paused == 1
    timed.drain()


def longest_gaps(steps: list[Step]) -> dict[str, int]:
    """For each request, the most steps between two that it was in."""
    seen: dict[str, int] = {}
    gaps: dict[str, int] = {}
    for number, step in enumerate(steps):
        for request_id in step.ids:
            if request_id in seen:
                gaps[request_id] = max(gaps.get(request_id, 0), number - seen[request_id])
            seen[request_id] = number
    return gaps


@pytest.mark.parametrize("policy", ["fcfs", "priority", "aging", "deadline"])
def test_equals_take_turns_when_time_is_short(lab: type[Lab], policy: str) -> None:
    """Seven have begun when their contexts get too long for more than two in a step.

    The first of all is always one of them.
    """
    timed = lab(
        cost_model=CostModel((0.0, 0.0, 1.0, 1.0)),
        max_step_ms=30.0,
        max_num_seqs=7,
        policy=policy,
    )
    for name in "abcdefg":
        timed.add(name, num_prompt=4, max_tokens=12)
    steps = timed.drain()
    assert max(len(step.ids) for step in steps) >= 5
    gaps = longest_gaps(steps)
    assert gaps.pop("a") == 1
    assert max(gaps.values()) <= 6


def test_those_above_never_take_turns_with_those_below(lab: type[Lab]) -> None:
    timed = lab(cost_model=CostModel((0.0, 0.01, 10.0, 0.0)), max_step_ms=30.0, max_num_seqs=8)
    for name in "abcd":
        timed.add(name, 5, max_tokens=20)
    timed.steps(4)
    for name in "XY":
        timed.add(name, 0, max_tokens=10)
    steps = timed.steps(11)[1:]
    assert all(step.ids[:2] == ["X", "Y"] for step in steps[:9])
    below = [step.ids[2] for step in steps[:8]]
    assert sorted(below[:4]) == sorted(below[4:]) == ["a", "b", "c", "d"]
    timed.drain()


def test_a_prefill_among_equals_leaves_every_other_step_to_them(lab: type[Lab]) -> None:
    timed = lab(cost_model=CostModel((0.0, 1.0, 5.0, 0.0)), max_step_ms=10.0, max_num_seqs=3)
    long = timed.add("long", num_prompt=100, max_tokens=2)
    timed.steps(2)
    assert long.num_computed_tokens == 20
    timed.add("urgent", -1, max_tokens=30)
    timed.add("other", 0, max_tokens=30)
    steps = timed.steps(30)
    gaps = longest_gaps(steps)
    assert gaps["urgent"] == 1
    assert gaps["long"] <= 2
    timed.drain()


def test_a_step_is_as_short_as_the_tightest_target_in_it(lab: type[Lab]) -> None:
    model = CostModel((2.0, 0.5, 1.0, 0.0))
    promised = lab(
        cost_model=model,
        max_num_seqs=20,
        slos=(SLO(0, tpot_ms=6.0 / HEADROOM), SLO(3, tpot_ms=10.0 / HEADROOM)),
        max_step_ms=18.0,
    )
    for i in range(14):
        promised.add(f"batch-{i}", 9, num_prompt=1, max_tokens=40)
    without = promised.steps(20)[-1]
    assert len(without.ids) == 14
    promised.add("standard", 2, num_prompt=1, max_tokens=10)
    beside_standard = promised.steps(2)[-1]
    assert beside_standard.ids[0] == "standard"
    assert len(beside_standard.ids) == 8
    promised.add("urgent", -7, num_prompt=1, max_tokens=4)
    beside_urgent = promised.steps(2)[-1]
    assert beside_urgent.ids[:2] == ["urgent", "standard"]
    assert len(beside_urgent.ids) == 4
    promised.drain()


def test_a_ttft_target_bounds_the_steps_that_an_arrival_may_have_to_wait_for(
    lab: type[Lab],
) -> None:
    model = CostModel((2.0, 0.5, 1.0, 0.0))
    promised = lab(cost_model=model, max_num_seqs=20, slos=(SLO(0, ttft_ms=20.0),))
    for i in range(14):
        promised.add(f"batch-{i}", 9, num_prompt=30, max_tokens=4)
    for step in promised.drain():
        assert step.output.predicted_ms <= 20.0 * TTFT_SHARE + 1e-9


def test_a_first_token_is_not_held_up_by_others_time_per_token(lab: type[Lab]) -> None:
    model = CostModel((2.0, 0.1, 1.0, 0.0))
    promised = lab(cost_model=model, slos=(SLO(0, ttft_ms=100.0, tpot_ms=5.0 / HEADROOM),))
    promised.add("first", 0, max_tokens=9)
    promised.steps(2)
    promised.add("second", 0, num_prompt=60, max_tokens=9)
    promised.add("batch", 1, num_prompt=60, max_tokens=1)
    assert promised.step().counts == {"first": 1, "second": 60}
    assert promised.step().counts == {"first": 1, "second": 1, "batch": 10}
    promised.drain()


def test_a_first_token_does_not_wait_for_those_whom_it_outranks(lab: type[Lab]) -> None:
    """While steps are bounded; those who rank equal go on beside it."""
    bounded = lab(cost_model=CostModel((1.0, 0.1, 1.0, 0.0)), max_step_ms=50.0, max_num_seqs=9)
    for name, priority in (("batch", 9), ("equal", 0)):
        bounded.add(name, priority, max_tokens=20)
    bounded.steps(2)
    bounded.add("urgent", 0, num_prompt=30, max_tokens=9)
    bounded.add("waiting", 9, max_tokens=9)
    assert bounded.step().counts == {"equal": 1, "urgent": 30}
    assert bounded.step().counts == {"equal": 1, "urgent": 1, "batch": 1, "waiting": 4}
    unbounded = lab(max_num_seqs=9)
    unbounded.add("batch", 9, max_tokens=9)
    unbounded.step()
    unbounded.add("urgent", 0, num_prompt=30, max_tokens=2)
    assert unbounded.step().counts == {"urgent": 30, "batch": 1}
    for one in (bounded, unbounded):
        one.drain()


@settings(max_examples=60)
@given(
    load=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=9
    ),
    tpots=st.tuples(st.floats(3.0, 20.0), st.floats(3.0, 20.0)),
)
def test_targets_bound_what_rides_along(
    lab: type[Lab], load: list[tuple[int, int, int]], tpots: tuple[float, float]
) -> None:
    """A step that is longer than a target in it has nobody less urgent than the target's owner."""
    model = CostModel((2.0, 0.5, 1.0, 0.01))
    targets = dict(enumerate(tpots))
    slos = tuple(SLO(priority, tpot_ms=target / HEADROOM) for priority, target in targets.items())
    promised = lab(cost_model=model, slos=slos, max_num_seqs=6)
    asked = {}
    for i, (priority, num_prompt, max_tokens) in enumerate(load):
        asked[f"r{i}"] = priority
        promised.add(f"r{i}", priority, num_prompt, max_tokens)
    for step in promised.drain():
        priorities = {asked[request_id] for request_id in step.ids}
        for priority in priorities & set(targets):
            if step.output.predicted_ms > targets[priority] + 1e-6:
                assert max(priorities) == priority


# ---------------------------------------------------------------------- lengths and ends


def test_what_could_never_fit_is_refused_when_added(lab: type[Lab]) -> None:
    by_pool = lab(num_blocks=4)
    with pytest.raises(RequestTooLong) as caught:
        by_pool.add("a", num_prompt=16)
    assert "prompt of request 'a' has 16 tokens, the whole KV pool holds 16" in str(caught.value)
    by_context = lab(num_blocks=4, max_model_len=10)
    with pytest.raises(RequestTooLong) as caught:
        by_context.add("b", num_prompt=12)
    assert "has 12 tokens, the context is 10 tokens" in str(caught.value)
    by_pool.assert_idle()
    by_pool.add("a", num_prompt=15)  # the id is free, the neighbours unharmed
    by_pool.drain()


@pytest.mark.parametrize(
    ("settings", "expected"), [({"num_blocks": 3}, 8), ({"max_model_len": 9}, 5), ({}, 20)]
)
def test_the_output_is_capped_by_pool_context_and_max_tokens(
    lab: type[Lab], settings: dict[str, int], expected: int
) -> None:
    capped = lab(**settings)
    request = capped.add("a", num_prompt=4, max_tokens=20)
    capped.drain()
    assert request.num_output_tokens == expected
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED


def test_end_tokens_end_a_request(lab: type[Lab]) -> None:
    ends = lab(eos_token_ids=frozenset({7}))
    plain = ends.add("plain", max_tokens=9)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    ends.add("ignores", max_tokens=None, sampling_params=params)
    own_params = SamplingParams(max_tokens=9, stop_token_ids=frozenset({5}))
    own = ends.add("own", max_tokens=None, sampling_params=own_params)
    assert ends.step(token=5).finished == ["own"]
    assert ends.step(token=7).finished == ["plain"]
    assert plain.output_token_ids == [5, 7]
    assert ends.step(token=7).finished == ["ignores"]
    assert {plain.status, own.status} == {RequestStatus.FINISHED_STOPPED}


def test_a_finished_slot_is_filled_in_the_next_step(lab: type[Lab]) -> None:
    one = lab(max_num_seqs=1)
    one.add("a", max_tokens=1)
    one.add("b", max_tokens=1)
    assert [step.ids for step in one.drain()] == [["a"], ["b"]]


# ---------------------------------------------------------------------- ids


def test_a_duplicate_id_is_refused_and_the_first_goes_on(lab: type[Lab]) -> None:
    twice = lab()
    first = twice.add("a")
    with pytest.raises(DuplicateRequest, match="request id 'a' is in use"):
        twice.add("a")
    twice.step()
    with pytest.raises(DuplicateRequest, match="request id 'a' is in use"):
        twice.add("a")
    twice.drain()
    assert first.num_output_tokens == 4
    twice.add("a")  # free again
    twice.drain()


def test_a_request_cannot_be_added_twice(lab: type[Lab]) -> None:
    once = lab()
    request = once.add("a", max_tokens=1)
    once.drain()
    with pytest.raises(InvalidRequest, match="'a' is finished_length_capped; add a fresh one"):
        once.scheduler.add_request(request)
    once.assert_idle()


def test_unknown_ids(lab: type[Lab]) -> None:
    s = lab().scheduler
    for call in (s.abort, s.preempt, lambda name: s.set_priority(name, 1)):
        with pytest.raises(UnknownRequest, match="no unfinished request has the id 'x'"):
            call("x")


# ---------------------------------------------------------------------- from outside


def in_status(lab: type[Lab], status: RequestStatus) -> tuple[Lab, Request]:
    """A scheduler with one request "it" of this status, and an urgent one beside it."""
    settings = {"max_num_seqs": 1, "num_blocks": 8, "num_swap_blocks": 8, "preemption_mode": "swap"}
    world = lab(**settings)
    it = world.add("it", 1, num_prompt=10, max_tokens=9)
    if status is RequestStatus.WAITING:
        world.add("urgent", 0, max_tokens=9)
        world.step()
    else:
        world.step()
        if status is RequestStatus.PREEMPTED:
            world.scheduler.preempt("it")
        if status in {RequestStatus.PAUSED, RequestStatus.SWAPPED}:
            length = 4 if status is RequestStatus.PAUSED else 24
            world.add("urgent", 0, num_prompt=length, max_tokens=3)
            world.step()
    assert it.status is status
    return world, it


UNFINISHED = [status for status in RequestStatus if not status.is_finished]


@pytest.mark.parametrize("status", UNFINISHED)
def test_abort_frees_everything_in_every_status(lab: type[Lab], status: RequestStatus) -> None:
    world, it = in_status(lab, status)
    world.now = 5.0
    assert world.scheduler.abort("it", world.now) is it
    invariants.check(world.scheduler)
    assert it.status is RequestStatus.FINISHED_ABORTED
    assert it.finish_time == 5.0
    with pytest.raises(UnknownRequest):
        world.scheduler.abort("it")
    world.drain()


@pytest.mark.parametrize("end", [status for status in RequestStatus if status.is_finished])
def test_finish_ends_in_any_way(lab: type[Lab], end: RequestStatus) -> None:
    world, it = in_status(lab, RequestStatus.RUNNING)
    world.scheduler.finish("it", end)
    assert it.status is end
    world.assert_idle()


@pytest.mark.parametrize("status", UNFINISHED)
def test_preempt_sends_residents_back_to_wait(lab: type[Lab], status: RequestStatus) -> None:
    world, it = in_status(lab, status)
    tokens = list(it.token_ids)
    if status in {RequestStatus.RUNNING, RequestStatus.PAUSED}:
        world.scheduler.preempt("it")
        assert it.status is RequestStatus.PREEMPTED
        assert "it" in world.scheduler.waiting_heap
    else:
        with pytest.raises(InvalidRequest, match=f"'it' is {status.value}, not resident"):
            world.scheduler.preempt("it")
        assert it.status is status
    invariants.check(world.scheduler)
    assert it.token_ids == tokens
    world.drain()
    assert it.num_output_tokens == 9


@pytest.mark.parametrize("status", UNFINISHED)
def test_set_priority_ranks_anew_in_every_status(lab: type[Lab], status: RequestStatus) -> None:
    world, it = in_status(lab, status)
    world.add("other", 1)
    world.scheduler.set_priority("it", -1)
    invariants.check(world.scheduler)
    assert it.priority == -1
    assert world.step().ids == ["it"]
    world.scheduler.set_priority("it", 9)
    invariants.check(world.scheduler)
    assert world.step().ids != ["it"]
    world.drain()
    assert it.num_output_tokens == 9


@pytest.mark.parametrize("priority", [2**63, True, 1.5, None])
def test_a_bad_new_priority_changes_nothing(lab: type[Lab], priority: Any) -> None:
    world, it = in_status(lab, RequestStatus.RUNNING)
    key = it.key
    with pytest.raises(InvalidRequest, match="must be an int64"):
        world.scheduler.set_priority("it", priority)
    assert (it.priority, it.key) == (1, key)
    world.drain()


@pytest.mark.parametrize("call", ["abort", "preempt"])
def test_what_left_while_the_step_ran_is_passed_over(lab: type[Lab], call: str) -> None:
    pair = lab()
    gone, stays = pair.add("gone"), pair.add("stays")
    output = pair.scheduler.schedule()
    getattr(pair.scheduler, call)("gone")
    assert pair.scheduler.update_from_output(output, [(5,), (6,)]) == []
    invariants.check(pair.scheduler)
    assert gone.output_token_ids == []
    assert stays.output_token_ids == [6]
    pair.drain()


def test_the_tokens_must_be_parallel_to_the_step(lab: type[Lab]) -> None:
    one = lab()
    one.add("a")
    output = one.scheduler.schedule()
    with pytest.raises(ValueError, match="zip"):
        one.scheduler.update_from_output(output, [])


# ---------------------------------------------------------------------- what can be read


def test_times_are_those_it_was_told(lab: type[Lab]) -> None:
    clock = lab(max_num_seqs=1)
    clock.now = 1.0
    request = clock.add("a", 1, max_tokens=2)
    clock.now = 2.0
    clock.add("first", 0, max_tokens=1)
    clock.step()
    assert request.life.first_scheduled_time is None
    for clock.now in (3.0, 4.0):
        clock.step()
    assert request.arrival_time == 1.0
    assert request.life.first_scheduled_time == request.first_token_time == 3.0
    assert request.finish_time == 4.0
    assert list(request.life.history) == [
        (1.0, RequestStatus.WAITING),
        (3.0, RequestStatus.RUNNING),
        (4.0, RequestStatus.FINISHED_LENGTH_CAPPED),
    ]


def test_the_clock_never_runs_backwards(lab: type[Lab]) -> None:
    clock = lab()
    clock.now = 9.0
    clock.add("a")
    clock.now = 3.0
    request = clock.add("b")
    assert request.arrival_time == 9.0
    assert clock.scheduler.now == 9.0


def test_statistics_count_every_status(lab: type[Lab]) -> None:
    world, _ = in_status(lab, RequestStatus.SWAPPED)
    world.add("waiting", 2)
    statistics = world.scheduler.statistics()
    assert (statistics.num_running, statistics.num_swapped, statistics.num_waiting) == (1, 1, 1)
    assert statistics.num_paused == statistics.num_preempted == statistics.num_finished == 0
    assert statistics.preemptions == {"swap": 1}
    assert statistics.num_swap_blocks_used == 3
    assert statistics.blocks == (8, 0, 6, 2)  # swapped out, and findable in the pool as well
    assert statistics.blocks.usage == 0.75
    world.drain()
    statistics = world.scheduler.statistics()
    assert statistics.num_finished == 3
    assert statistics.num_running == statistics.num_swap_blocks_used == 0
    assert statistics.recomputed_tokens == {}


def test_recomputed_tokens_are_counted_once(lab: type[Lab]) -> None:
    one = lab(enable_prefix_caching=False)
    request = one.add("a", 3, num_prompt=10, max_tokens=3)
    one.step()
    one.scheduler.preempt("a")
    one.drain()
    assert request.num_recomputed_tokens == 10
    assert request.num_preemptions == 1
    assert one.scheduler.statistics().recomputed_tokens == {3: 10}  # by priority


def test_a_step_is_a_sequence_of_rows(lab: type[Lab]) -> None:
    three = lab()
    for name in "abc":
        three.add(name)
    output = three.scheduler.schedule()
    assert [row.request_id for row in output[:2]] == ["a", "b"]
    assert output[-1].request_id == "c"
    assert output[0] in output
    assert repr(output) == "SchedulerOutput(1, [a:4, b:4, c:4], preemptions=())"


def test_scheduling_again_decides_the_same_again(lab: type[Lab]) -> None:
    three = lab(max_num_seqs=2, max_num_batched_tokens=10)
    for name in "abc":
        three.add(name, num_prompt=6)
    first, second = three.scheduler.schedule(), three.scheduler.schedule()
    assert first.rows == second.rows
    assert [len(row.token_ids) for row in second] == [6, 4]


def test_config_of_a_scheduler_is_as_given() -> None:
    config = SchedulerConfig(num_blocks=3, policy="fcfs")
    scheduler = PriorityScheduler(config=config)
    assert scheduler.config is config
    assert scheduler.policy.name == "fcfs"
    assert scheduler.mode is Mode.AUTO
