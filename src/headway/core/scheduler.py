"""Every step ranks all unfinished requests by one key and fills the step from the top.

Whoever is not reached yields in the cheapest way that makes room. Priority, preemption,
pausing and resuming, first come first served, ageing and deadlines are consequences of the
ranking and of one reclaim ladder; there is no running phase and waiting phase with rules of
their own.

Two collections, each unfinished request in exactly one:

- ``resident``: has blocks in the pool (RUNNING or PAUSED), sorted by key;
- ``waiting_heap``: has none (WAITING, PREEMPTED or SWAPPED), a heap by key.

A step is one merge of the two from the top, under four budgets: slots, tokens, blocks, time.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from headway.core.block_manager import BlockStatistics
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel, StepFeatures, TimeBudget
from headway.core.errors import DuplicateRequest, InvalidRequest, RequestTooLong, UnknownRequest
from headway.core.kv_cache_manager import KVCacheManager
from headway.core.policy import NOBODY, Key, SchedulingPolicy
from headway.core.priority_queue import PriorityQueue
from headway.core.ranking import first_displaceable, fits_slots, rank_of
from headway.core.reclaim import plan_victims
from headway.core.request import Request, RequestStatus, check_priority
from headway.core.scheduler_output import Preemption, SchedulerOutput
from headway.core.slo import SLOTable
from headway.core.time_sharing import NO_SHARES, share_time

__all__ = ["PriorityScheduler", "SchedulerStatistics"]

_KEY = attrgetter("key")
_RUNNING, _PAUSED = RequestStatus.RUNNING, RequestStatus.PAUSED
#: Modes that take a victim's blocks only as far as needed, from its end.
_TAIL_MODES = frozenset({PreemptionMode.TAIL, PreemptionMode.AUTO})
#: Modes in which a waiting request gets no blocks from residents.
_BLOCKS_STAY = frozenset({PreemptionMode.NONE, PreemptionMode.PAUSE})


class SchedulerStatistics(NamedTuple):
    """A snapshot for metrics and live views; counts are of requests unless named otherwise."""

    num_waiting: int
    num_running: int
    num_paused: int
    num_swapped: int
    num_preempted: int
    num_finished: int
    #: Times a request yielded, by ``PreemptionMode.value``.
    preemptions: dict[str, int]
    #: Tokens computed again after their blocks had been taken.
    num_recomputed_tokens: int
    blocks: BlockStatistics
    num_swap_blocks_used: int


class PriorityScheduler:
    """Decides, step by step, which requests compute how many tokens, and who yields.

    It reads no clock and does no I/O: times are arguments (seconds, on any clock that does not
    run backwards; leave them out and time stands still). One thread at a time.

    Args:
        max_batch_size: slots; the short way to ``SchedulerConfig(max_num_seqs=…)``.
        config: all settings.
        cost_model: predicts step times; a fresh one by default.

    ::

        s = PriorityScheduler(max_batch_size=4)
        s.add_request(PriorityRequest("a", priority=1, prompt="…", max_tokens=8))
        batch = s.schedule()                      # run it, then:
        s.update_from_output(batch, [42])
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        config: SchedulerConfig | None = None,
        cost_model: CostModel | None = None,
    ) -> None:
        config = config or SchedulerConfig()
        if max_batch_size is not None:
            config = replace(config, max_num_seqs=max_batch_size)
        assert isinstance(config.preemption_mode, PreemptionMode)
        assert isinstance(config.policy, SchedulingPolicy)
        #: The settings; never change.
        self.config = config
        #: Maps requests to keys.
        self.policy: SchedulingPolicy = config.policy
        #: How blocks are taken.
        self.mode: PreemptionMode = config.preemption_mode
        #: Predicts what a step and a swap cost.
        self.cost_model = cost_model or CostModel()
        #: The residents' blocks and what is in them.
        self.kv_cache = KVCacheManager(config, self.cost_model)
        #: Owns the block tables; a request has one exactly while it is resident.
        self.block_manager = self.kv_cache.block_manager
        #: Unfinished requests without blocks in the pool, by key.
        self.waiting_heap: PriorityQueue[Request] = PriorityQueue()
        #: Unfinished requests with blocks in the pool, sorted by key.
        self.resident: list[Request] = []
        #: Every unfinished request by id: those of ``waiting_heap`` and of ``resident``.
        self.requests: dict[str, Request] = {}
        #: What each class of requests has been promised.
        self.slos = SLOTable(config.slos)
        #: Requests that have never been in a step, and the tokens of their prompts.
        self.num_queued = self.num_queued_tokens = 0
        #: What no step may be predicted to take (ms); infinite = no bound.
        self._step_limit_ms = config.step_limit_ms
        #: Whether steps are bounded in time at all.
        self._is_timed = bool(config.slos) or self._step_limit_ms < math.inf
        #: Whether somebody in the last step would have computed more, had there been time.
        self._is_short_of_time = False
        #: Steps scheduled while steps are bounded in time.
        self._num_timed_steps = 0
        #: The longest that a request may get, in tokens.
        self._max_request_tokens = config.max_request_tokens
        #: The latest time it was told; never decreases.
        self.now = 0.0
        self._num_arrivals = 0
        self._num_finished = 0
        self._num_recomputed_tokens = 0
        self._preemptions: Counter[PreemptionMode] = Counter()

    # ------------------------------------------------------------------ requests in and out

    def add_request(self, request: Request, now: float | None = None) -> None:
        """Let a request wait for its turn. O(log n).

        Its arrival is ``request.arrival_time`` where the caller has set one, else ``now``.

        Raises:
            DuplicateRequest: an unfinished request has its id.
            RequestTooLong: the prompt leaves no room for one token in the context or the pool.
            InvalidRequest: it was added before.
        """
        now = self._advance(now)
        self._check_fresh(request)
        self.check_length(request)
        if request.arrival_time is None:
            request.arrival_time = now
        request.transitions.append((now, RequestStatus.WAITING))
        self._enrol(request)
        self.waiting_heap.push(request.request_id, request.key, request)
        self.num_queued += 1
        self.num_queued_tokens += request.num_prompt_tokens

    def fork(self, request_id: str, child: Request, now: float | None = None) -> None:
        """Add ``child``, which shares the blocks of a resident request's computed tokens.

        Nothing is computed twice: the child continues where the parent is (for ``n > 1`` and
        beam search). A block that both would write is copied when the first of them does.

        Args:
            request_id: the parent.
            child: fresh; its tokens must begin with those the parent has computed.

        Raises:
            UnknownRequest: no unfinished request has this id.
            InvalidRequest: the parent holds no blocks, or the child's tokens differ.
        """
        now = self._advance(now)
        parent = self._request(request_id)
        computed = parent.num_computed_tokens
        if parent.request_id not in self.block_manager.tables or not computed:
            raise InvalidRequest(f"request {request_id!r} has computed nothing to share")
        shares = child.token_ids[:computed] == parent.token_ids[:computed]
        if not shares or child.num_tokens <= computed:
            raise InvalidRequest(
                f"request {child.request_id!r} does not continue the {computed} computed tokens "
                f"of {request_id!r}"
            )
        if self.config.deterministic and child.num_prompt_tokens != parent.num_prompt_tokens:
            raise InvalidRequest(
                f"request {child.request_id!r} has {child.num_prompt_tokens} prompt tokens, must "
                f"have the {parent.num_prompt_tokens} of {request_id!r} (deterministic)"
            )
        self._check_fresh(child)
        self.check_length(child)
        if child.num_output_tokens >= child.max_tokens:
            raise InvalidRequest(
                f"request {child.request_id!r} starts with {child.num_output_tokens} generated "
                f"tokens, max_tokens is {child.max_tokens}"
            )
        child.arrival_time = parent.arrival_time
        self._enrol(child)
        self.kv_cache.fork(parent, child)
        child.transition(_PAUSED, now)
        self._insert_resident(child)

    def abort(self, request_id: str, now: float | None = None) -> Request:
        """End a request at once, wherever it is. O(log n) if it waits.

        Raises:
            UnknownRequest: no unfinished request has this id.
        """
        return self.finish(request_id, RequestStatus.FINISHED_ABORTED, now)

    def finish(self, request_id: str, status: RequestStatus, now: float | None = None) -> Request:
        """End a request with a finished ``status``; what it held is free at once.

        Raises:
            UnknownRequest: no unfinished request has this id.
        """
        assert status.is_finished
        now = self._advance(now)
        request = self._request(request_id)
        self._finish(request, status, now)
        return request

    def preempt(self, request_id: str, now: float | None = None) -> None:
        """Send a resident request back to the waiting heap, its tokens kept.

        Its full blocks stay findable, so what is not overwritten meanwhile is not recomputed.

        Raises:
            UnknownRequest: no unfinished request has this id.
            InvalidRequest: it holds no blocks.
        """
        now = self._advance(now)
        request = self._request(request_id)
        if request_id not in self.block_manager.tables:
            raise InvalidRequest(f"request {request_id!r} is {request.status.value}, not resident")
        self._evict(request, 0, PreemptionMode.RECOMPUTE, None, SchedulerOutput(), now)

    def set_priority(self, request_id: str, priority: int) -> None:
        """Change how urgent a request is, while it waits or runs. O(log n), O(n) if resident.

        Raises:
            UnknownRequest: no unfinished request has this id.
            InvalidRequest: the priority is no int64.
        """
        request = self._request(request_id)
        check_priority(request_id, priority)
        is_resident = request_id in self.block_manager.tables
        if is_resident:
            self._remove_resident(request)
        request.priority = priority
        self._rank(request)
        if is_resident:
            self._insert_resident(request)
        else:
            self.waiting_heap.rekey(request_id, request.key)

    # ------------------------------------------------------------------ a step

    def schedule(self, now: float | None = None) -> SchedulerOutput:
        """Fill one step from the top of the ranking.

        O(residents + admitted·log waiting + blocks moved). Calling it again without
        ``update_from_output`` in between chooses the same requests again; block operations
        are told once, so no output may be dropped.
        """
        now = self._advance(now)
        self.kv_cache.begin_step()
        output = SchedulerOutput()
        requests, counts = output.requests, output.num_scheduled_tokens
        resident, waiting = self.resident, self.waiting_heap
        slots = self.config.max_num_seqs
        budget = self.config.max_num_batched_tokens
        is_timed = self._is_timed
        time = TimeBudget(self.cost_model, self._step_limit_ms, self.config.block_size)
        shares = self._share_time() if self._is_short_of_time else NO_SHARES
        self._is_short_of_time = False
        self._num_timed_steps += is_timed
        prefill_tokens = context_tokens = 0
        prefill_context = 0.0
        # Nobody ranked behind it is in this step.
        barrier: Key | None = None
        running = _RUNNING
        # The next waiting request, and its rank among the residents. None once one of those
        # above could not get what it needs: nobody ranked below may be admitted to that.
        head = waiting.peek() if waiting else None
        head_index = self._rank_among_residents(head)
        index = 0
        while slots and budget:
            if index == head_index:
                if head is None or (barrier is not None and head.key > barrier):
                    break
                has_time = not requests or time.allows(
                    head.num_tokens, self._time_limit(head, time)
                )
                if has_time and self._admit(head, index, slots, output, now):
                    head = waiting.peek() if waiting else None
                    head_index = self._rank_among_residents(head)
                else:
                    head, head_index = None, len(resident)
                    continue
            request = resident[index]
            if barrier is not None and request.key > barrier:
                break
            index += 1
            num_tokens = len(request.token_ids)
            if num_tokens > request.capacity:
                if not self._extend(request, index, output, now):
                    self._pause(request, output, now)
                    head, head_index = None, len(resident)
                    continue
                if output.preemptions:  # a victim may be the first of those who wait now
                    head = waiting.peek() if head is not None else None
                    head_index = self._rank_among_residents(head)
            computed = request.num_computed_tokens
            count = num_tokens - computed
            if count > 1 or is_timed:
                count = self._fit(request, count, budget, time, shares, is_first=not requests)
                if not count:
                    self._pause(request, output, now)
                    head, head_index = None, len(resident)
                    continue
            if count > 1:
                prefill_tokens += count
                prefill_context += count * (computed + count / 2)
                if is_timed and barrier is None and request.first_token_time is None:
                    # A first token does not wait for those whom it outranks.
                    barrier = self.policy.threshold(request)
            else:
                context_tokens += computed
            if request.status is not running:
                self._resume(request, now)
            requests.append(request)
            counts.append(count)
            slots -= 1
            budget -= count
        for request in resident[index:]:
            self._pause(request, output, now)
        output.num_batched_tokens = self.config.max_num_batched_tokens - budget
        output.features = StepFeatures(
            prefill_tokens,
            output.num_batched_tokens - prefill_tokens,
            context_tokens,
            prefill_context,
        )
        output.predicted_ms = self.cost_model.predict_ms(output.features)
        return output

    def update_from_output(
        self,
        output: SchedulerOutput,
        sampled_token_ids: Sequence[int | None],
        now: float | None = None,
    ) -> list[Request]:
        """Take in what the executor computed; returns the requests that this finished.

        Args:
            output: what ``schedule`` returned.
            sampled_token_ids: parallel to it; None where nothing was sampled. Requests that
                were aborted or preempted since are passed over.
        """
        now = self._advance(now)
        block_size = self.config.block_size
        running = _RUNNING
        finished = []
        for request, count, token_id in zip(
            output.requests, output.num_scheduled_tokens, sampled_token_ids, strict=True
        ):
            if request.status is not running:
                continue
            computed = request.num_computed_tokens
            if computed < request.peak_computed_tokens:
                self._count_recomputed(request, count)
            computed += count
            request.num_computed_tokens = computed
            if count > 1 or not computed % block_size:
                self.kv_cache.commit(
                    request, (computed - count) // block_size, computed // block_size
                )
            token_ids = request.token_ids
            if token_id is None:
                assert computed < len(token_ids), "a token is due, and none was sampled"
                continue
            assert computed == len(token_ids), "a token was sampled before its time"
            token_ids.append(token_id)
            if request.first_token_time is None:
                request.first_token_time = now
            if token_id in request.stop_token_ids:
                self._finish(request, RequestStatus.FINISHED_STOPPED, now)
                finished.append(request)
            elif computed + 1 >= request.token_limit:
                self._finish(request, RequestStatus.FINISHED_LENGTH_CAPPED, now)
                finished.append(request)
        return finished

    # ------------------------------------------------------------------ reading

    @property
    def running_queue(self) -> list[Request]:
        """The requests of the last step that are unfinished, most urgent first. O(residents)."""
        return [request for request in self.resident if request.status is _RUNNING]

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether another step would do something."""
        return bool(self.requests)

    def statistics(self) -> SchedulerStatistics:
        """Counts for metrics. O(requests)."""
        by_status = Counter(request.status for request in self.requests.values())
        return SchedulerStatistics(
            num_waiting=by_status[RequestStatus.WAITING],
            num_running=by_status[RequestStatus.RUNNING],
            num_paused=by_status[RequestStatus.PAUSED],
            num_swapped=by_status[RequestStatus.SWAPPED],
            num_preempted=by_status[RequestStatus.PREEMPTED],
            num_finished=self._num_finished,
            preemptions={mode.value: count for mode, count in self._preemptions.items()},
            num_recomputed_tokens=self._num_recomputed_tokens,
            blocks=self.block_manager.statistics(),
            num_swap_blocks_used=self.config.num_swap_blocks - self.kv_cache.num_free_swap_slots,
        )

    # ------------------------------------------------------------------ the merge's parts

    def _admit(
        self, request: Request, index: int, slots: int, output: SchedulerOutput, now: float
    ) -> bool:
        """Move the head of the waiting heap to its rank, ``index``, among the residents.

        It may use the slots and blocks of exactly those residents that it may displace, and
        is admitted only if its whole need is met; otherwise nothing changes.
        """
        resident = self.resident
        if not fits_slots(request, resident, index, slots):
            return False
        manager = self.block_manager
        request.block_table = manager.allocate(request.request_id)
        resident.insert(index, request)
        if self.mode in _BLOCKS_STAY:
            first_victim = len(resident)
        else:
            first_victim = first_displaceable(request, resident, index + 1)
        if not self._extend(request, first_victim, output, now):
            del resident[index]
            manager.free(request.request_id)
            return False
        self.waiting_heap.remove(request.request_id)
        if request.status is RequestStatus.WAITING:
            self._leave_queue(request)
        if request.first_scheduled_time is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        return True

    def _extend(
        self, request: Request, first_victim: int, output: SchedulerOutput, now: float
    ) -> bool:
        """Give a resident request blocks for all its tokens, at the cost of ``first_victim`` on.

        Blocks come, in this order, from the prefix cache (with their contents), the free ones,
        the cached ones nobody references, and the residents from the last-ranked upwards. If
        the whole need cannot be met, nothing changes and the answer is False.
        """
        if self.kv_cache.append_block(request):
            return True
        claim = self.kv_cache.claim(request)
        shortage = claim.num_blocks - self.block_manager.num_available
        if shortage > 0:
            plan = plan_victims(
                self.resident[first_victim:],
                shortage,
                self.block_manager.ref_counts,
                claim.shared,
                takes_all=self.mode not in _TAIL_MODES,
            )
            if not plan:
                self.kv_cache.withdraw(claim)
                return False
            for victim, num_kept in plan:
                self._evict(victim, num_kept, self.mode, request, output, now)
        self.kv_cache.grant(request, claim, output)
        return True

    def _fit(
        self,
        request: Request,
        count: int,
        budget: int,
        time: TimeBudget,
        shares: Mapping[str, int],
        is_first: bool,
    ) -> int:
        """How many of ``count`` uncomputed tokens fit the token and time budgets; spends time."""
        count = min(self._wanted(request, count), budget)
        if self._is_timed:
            computed = request.num_computed_tokens
            share = min(count, shares.get(request.request_id, count))
            if share:
                limit_ms = self._time_limit(request, time)
                share = time.affordable(share, computed, is_first, limit_ms)
            if share < count:
                self._is_short_of_time = True
                count = share
            if count:
                time.spend(count, computed)
                request.last_step = self._num_timed_steps
                if request.slo is not None:
                    time.tighten(request.slo.max_step_ms)
        return count

    def _wanted(self, request: Request, count: int) -> int:
        """How many of ``count`` uncomputed tokens a step may compute."""
        if self.config.deterministic:
            left = request.num_prompt_tokens - request.num_computed_tokens
            # A generated token is replayed as it was computed first: one a step.
            return min(count, left) if left > 0 else 1
        return count

    def _time_limit(self, request: Request, time: TimeBudget) -> float:
        """What the step may take as far as ``request`` goes (ms).

        One that has a TTFT target and no token yet is not cut by a bound that is meant for those
        beside it: half of its target has been kept for its own step.
        """
        slo = request.slo
        if slo is not None and slo.ttft_ms is not None and request.first_token_time is None:
            return max(time.max_ms, slo.ttft_ms / 2)
        return time.limit_ms

    def _share_time(self) -> Mapping[str, int]:
        """Shares of the next step's time for those among whom it runs out. O(residents).

        Those above them get what they want; for those below there is nothing left.
        """
        resident = self.resident
        max_tokens = self.config.max_num_batched_tokens
        wants = [
            min(max_tokens, self._wanted(one, one.num_tokens - one.num_computed_tokens))
            for one in resident
        ]
        time = TimeBudget(self.cost_model, self._step_limit_ms, self.config.block_size)
        spent_before = []
        for index, request in enumerate(resident):
            spent_before.append(time.spent_ms)
            if request.slo is not None:
                time.tighten(request.slo.max_step_ms)
            computed = request.num_computed_tokens
            if time.affordable(wants[index], computed, False) < wants[index]:
                break
            time.spend(wants[index], computed)
        else:
            return NO_SHARES
        above = bisect_left(resident, request.key, key=self.policy.threshold)
        below = bisect_right(resident, self.policy.threshold(request), key=_KEY)
        time.spent_ms = spent_before[above]
        equals = list(zip(resident[above:below], wants[above:below], strict=True))
        return share_time(equals, time, has_first=not above)

    def _pause(self, request: Request, output: SchedulerOutput, now: float) -> None:
        if request.status is _RUNNING:
            request.transition(_PAUSED, now)
            self._preemptions[PreemptionMode.PAUSE] += 1
            output.preemptions.append(Preemption(request.request_id, PreemptionMode.PAUSE))

    def _resume(self, request: Request, now: float) -> None:
        request.transition(_RUNNING, now)
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now

    # ------------------------------------------------------------------ the reclaim ladder

    def _evict(
        self,
        victim: Request,
        num_kept: int,
        mode: PreemptionMode,
        beneficiary: Request | None,
        output: SchedulerOutput,
        now: float,
    ) -> None:
        """Cut a resident's table to ``num_kept`` blocks; without any, it leaves the residents."""
        lost = self.kv_cache.cut(victim, num_kept, mode, output)
        victim.num_preemptions += 1
        if num_kept:
            yielded = PreemptionMode.SWAP if lost.is_swapped else PreemptionMode.TAIL
            if victim.status is _RUNNING:
                victim.transition(_PAUSED, now)  # until it has its tail again
        else:
            self._remove_resident(victim)
            self.block_manager.free(victim.request_id)
            if lost.is_swapped:
                yielded, status = PreemptionMode.SWAP, RequestStatus.SWAPPED
            else:
                yielded, status = PreemptionMode.RECOMPUTE, RequestStatus.PREEMPTED
            victim.transition(status, now)
            self.waiting_heap.push(victim.request_id, victim.key, victim)
        self._preemptions[yielded] += 1
        beneficiary_id = None if beneficiary is None else beneficiary.request_id
        output.preemptions.append(
            Preemption(victim.request_id, yielded, beneficiary_id, lost.num_blocks, lost.num_tokens)
        )

    # ------------------------------------------------------------------ small parts

    def _advance(self, now: float | None) -> float:
        if now is not None and now > self.now:
            self.now = now
        return self.now

    def _request(self, request_id: str) -> Request:
        try:
            return self.requests[request_id]
        except KeyError:
            raise UnknownRequest(f"no unfinished request has the id {request_id!r}") from None

    def _check_fresh(self, request: Request) -> None:
        if request.request_id in self.requests:
            raise DuplicateRequest(f"request id {request.request_id!r} is in use")
        if request.status is not RequestStatus.WAITING or request.sequence >= 0:
            raise InvalidRequest(
                f"request {request.request_id!r} is {request.status.value}; add a fresh one"
            )

    def check_length(self, request: Request) -> None:
        """Refuse what could never be served; reads settings only, so any thread may ask.

        Raises:
            RequestTooLong: the prompt leaves no room for one token in the context or the pool.
        """
        limit = self._max_request_tokens
        if len(request.token_ids) >= limit:
            is_pool = limit == self.config.num_blocks * self.config.block_size
            what = "the whole KV pool holds" if is_pool else "the context is"
            raise RequestTooLong(
                f"prompt of request {request.request_id!r} has {request.num_tokens} tokens, {what} "
                f"{limit} tokens and one must be left to generate"
            )

    def _enrol(self, request: Request) -> None:
        params = request.sampling_params
        request.sequence = self._num_arrivals
        self._num_arrivals += 1
        limit = request.num_prompt_tokens + params.max_tokens
        request.token_limit = min(limit, self._max_request_tokens)
        if params.ignore_eos:
            request.stop_token_ids = params.stop_token_ids
        elif params.stop_token_ids:
            request.stop_token_ids = params.stop_token_ids | self.config.eos_token_ids
        else:
            request.stop_token_ids = self.config.eos_token_ids
        self._rank(request)
        self.requests[request.request_id] = request

    def _leave_queue(self, request: Request) -> None:
        self.num_queued -= 1
        self.num_queued_tokens -= request.num_prompt_tokens

    def _rank(self, request: Request) -> None:
        request.key = (*self.policy.key(request), request.sequence)
        displaces = self.mode is not PreemptionMode.NONE
        request.threshold = self.policy.threshold(request) if displaces else NOBODY
        request.slo = self.slos.of(request.priority)

    def _rank_among_residents(self, request: Request | None) -> int:
        """How many residents go before ``request``; all of them for None. O(log residents)."""
        if request is None:
            return len(self.resident)
        return rank_of(request, self.resident)

    def _insert_resident(self, request: Request) -> None:
        self.resident.insert(self._rank_among_residents(request), request)

    def _remove_resident(self, request: Request) -> None:
        position = self._rank_among_residents(request)
        assert self.resident[position] is request
        del self.resident[position]

    def _finish(self, request: Request, status: RequestStatus, now: float) -> None:
        request_id = request.request_id
        if request_id in self.block_manager.tables:
            self._remove_resident(request)
            self.block_manager.free(request_id)
            request.block_table = []
        else:
            self.waiting_heap.remove(request_id)
            if request.status is RequestStatus.WAITING:
                self._leave_queue(request)
        self.kv_cache.drop_swapped(request)
        request.transition(status, now)
        request.finish_time = now
        del self.requests[request_id]
        self._num_finished += 1

    def _count_recomputed(self, request: Request, count: int) -> None:
        again = min(count, request.peak_computed_tokens - request.num_computed_tokens)
        request.num_recomputed_tokens += again
        self._num_recomputed_tokens += again
