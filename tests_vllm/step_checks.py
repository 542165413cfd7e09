"""What holds after every step of the plug-in's scheduler, whatever the load."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from headway.core.cost_model import CostModel, StepFeatures, TimeBudget
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
        self.wanted = {one.request_id: self._wanted(one) for one in self.residents}
        self.num_preemptions = {
            one.request_id: one.num_preemptions for one in scheduler.requests.values()
        }
        #: Evicted between steps.
        self.reset = set(scheduler.reset_preempted_req_ids)
        self.startable = [one for one in scheduler.waiting if _could_start(one)]
        #: Sessions with new input: vLLM admits them before all others.
        self.num_resuming = len(scheduler.kv_holding_waiting) - self.num_idle_sessions

    def __call__(self, output: SchedulerOutput) -> None:
        """Fail if anything that must hold does not."""
        scheduler = self.scheduler
        check_state(scheduler)
        counts = output.num_scheduled_tokens
        self.scheduled = sorted((scheduler.requests[one] for one in counts), key=_key)
        self.victims = [
            scheduler.requests[one]
            for one in set(output.preempted_req_ids or ()) - self.reset
            if one in scheduler.requests
        ]
        resident_ids = self.wanted.keys() - (output.preempted_req_ids or set())
        self.admitted = [one for one in self.scheduled if one.request_id not in resident_ids]
        self.stayed = [one for one in self.scheduled if one.request_id in resident_ids]

        assert scheduler.max_num_scheduled_tokens == self.max_tokens
        assert scheduler.max_num_active_reqs == self.max_active
        assert sum(counts.values()) <= self.max_tokens
        assert len(counts) + self.num_idle_sessions <= self.max_active
        if scheduler.use_v2_model_runner:
            num_rows = len(scheduler.running) + self.num_idle_sessions
            assert num_rows <= scheduler.max_num_running_reqs, "no row for a request"
        if scheduler.lora_config is not None:
            adapters = {one.lora_request for one in self.scheduled} - {None}
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
        """Nobody yields but to somebody who goes before it, and who is in the step."""
        for victim in self.victims:
            key = _key(victim)
            grown = any(_key(one) < key for one in self.stayed)
            displaced = any(one.headway.threshold < key for one in self.admitted)
            assert grown or displaced, f"{victim.request_id}: evicted for nobody"
            if self.num_preemptions[victim.request_id] >= self.config.max_preemptions:
                assert grown, f"{victim.request_id}: evicted too often by waiting requests"

    def _check_riders(self, counts: dict[str, int]) -> None:
        """How much less urgent work is in the step with more urgent work."""
        if not self.scheduled or self.num_resuming:
            return
        riders = [one for one in self.scheduled if _key(one) > self.scheduled[0].headway.threshold]
        if self.config.share == "none":
            assert not riders
        clock = self.scheduler._clock
        if clock is None or self.scheduler.num_spec_tokens:
            return  # with drafts, vLLM pads whoever it admits
        limit_ms = self.config.max_step_ms or math.inf
        if riders:
            limit_ms = min(limit_ms, self.config.share_ms)
        limit_ms = max(limit_ms, TimeBudget.MIN_STEP * clock.cost_model.coefficients.step)
        first = self.scheduled[0]
        if counts[first.request_id] <= self.scheduler.block_size:
            counts = counts | {first.request_id: 1}  # so much it gets, however long that takes
        step_ms = predicted_ms(clock.cost_model, self.scheduled, counts)
        assert step_ms <= limit_ms + 1e-6, f"a step takes {step_ms} ms, limit is {limit_ms} ms"

    def check_greedy(self, counts: dict[str, int]) -> None:
        """With blocks, rows and time for everybody, the step is the top of the ranking.

        Whoever is not in it lacks a slot or tokens, which those that go before it have.
        """
        assert not self.victims
        slots = self.max_active - self.num_idle_sessions
        in_step = set(counts)
        if self.num_resuming or self.is_stopped:
            return
        short = []
        for one in self.residents:
            before = [
                other
                for other in self.residents
                if _key(other) < _key(one)
                and (other.request_id in in_step or not self.wanted[other.request_id])
            ]
            before += [other for other in self.admitted if other.headway.threshold < _key(one)]
            left = self.max_tokens - sum(counts.get(other.request_id, 1) for other in before)
            wanted = self.wanted[one.request_id]
            if one.request_id not in in_step and wanted:
                assert len(before) >= slots or wanted > left, f"{one.request_id}: left out"
            if counts.get(one.request_id, 0) < wanted:
                short.append(one)
        if self.is_paused:
            assert not self.admitted
            return
        for one in self.startable:
            if one.request_id in in_step:
                continue
            before = [
                other
                for other in self.residents
                if _key(other) < one.headway.threshold
                and (other.request_id in in_step or not self.wanted[other.request_id])
            ]
            before += [other for other in self.admitted if _key(other) < _key(one)]
            left = self.max_tokens - sum(counts.get(other.request_id, 1) for other in before)
            is_behind = any(_key(other) < one.headway.threshold for other in short)
            assert len(before) >= slots or left <= 0 or is_behind, f"{one.request_id}: left out"

    def check_progress(self) -> None:
        """Whoever could compute does not wait for nobody; to be called with nothing in flight."""
        if self.is_paused or self.num_idle_sessions >= self.max_active:
            return
        if any(self.wanted.values()) or self.startable:
            assert self.scheduled, "nobody makes progress"


def check_state(scheduler: HeadwaySchedulerMixin) -> None:
    """What holds between any two calls of the scheduler."""
    places = Counter(one.request_id for one in scheduler.running)
    places += Counter(one.request_id for one in scheduler.waiting)
    places += Counter(one.request_id for one in scheduler.kv_holding_waiting)
    assert places == Counter(scheduler.requests.keys()), "a request is lost, or in two places"
    for queue in (scheduler.running, list(scheduler.waiting)):
        assert all(_key(a) < _key(b) for a, b in pairwise(queue)), "not in rank order"
    assert all(one.headway.request is one for one in scheduler.kv_holding_waiting)

    pool = scheduler.kv_cache_manager.block_pool
    held: Counter[int] = Counter()
    for request_id in scheduler.requests:
        for ids in scheduler.kv_cache_manager.get_block_ids(request_id):
            held.update(ids)
    assert pool.get_num_free_blocks() + len(held) == pool.num_gpu_blocks - 1
    assert all(pool.blocks[block].ref_cnt == count for block, count in held.items())


def predicted_ms(model: CostModel, scheduled: list[Request], counts: dict[str, int]) -> float:
    """What the model expects of a step that has just been scheduled."""
    parts = [(counts[one.request_id], one.num_computed_tokens) for one in scheduled]
    decodes = [end - 1 for count, end in parts if count == 1]
    return model.predict_ms(
        StepFeatures(
            sum(count for count, _ in parts if count > 1),
            len(decodes),
            sum(decodes),
            sum(count * (end - count / 2) for count, end in parts if count > 1),
        )
    )


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
