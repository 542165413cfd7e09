"""The checks themselves: a sound scheduler passes, each kind of damage is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from headway.core import invariants
from headway.core.invariants import InvariantViolation
from headway.core.policy import Key
from headway.core.request import Request, RequestStatus
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import Preemption, PreemptionMode, SchedulerOutput, StepRow

if TYPE_CHECKING:
    from tests.core.conftest import Lab


def world(lab: type[Lab]) -> PriorityScheduler:
    """Two requests run, one is swapped out, one waits; 7 of 9 blocks are held."""
    w = lab(max_num_seqs=2, num_blocks=9, num_swap_blocks=6, preemption_mode="swap")
    w.add("swapped", 3, num_prompt=10, max_tokens=9)
    w.step()
    w.add("high", 0, num_prompt=10, max_tokens=9)
    w.add("low", 1, num_prompt=16, max_tokens=9)
    w.step()
    w.add("waiting", 9)
    return w.scheduler


def lose_a_request(s: PriorityScheduler) -> None:
    s.waiting_heap.remove("waiting")


def put_one_in_two_places(s: PriorityScheduler) -> None:
    s.waiting_heap.push("low", (0,), s.requests["low"])


def let_a_waiting_one_seem_to_run(s: PriorityScheduler) -> None:
    s.requests["waiting"].life.enter(RequestStatus.RUNNING, 0.0)


def unsort_the_residents(s: PriorityScheduler) -> None:
    s.resident.reverse()


def change_a_key_in_the_heap(s: PriorityScheduler) -> None:
    s.requests["waiting"].key = (-1, 0.0, 0)


def leak_a_block(s: PriorityScheduler) -> None:
    s.block_manager.evict()
    s.block_manager._free.pop()


def free_a_block_twice(s: PriorityScheduler) -> None:
    s.block_manager._free.append(s.block_manager.evict())


def miscount_references(s: PriorityScheduler) -> None:
    s.block_manager.ref_counts[s.resident[0].block_table[0]] += 1


def swap_two_blocks_of_a_table(s: PriorityScheduler) -> None:
    sequence = s.resident[0].leader
    sequence.block_table = (*sequence.block_table[1::-1], *sequence.block_table[2:])


def compute_beyond_the_blocks(s: PriorityScheduler) -> None:
    s.resident[0].token_ids.extend([1] * 40)
    s.resident[0].leader.num_computed_tokens = 30


def compute_beyond_the_tokens(s: PriorityScheduler) -> None:
    s.resident[0].leader.num_computed_tokens = s.resident[0].num_tokens


def go_on_past_the_limit(s: PriorityScheduler) -> None:
    s.resident[0].token_limit = s.resident[0].num_tokens


def overstate_the_capacity(s: PriorityScheduler) -> None:
    s.resident[0].leader.capacity += 100


def forget_a_swap_slot(s: PriorityScheduler) -> None:
    sequence = s.requests["swapped"].leader
    sequence.swap_table = sequence.swap_table[:-1]


def share_a_swap_slot(s: PriorityScheduler) -> None:
    sequence = s.requests["swapped"].leader
    sequence.swap_table = (sequence.swap_table[1], *sequence.swap_table[1:])


def lose_the_hash_of_a_cached_block(s: PriorityScheduler) -> None:
    s.block_manager._by_hash.popitem()


def let_the_threshold_be_below_the_key(s: PriorityScheduler) -> None:
    s.requests["waiting"].threshold = (-1,)


def let_a_threshold_descend(s: PriorityScheduler) -> None:
    """The first request may displace fewer than the second, which ranks below it."""
    s.requests["high"].threshold = (2, 0)


def let_a_request_displace_its_equals(s: PriorityScheduler) -> None:
    s.requests["low"].displaces = (0,)


def miscount_a_status(s: PriorityScheduler) -> None:
    s.table.num_by_status[RequestStatus.RUNNING] += 1


def miscount_the_queued_tokens(s: PriorityScheduler) -> None:
    s.table.num_queued_tokens -= 1


def miscount_the_groups(s: PriorityScheduler) -> None:
    s.table.num_groups += 1


def end_a_sequence_in_part(s: PriorityScheduler) -> None:
    s.resident[0].leader.finish_status = RequestStatus.FINISHED_STOPPED


def have_no_unfinished_sequence(s: PriorityScheduler) -> None:
    s.requests["waiting"].live.clear()


def fork_in_part(s: PriorityScheduler) -> None:
    s.resident[0].n = 3
    s.table.num_groups = 1
    s.resident[0].fork(5)


DAMAGES: list[Callable[[PriorityScheduler], None]] = [
    lose_a_request,
    put_one_in_two_places,
    let_a_waiting_one_seem_to_run,
    unsort_the_residents,
    change_a_key_in_the_heap,
    leak_a_block,
    free_a_block_twice,
    miscount_references,
    swap_two_blocks_of_a_table,
    compute_beyond_the_blocks,
    compute_beyond_the_tokens,
    go_on_past_the_limit,
    overstate_the_capacity,
    forget_a_swap_slot,
    share_a_swap_slot,
    lose_the_hash_of_a_cached_block,
    let_the_threshold_be_below_the_key,
    let_a_threshold_descend,
    let_a_request_displace_its_equals,
    miscount_a_status,
    miscount_the_queued_tokens,
    miscount_the_groups,
    end_a_sequence_in_part,
    have_no_unfinished_sequence,
    fork_in_part,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_seen(lab: type[Lab], damage: Callable[[PriorityScheduler], None]) -> None:
    s = world(lab)
    invariants.check(s)
    damage(s)
    with pytest.raises(AssertionError):
        invariants.check(s)


def with_rows(output: SchedulerOutput, *rows: StepRow) -> SchedulerOutput:
    return SchedulerOutput(output.step, rows, preemptions=output.preemptions)


def compute_for_a_waiting_request(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    return with_rows(output, *output.rows, output[0]._replace(request_id="waiting"))


def compute_a_sequence_twice(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    return with_rows(output, output[0], *output.rows)


def reverse_the_step(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    return with_rows(output, *output.rows[::-1])


def compute_nothing_in_a_row(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    return with_rows(output, output[0]._replace(token_ids=()), output[1])


def compute_other_tokens(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    return with_rows(output, output[0]._replace(token_ids=(77,)), output[1])


def start_elsewhere(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    return with_rows(output, output[0]._replace(start=output[0].start - 1), output[1])


def sample_nothing_where_a_token_is_due(
    s: PriorityScheduler, output: SchedulerOutput
) -> SchedulerOutput:
    return with_rows(output, output[0]._replace(seeds=()), output[1])


def name_the_blocks_of_another(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    return with_rows(output, output[0]._replace(block_table=output[1].block_table), output[1])


def evict_a_request_that_ranks_higher(
    s: PriorityScheduler, output: SchedulerOutput
) -> SchedulerOutput:
    victims = (*output.preemptions, Preemption("high", PreemptionMode.TAIL, "low", 1, 4))
    return SchedulerOutput(output.step, output.rows, preemptions=victims)


def write_without_blocks(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    s.resident[0].leader.capacity = 0
    return output


def write_a_shared_block(s: PriorityScheduler, output: SchedulerOutput) -> SchedulerOutput:
    high, low = s.requests["high"].leader, s.requests["low"].leader
    s.block_manager.free(low.sequence_id)
    s.block_manager.fork(high.sequence_id, low.sequence_id)
    low.block_table = high.block_table
    low.token_ids[:] = high.token_ids
    low.num_computed_tokens, low.capacity = high.num_computed_tokens, high.capacity
    row = output[0]._replace(request_id="low", seeds=low.facts.seeds)
    return with_rows(output, output[0], row)


@pytest.mark.parametrize(
    "damage",
    [
        compute_for_a_waiting_request,
        compute_a_sequence_twice,
        reverse_the_step,
        compute_nothing_in_a_row,
        compute_other_tokens,
        start_elsewhere,
        sample_nothing_where_a_token_is_due,
        name_the_blocks_of_another,
        evict_a_request_that_ranks_higher,
        write_without_blocks,
        write_a_shared_block,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_step_is_seen(
    lab: type[Lab], damage: Callable[[PriorityScheduler, SchedulerOutput], SchedulerOutput]
) -> None:
    s = world(lab)
    output = s.schedule()
    invariants.check_output(s, output)
    assert [row.request_id for row in output] == ["high", "low"]
    damaged = damage(s, output)
    with pytest.raises(InvariantViolation):
        invariants.check_output(s, damaged)


def test_a_step_over_its_budgets_is_seen(lab: type[Lab]) -> None:
    roomy = lab(max_num_seqs=3, max_num_batched_tokens=12)
    for name in "abc":
        roomy.add(name)
    output = roomy.scheduler.schedule()
    for budget, message in (
        ({"max_num_seqs": 2}, "3 slots used"),
        ({"max_num_batched_tokens": 11}, "over the token budget"),
    ):
        roomy.scheduler.config = replace(roomy.scheduler.config, **budget)
        with pytest.raises(InvariantViolation, match=message):
            invariants.check_output(roomy.scheduler, output)
        roomy.scheduler.config = replace(
            roomy.scheduler.config, max_num_seqs=3, max_num_batched_tokens=12
        )
    invariants.check_output(roomy.scheduler, output)


def test_a_group_in_a_step_in_part_is_seen(lab: type[Lab]) -> None:
    trio = lab()
    trio.add("group", max_tokens=9, n=3)
    trio.step()
    output = trio.scheduler.schedule()
    assert [row.index for row in output] == [0, 1, 2]
    with pytest.raises(InvariantViolation, match="is in the step in part"):
        invariants.check_output(trio.scheduler, with_rows(output, *output.rows[:2]))


def test_thresholds_of_a_policy_that_do_not_ascend_are_seen(lab: type[Lab]) -> None:
    """The places of requests that may be displaced are found by bisection."""

    class Unsteady:
        """The more urgent request may displace fewer requests than the less urgent one."""

        name = "unsteady"

        def key(self, request: Request) -> Key:
            return (request.priority,)

        def threshold(self, request: Request) -> Key:
            return (10 - request.priority, math.inf)

    unsteady = lab(policy=Unsteady())
    unsteady.add("a", 1)
    with pytest.raises(InvariantViolation, match=r"thresholds must ascend with keys: .*'a'.*'b'"):
        unsteady.add("b", 2)


def test_a_step_that_does_nothing_while_work_is_left_is_seen(lab: type[Lab]) -> None:
    idle = lab()
    idle.add("a")
    with pytest.raises(InvariantViolation, match="work is left and the step does none"):
        invariants.check_output(idle.scheduler, SchedulerOutput())
