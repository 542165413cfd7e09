"""The checks themselves: a sound scheduler passes, each kind of damage is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from headway.core import invariants
from headway.core.invariants import InvariantViolation
from headway.core.request import RequestStatus
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import Preemption, PreemptionMode, SchedulerOutput

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
    s.requests["waiting"].transition(RequestStatus.RUNNING, 0.0)


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


def copy_a_table(s: PriorityScheduler) -> None:
    s.resident[0].block_table = list(s.resident[0].block_table)


def compute_beyond_the_blocks(s: PriorityScheduler) -> None:
    s.resident[0].token_ids.extend([1] * 40)
    s.resident[0].num_computed_tokens = 30


def compute_beyond_the_tokens(s: PriorityScheduler) -> None:
    s.resident[0].num_computed_tokens = s.resident[0].num_tokens


def go_on_past_the_limit(s: PriorityScheduler) -> None:
    s.resident[0].token_limit = s.resident[0].num_tokens


def overstate_the_capacity(s: PriorityScheduler) -> None:
    s.resident[0].capacity += 100


def forget_a_swap_slot(s: PriorityScheduler) -> None:
    s.requests["swapped"].swap_table.pop()


def share_a_swap_slot(s: PriorityScheduler) -> None:
    table = s.requests["swapped"].swap_table
    table[0] = table[1]


def lose_the_hash_of_a_cached_block(s: PriorityScheduler) -> None:
    s.block_manager._by_hash.popitem()


DAMAGES: list[Callable[[PriorityScheduler], None]] = [
    lose_a_request,
    put_one_in_two_places,
    let_a_waiting_one_seem_to_run,
    unsort_the_residents,
    change_a_key_in_the_heap,
    leak_a_block,
    free_a_block_twice,
    miscount_references,
    copy_a_table,
    compute_beyond_the_blocks,
    compute_beyond_the_tokens,
    go_on_past_the_limit,
    overstate_the_capacity,
    forget_a_swap_slot,
    share_a_swap_slot,
    lose_the_hash_of_a_cached_block,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_seen(lab: type[Lab], damage: Callable[[PriorityScheduler], None]) -> None:
    s = world(lab)
    invariants.check(s)
    damage(s)
    with pytest.raises(AssertionError):
        invariants.check(s)


def overfill_the_slots(s: PriorityScheduler, output: SchedulerOutput) -> None:
    output.requests.append(s.requests["waiting"])
    output.num_scheduled_tokens.append(0)


def misstate_the_sum(s: PriorityScheduler, output: SchedulerOutput) -> None:
    output.num_batched_tokens += 1


def reverse_the_step(s: PriorityScheduler, output: SchedulerOutput) -> None:
    output.requests.reverse()


def compute_more_than_there_is(s: PriorityScheduler, output: SchedulerOutput) -> None:
    output.num_scheduled_tokens[0] += 1
    output.num_batched_tokens += 1


def evict_one_of_better_rank(s: PriorityScheduler, output: SchedulerOutput) -> None:
    output.preemptions.append(Preemption("high", PreemptionMode.TAIL, "low", 1, 4))


def write_without_blocks(s: PriorityScheduler, output: SchedulerOutput) -> None:
    s.resident[0].capacity = 0


@pytest.mark.parametrize(
    "damage",
    [
        overfill_the_slots,
        misstate_the_sum,
        reverse_the_step,
        compute_more_than_there_is,
        evict_one_of_better_rank,
        write_without_blocks,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_step_is_seen(
    lab: type[Lab], damage: Callable[[PriorityScheduler, SchedulerOutput], None]
) -> None:
    s = world(lab)
    output = s.schedule()
    invariants.check_output(s, output)
    assert [request.request_id for request in output] == ["high", "low"]
    damage(s, output)
    with pytest.raises(InvariantViolation):
        invariants.check_output(s, output)


def test_a_step_that_does_nothing_while_work_is_left_is_seen(lab: type[Lab]) -> None:
    idle = lab()
    idle.add("a")
    with pytest.raises(InvariantViolation, match="work is left and the step does none"):
        invariants.check_output(idle.scheduler, SchedulerOutput())
