"""What must hold between any two calls of a scheduler; the tests ask after every step."""

from __future__ import annotations

from collections import Counter

from headway.core.request import RequestStatus
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput

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
    _check_progress(scheduler)
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
    keys = [request.key for request in resident]
    _require(keys == sorted(keys), "residents are not sorted by key")
    if waiting:
        _require(
            scheduler.waiting_heap.peek().key == min(request.key for request in waiting),
            "the heap's root is not its smallest",
        )
    queued = [request for request in waiting if request.status is RequestStatus.WAITING]
    queued_tokens = sum(request.num_prompt_tokens for request in queued)
    _require(
        (scheduler.num_queued, scheduler.num_queued_tokens) == (len(queued), queued_tokens),
        f"{scheduler.num_queued} requests of {scheduler.num_queued_tokens} tokens are counted as "
        f"queued, {len(queued)} of {queued_tokens} are",
    )
    running = len(scheduler.running_queue)
    _require(running <= scheduler.config.max_num_seqs, f"{running} requests are running")


def _check_progress(scheduler: PriorityScheduler) -> None:
    size = scheduler.config.block_size
    for request in scheduler.requests.values():
        held = len(request.block_table) if request.status in _RESIDENT else 0
        computed = request.num_computed_tokens
        _require(0 <= computed < request.num_tokens, f"{request}: computed out of range")
        _require(computed <= held * size, f"{request}: computed beyond its {held} blocks")
        _require(request.num_tokens < request.token_limit, f"{request}: should have finished")
        _require(request.capacity <= held * size or not held, f"{request}: capacity not held")
        if request.swap_table:
            covered = (held + len(request.swap_table)) * size
            _require(computed == held * size, f"{request}: a hole before its swapped blocks")
            _require(computed < request.num_swapped_tokens <= covered, f"{request}: swapped tokens")
        _require(
            (request.status is RequestStatus.SWAPPED) == (bool(request.swap_table) and not held),
            f"{request}: status does not fit its swap table",
        )


def _check_blocks(scheduler: PriorityScheduler) -> None:
    """free + held + cached = num_blocks, and reference counts match the tables."""
    manager = scheduler.block_manager
    tables = {request.request_id: request.block_table for request in scheduler.resident}
    _require(tables == manager.tables, "block tables differ from the residents'")
    for request in scheduler.resident:
        _require(
            request.block_table is manager.tables[request.request_id],
            f"{request}: its table is a copy",
        )
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
    used = [slot for request in scheduler.requests.values() for slot in request.swap_table]
    _require(len(set(used)) == len(used), "two requests share a swap slot")
    total = scheduler.config.num_swap_blocks
    _require(len(used) + scheduler.kv_cache.num_free_swap_slots == total, "a swap slot is lost")


def check_output(scheduler: PriorityScheduler, output: SchedulerOutput) -> None:
    """Check a step just scheduled, before ``update_from_output``. O(requests + blocks).

    Raises:
        InvariantViolation: over a budget, out of rank order, into somebody else's block, no
            progress, or a victim that outranks its beneficiary.
    """
    check(scheduler)
    config, counts = scheduler.config, output.num_scheduled_tokens
    _require(len(output) <= config.max_num_seqs, f"{len(output)} slots used")
    _require(sum(counts) == output.num_batched_tokens, "num_batched_tokens is no sum")
    _require(output.num_batched_tokens <= config.max_num_batched_tokens, "over the token budget")
    keys = [request.key for request in output]
    _require(keys == sorted(keys), "the step is out of rank order")
    _require(list(output) == scheduler.running_queue, "the step is not who is running")
    written: set[int] = set()
    for request, count in zip(output, counts, strict=True):
        end = request.num_computed_tokens + count
        _require(count >= 1 and end <= request.num_tokens, f"{request}: {count} scheduled")
        _require(end <= request.capacity, f"{request}: {count} tokens have no blocks")
        first = request.num_computed_tokens // config.block_size
        last = (end - 1) // config.block_size
        blocks = set(request.block_table[first : last + 1])
        _require(not blocks & written, f"{request} writes a block that another writes")
        _require(
            all(scheduler.block_manager.ref_counts[block] == 1 for block in blocks),
            f"{request} writes a shared block",
        )
        written |= blocks
    _require(len(output) > 0 or not scheduler.requests, "work is left and the step does none")
    for preemption in output.preemptions:
        victim = scheduler.requests[preemption.request_id]
        if preemption.beneficiary_id is not None:
            beneficiary = scheduler.requests[preemption.beneficiary_id]
            _require(beneficiary.key < victim.key, f"{victim} outranks {beneficiary}")
