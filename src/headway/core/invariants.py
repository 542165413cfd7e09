"""What must hold between any two calls of a scheduler; the tests ask after every step."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from headway.core.request import Request, RequestStatus
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput
from headway.core.sequence import Sequence

__all__ = ["InvariantViolation", "check", "check_output"]

_RESIDENT = {RequestStatus.RUNNING, RequestStatus.PAUSED}
_WAITING = {RequestStatus.WAITING, RequestStatus.PREEMPTED, RequestStatus.SWAPPED}


class InvariantViolation(AssertionError):
    """The scheduler contradicts itself: a bug in Headway."""


def check(scheduler: PriorityScheduler) -> None:
    """Check the scheduler's whole state. O(requests + blocks).

    Raises:
        InvariantViolation: naming what does not hold.
    """
    _check_membership(scheduler)
    _check_ranking(scheduler)
    for request in scheduler.requests.values():
        _check_progress(scheduler, request)
    _check_blocks(scheduler)
    _check_swap(scheduler)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantViolation(message)


def _check_membership(scheduler: PriorityScheduler) -> None:
    """Each unfinished request is in exactly one collection, the one that fits its status."""
    resident, waiting = scheduler.resident, list(scheduler.waiting_heap)
    ids = [request.request_id for request in (*resident, *waiting)]
    _require(len(set(ids)) == len(ids), f"a request is in two places: {Counter(ids)}")
    _require(set(ids) == set(scheduler.requests), "a request is lost")
    for request in resident:
        _require(request.status in _RESIDENT, f"{request} is resident")
    for request in waiting:
        _require(request.status in _WAITING, f"{request} is in the waiting heap")
    if waiting:
        _require(
            scheduler.waiting_heap.peek().key == min(request.key for request in waiting),
            "the heap's root is not its smallest",
        )
    table = scheduler.table
    by_status = Counter(request.status for request in scheduler.requests.values())
    _require(
        all(count == by_status[status] for status, count in table.num_by_status.items()),
        f"{table.num_by_status} are counted, there are {by_status}",
    )
    queued = [request for request in waiting if request.status is RequestStatus.WAITING]
    queued_tokens = sum(request.num_prompt_tokens for request in queued)
    _require(
        (table.num_queued, table.num_queued_tokens) == (len(queued), queued_tokens),
        f"{table.num_queued} requests of {table.num_queued_tokens} tokens are counted as queued, "
        f"{len(queued)} of {queued_tokens} are",
    )
    num_groups = sum(request.n > 1 for request in scheduler.requests.values())
    _require(table.num_groups == num_groups, f"{num_groups} groups, {table.num_groups} counted")


def _check_ranking(scheduler: PriorityScheduler) -> None:
    """Residents are sorted, and thresholds are what bisection takes them to be."""
    keys = [request.key for request in scheduler.resident]
    _require(keys == sorted(keys), "residents are not sorted by key")
    ranked = sorted(scheduler.requests.values())
    for request in ranked:
        _require(request.threshold >= request.key, f"the threshold of {request} is below its key")
        _require(request.displaces >= request.threshold, f"{request} may displace too many")
    for request, follower in pairwise(ranked):
        _require(
            request.threshold <= follower.threshold,
            f"thresholds must ascend with keys: {request} has a larger one than {follower}",
        )


def _check_progress(scheduler: PriorityScheduler, request: Request) -> None:
    size, is_resident = scheduler.config.block_size, request.status in _RESIDENT
    _require(bool(request.live), f"{request} has no unfinished sequence")
    _require(
        request.live == [each for each in request.sequences if not each.is_finished],
        f"{request}: its live sequences are others",
    )
    _require(len(request.sequences) in (1, request.n), f"{request} has forked in part")
    held_by_any = any(sequence.block_table for sequence in request.live)
    _require(is_resident == held_by_any, f"{request}: status does not fit its blocks")
    for sequence in request.live:
        held, computed = len(sequence.block_table), sequence.num_computed_tokens
        _require(0 <= computed < sequence.num_tokens, f"{sequence}: computed out of range")
        _require(computed <= held * size, f"{sequence}: computed beyond its {held} blocks")
        _require(sequence.num_tokens < request.token_limit, f"{sequence}: should have finished")
        _require(sequence.capacity <= held * size, f"{sequence}: capacity not held")
        if sequence.swap_table:
            covered = (held + len(sequence.swap_table)) * size
            swapped = sequence.num_swapped_tokens
            _require(computed == held * size, f"{sequence}: a hole before its swapped blocks")
            _require(computed < swapped <= covered, f"{sequence}: swapped tokens")
    is_swapped = any(sequence.swap_table for sequence in request.live) and not held_by_any
    _require(
        (request.status is RequestStatus.SWAPPED) == is_swapped,
        f"{request}: status does not fit its swap tables",
    )


def _sequences(scheduler: PriorityScheduler) -> list[Sequence]:
    return [each for request in scheduler.requests.values() for each in request.sequences]


def _num_left(sequence: Sequence) -> int:
    """Tokens of a sequence that are not computed."""
    return sequence.num_tokens - sequence.num_computed_tokens


def _check_blocks(scheduler: PriorityScheduler) -> None:
    """free + held + cached = num_blocks, and reference counts match the tables."""
    manager = scheduler.block_manager
    tables = {
        sequence.sequence_id: sequence.block_table
        for sequence in _sequences(scheduler)
        if sequence.block_table
    }
    kept = {table_id: tuple(table) for table_id, table in manager.tables.items()}
    _require(tables == kept, "block tables differ from the residents'")
    counts = Counter(block for table in tables.values() for block in table)
    _require(
        all(manager.ref_counts[block] == counts[block] for block in range(manager.num_blocks)),
        "reference counts do not match the block tables",
    )
    statistics = manager.statistics()
    _require(statistics.held == len(counts), f"{len(counts)} blocks are held, {statistics}")
    for table in tables.values():
        _require(len(set(table)) == len(table), "a block is twice in one table")
    manager.check()


def _check_swap(scheduler: PriorityScheduler) -> None:
    used = [slot for sequence in _sequences(scheduler) for slot in sequence.swap_table]
    _require(len(set(used)) == len(used), "two sequences share a swap slot")
    total = scheduler.config.num_swap_blocks
    _require(len(used) + scheduler.kv_cache.num_free_swap_slots == total, "a swap slot is lost")


def check_output(scheduler: PriorityScheduler, output: SchedulerOutput) -> None:
    """Check a step just scheduled, before ``update_from_output``. O(requests + blocks).

    Raises:
        InvariantViolation: over a budget, out of rank order, into another sequence's block, a group
            in part, no progress, or a victim that outranks its beneficiary.
    """
    check(scheduler)
    config, size = scheduler.config, scheduler.config.block_size
    _require(len(output) <= config.max_num_seqs, f"{len(output)} slots used")
    _require(output.num_batched_tokens <= config.max_num_batched_tokens, "over the token budget")
    ids = list(dict.fromkeys(row.request_id for row in output))
    running = [request.request_id for request in scheduler.running_queue]
    _require(ids == running, f"the step has {ids}, running are {running}")
    places = {(row.request_id, row.index) for row in output}
    _require(len(places) == len(output), "a sequence has two rows")
    for request_id in ids:
        request = scheduler.requests[request_id]
        indices = [row.index for row in output if row.request_id == request_id]
        present = [each for each in request.live if each.index in indices]
        # The others wait for the prompt, or for those in the step to catch up with them.
        is_behind = all(_num_left(each) > 1 for each in present)
        absent = [each for each in request.live if each.index not in indices]
        _require(
            indices == [each.index for each in present]
            and all(each.lacks_blocks or (is_behind and _num_left(each) == 1) for each in absent),
            f"{request} is in the step in part: {indices}",
        )
    written: set[int] = set()
    for row in output:
        sequence = scheduler.requests[row.request_id].sequences[row.index]
        count = len(row.token_ids) + len(row.drafts)
        end = row.start + count
        _require(row.start == sequence.num_computed_tokens, f"{sequence}: row at {row.start}")
        known = (*sequence.token_ids, *sequence.draft_token_ids)
        _require(row.token_ids + row.drafts == known[row.start : end], f"{sequence}: other tokens")
        _require(len(row.token_ids) >= 1, f"{sequence}: {count} scheduled")
        _require(end <= sequence.capacity, f"{sequence}: {count} tokens have no blocks")
        _require(row.block_table == sequence.block_table, f"{sequence}: another block table")
        _require(
            bool(row.seeds) == (row.start + len(row.token_ids) == sequence.num_tokens),
            f"{sequence}: sampled at the wrong time",
        )
        blocks = set(row.block_table[row.start // size : (end - 1) // size + 1])
        _require(not blocks & written, f"{sequence} writes a block that another writes")
        _require(
            all(scheduler.block_manager.ref_counts[block] == 1 for block in blocks),
            f"{sequence} writes a shared block",
        )
        written |= blocks
    _require(len(output) > 0 or not scheduler.requests, "work is left and the step does none")
    for preemption in output.preemptions:
        victim = scheduler.requests[preemption.request_id]
        if preemption.beneficiary_id is not None:
            beneficiary = scheduler.requests[preemption.beneficiary_id]
            _require(beneficiary.key < victim.key, f"{victim} outranks {beneficiary}")
