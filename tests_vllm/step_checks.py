"""What holds after every step of the plug-in's scheduler, whatever the load."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from headway.core.time_budget import TimeBudget
from headway.vllm.scheduler import HeadwaySchedulerMixin

_WAITING = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class StepCheck:
    """One step; made before it is scheduled, called with what was scheduled."""

    def __init__(self, scheduler: HeadwaySchedulerMixin) -> None:
        self.scheduler = scheduler
        self.config = scheduler.headway_config
        self.max_tokens = scheduler.max_num_scheduled_tokens
        self.max_active = scheduler.max_num_active_reqs
        self.num_idle_sessions = scheduler.num_waiting_for_streaming_input
        self.is_paused = scheduler.pause_state != PauseState.UNPAUSED
        self.is_stopped = scheduler.pause_state == PauseState.PAUSED_ALL
        self.residents = list(scheduler.running)
        self.wanted = {request.request_id: self._wanted(request) for request in self.residents}
        self.num_preemptions = {
            request.request_id: request.num_preemptions for request in scheduler.requests.values()
        }
        #: Requests of which no token has been generated.
        self.await_first_tokens = {
            request.request_id
            for request in scheduler.requests.values()
            if not request.num_output_tokens and not request.num_output_placeholders
        }
        #: Evicted between steps.
        self.reset = set(scheduler.reset_preempted_req_ids)
        self.startable = [request for request in scheduler.waiting if _could_start(request)]
        #: Sessions with new input: vLLM admits them before all others.
        self.num_resuming = len(scheduler.kv_holding_waiting) - self.num_idle_sessions

    def __call__(self, output: SchedulerOutput) -> None:
        """Fail if anything that must hold does not."""
        scheduler = self.scheduler
        check_state(scheduler)
        counts = output.num_scheduled_tokens
        self.scheduled = sorted((scheduler.requests[request] for request in counts), key=_key)
        self.victims = [
            scheduler.requests[request]
            for request in set(output.preempted_req_ids or ()) - self.reset
            if request in scheduler.requests
        ]
        resident_ids = self.wanted.keys() - (output.preempted_req_ids or set())
        self.admitted = [
            request for request in self.scheduled if request.request_id not in resident_ids
        ]
        self.stayed = [request for request in self.scheduled if request.request_id in resident_ids]

        assert scheduler.max_num_scheduled_tokens == self.max_tokens
        assert scheduler.max_num_active_reqs == self.max_active
        assert sum(counts.values()) <= self.max_tokens
        assert len(counts) + self.num_idle_sessions <= self.max_active
        if scheduler.use_v2_model_runner:
            num_rows = len(scheduler.running) + self.num_idle_sessions
            assert num_rows <= scheduler.max_num_running_reqs, "no row for a request"
        if scheduler.lora_config is not None:
            adapters = {request.lora_request for request in self.scheduled} - {None}
            assert len(adapters) <= scheduler.lora_config.max_loras
        self._check_victims()
        self._check_riders(counts)

    def _wanted(self, request: Request) -> int:
        """Tokens that a resident could compute; 0 = all of its tokens are in flight."""
        placeholders = request.num_output_placeholders
        ends = request.num_computed_tokens + 2 - placeholders
        if placeholders and ends >= request.num_prompt_tokens + request.max_tokens:
            return 0
        wanted = request.num_tokens_with_spec + placeholders - request.num_computed_tokens
        return int(min(wanted, self.scheduler.max_prefill_tokens))

    def _check_victims(self) -> None:
        """A request yields only to a request of the step that goes before it."""
        for victim in self.victims:
            key = _key(victim)
            grown = any(_key(request) < key for request in self.stayed)
            displaced = any(request.headway.threshold < key for request in self.admitted)
            assert grown or displaced, f"{victim.request_id}: evicted for no request"
            limit = self.config.max_preemptions
            if limit is not None and self.num_preemptions[victim.request_id] >= limit:
                assert grown, f"{victim.request_id}: evicted too often by waiting requests"

    def _check_riders(self, counts: dict[str, int]) -> None:
        """How much less urgent work is in the step with more urgent work, and for how long."""
        if not self.scheduled or self.num_resuming:
            return
        first = self.scheduled[0]
        if self.config.share == "none":
            assert all(_key(request) <= first.headway.threshold for request in self.scheduled)
        clock = self.scheduler._clock
        if clock is None or self.scheduler.num_spec_tokens:
            return  # with drafts, vLLM pads every request that it admits
        budget = TimeBudget(clock.cost_model, self.config.slo_table.step_limit_ms)
        placed: list[Request] = []
        barrier: tuple[float, ...] = (math.inf,)
        for request in self._in_order_of_placement():
            name = request.request_id
            assert _key(request) <= barrier, f"{name}: a first token waits for it"
            if placed and _key(request) > min(map(_key, placed)):
                first = min(placed, key=_key)
                if _key(request) > first.headway.threshold:
                    budget.limit_ms = min(budget.limit_ms, self.config.sharing.share_ms)
            count = counts[name]
            limit_ms = self._limit_ms(request, placed, budget)
            before = request.num_computed_tokens - count
            budget.spend(count, before)
            if placed or count > self.scheduler.block_size:  # so much it gets, whatever it takes
                assert budget.spent_ms <= limit_ms + 1e-6, f"{name}: no time for {count} tokens"
            slo = request.headway.slo
            if slo is not None:
                budget.tighten(slo.max_step_ms)
            if self.config.bounds_all_steps and count > 1 and name in self.await_first_tokens:
                barrier = min(barrier, request.headway.threshold)
            placed.append(request)

    def _in_order_of_placement(self) -> list[Request]:
        """The requests of the step; a waiting request has its turn after its equals."""
        admitted = {request.request_id for request in self.admitted}
        return sorted(
            self.scheduled,
            key=lambda request: (
                request.headway.threshold if request.request_id in admitted else _key(request)
            ),
        )

    def _limit_ms(self, request: Request, placed: list[Request], budget: TimeBudget) -> float:
        """What the step may take as far as ``request`` goes, beside the requests before it."""
        slo = request.headway.slo
        awaits = request.request_id in self.await_first_tokens
        if slo is None or slo.ttft_ms is None or not awaits:
            return budget.limit_ms
        above = min(placed, key=_key).headway.slo if placed else None
        if above is not None and above.priority < slo.priority:
            return budget.limit_ms
        return max(budget.limit_ms, request.headway.first_step_ms, budget.floor_ms)

    def check_greedy(self, counts: dict[str, int]) -> None:
        """With blocks, rows and time for all, the step is the top of the ranking.

        A request that is not in it lacks a slot or tokens, which requests before it have.
        """
        assert not self.victims
        slots = self.max_active - self.num_idle_sessions
        in_step = set(counts)
        if self.num_resuming or self.is_stopped:
            return
        short = []
        for request in self.residents:
            before = [
                other
                for other in self.residents
                if _key(other) < _key(request)
                and (other.request_id in in_step or not self.wanted[other.request_id])
            ]
            before += [other for other in self.admitted if other.headway.threshold < _key(request)]
            left = self.max_tokens - sum(counts.get(other.request_id, 1) for other in before)
            wanted = self.wanted[request.request_id]
            if request.request_id not in in_step and wanted:
                assert len(before) >= slots or wanted > left, f"{request.request_id}: left out"
            if counts.get(request.request_id, 0) < wanted:
                short.append(request)
        if self.is_paused:
            assert not self.admitted
            return
        for request in self.startable:
            if request.request_id in in_step:
                continue
            before = [
                other
                for other in self.residents
                if _key(other) < request.headway.threshold
                and (other.request_id in in_step or not self.wanted[other.request_id])
            ]
            before += [other for other in self.admitted if _key(other) < _key(request)]
            left = self.max_tokens - sum(counts.get(other.request_id, 1) for other in before)
            is_behind = any(_key(other) < request.headway.threshold for other in short)
            assert len(before) >= slots or left <= 0 or is_behind, f"{request.request_id}: left out"

    def check_progress(self) -> None:
        """A step computes something if it can; to be called with nothing in flight."""
        if self.is_paused or self.num_idle_sessions >= self.max_active:
            return
        if any(self.wanted.values()) or self.startable:
            assert self.scheduled, "no request makes progress"


def check_state(scheduler: HeadwaySchedulerMixin) -> None:
    """What holds between any two calls of the scheduler."""
    places = Counter(request.request_id for request in scheduler.running)
    places += Counter(request.request_id for request in scheduler.waiting)
    places += Counter(request.request_id for request in scheduler.kv_holding_waiting)
    assert places == Counter(scheduler.requests.keys()), "a request is lost, or in two places"
    for queue in (scheduler.running, list(scheduler.waiting)):
        assert all(_key(a) < _key(b) for a, b in pairwise(queue)), "not in rank order"
    assert all(request.headway.request is request for request in scheduler.kv_holding_waiting)

    pool = scheduler.kv_cache_manager.block_pool
    held: Counter[int] = Counter()
    for request_id in scheduler.requests:
        for ids in scheduler.kv_cache_manager.get_block_ids(request_id):
            held.update(ids)
    assert pool.get_num_free_blocks() + len(held) == pool.num_gpu_blocks - 1
    assert all(pool.blocks[block].ref_cnt == count for block, count in held.items())


def _key(request: Request) -> tuple[float, ...]:
    key: tuple[float, ...] = request.headway.key
    return key


def _could_start(request: Request) -> bool:
    """Whether nothing but the scheduler keeps a waiting request from starting."""
    status = request.status
    if status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        grammar = request.structured_output_request.grammar
        return grammar is not None and not isinstance(grammar, Exception)
    is_drained = not request.num_stale_output_tokens or request.drop_stale_output
    return status in _WAITING and is_drained
