"""vLLM's scheduler with Headway's decisions: a mixin, and the two classes vLLM may be given.

vLLM's ``schedule`` is left to do what it does; the mixin decides what it sees. Before the call, it
ranks, plans the step, evicts those who must yield their blocks, and takes out of ``running`` those
who sit the step out (a request that is not scheduled keeps its blocks, and nothing is computed
again); after it, they are put back. What holds between any two calls:

- ``running`` is sorted by rank; every request in it or in a waiting queue has a rank;
- ``waiting`` is an indexed heap by rank;
- vLLM's own policy is FCFS: when a running request cannot grow, vLLM preempts the last of
  ``running``, which is the last-ranked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from headway.core.policy import Key
from headway.vllm.config import HeadwayConfig
from headway.vllm.kv_blocks import KVBlocks
from headway.vllm.ranked_request import RankedRequest, rank
from headway.vllm.request_queue import RankedRequestQueue
from headway.vllm.step_clock import StepClock
from headway.vllm.step_plan import StepPlan

__all__ = ["HeadwayScheduler", "HeadwaySchedulerMixin", "HeadwaySyncScheduler"]

# Under vLLM's name, whose handlers it has: others of this process show warnings only.
logger = init_logger(f"vllm.{__name__}")

#: Seconds for which somebody urgent is expected after the last one came.
_EXPECTATION_S = 60.0

_RANKED = attrgetter("headway")
_KEY = attrgetter("headway.key")

# What the mixin calls ``super()`` is vLLM's class, which comes after it.
_AnyScheduler: Any = object


class HeadwaySchedulerMixin(_AnyScheduler):  # type: ignore[misc]
    """Put before ``Scheduler`` or a subclass of it; settings are those of ``HeadwayConfig``."""

    running: list[Request]
    max_num_active_reqs: int
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.headway_config = HeadwayConfig.parse(self.vllm_config.additional_config)
        #: What a step may take that less urgent work rides along in (ms).
        self.share_ms = self.headway_config.share_ms
        self._num_ranked = 0
        #: Until when (s, monotonic) somebody more urgent than others is expected.
        self._expects_until = -math.inf
        #: Why vLLM's own behaviour is left as it is; None = it is not.
        self.headway_is_off: str | None = self._reason_to_be_off()
        if self.headway_is_off is not None:
            logger.warning("Headway leaves scheduling to vLLM: %s.", self.headway_is_off)
            return
        self.policy = SchedulingPolicy.FCFS
        self.waiting = RankedRequestQueue()
        self._headway_policy = self.headway_config.make_policy()
        self._blocks = KVBlocks(self)
        self._clock: StepClock | None = None
        if self.headway_config.is_timed:
            max_ms = self.headway_config.max_step_ms or float("inf")
            self._clock = StepClock(max_ms, self.block_size)
        logger.info("Headway schedules: %s.", self.headway_config)

    # ------------------------------------------------------------------ limits

    def _reason_to_be_off(self) -> str | None:
        if self.connector is not None:
            return "a KV connector moves blocks, which it does not follow"
        if self.ec_connector is not None:
            return "an encoder cache connector moves encoder outputs, which it does not follow"
        if self.is_encoder_decoder:
            return "the model is an encoder-decoder"
        if self.need_mamba_block_aligned_split:
            return "Mamba states are kept at block boundaries, which the chunks it cuts would miss"
        if not self.num_sampled_tokens_per_step:
            return "the model generates no tokens one by one"
        return None

    @property
    def max_num_rows(self) -> int:
        """How many requests may be running or paused at a time.

        vLLM's newer model runner has one row for each, in the step or not; the older one only has
        rows for those in the step.
        """
        return self.max_num_running_reqs if self.use_v2_model_runner else 2**62

    @property
    def max_prefill_tokens(self) -> int:
        """Tokens that one request may compute in a step."""
        config = self.scheduler_config
        if config.long_prefill_token_threshold and not self.adaptive_long_prefill_threshold:
            return int(min(config.long_prefill_token_threshold, self.max_num_scheduled_tokens))
        return int(self.max_num_scheduled_tokens)

    @property
    def prefill_allowance(self) -> int:
        """Tokens of this step that prompts may have that nobody present has to wait for."""
        share = self.headway_config.prefill_share if self._expects_urgent() else 1.0
        return max(int(self.block_size), int(share * self.max_num_scheduled_tokens))

    def _expects_urgent(self) -> bool:
        """Whether somebody more urgent than others is there, or was a short time ago."""
        running = self.running
        if running and running[0].headway.threshold < running[-1].headway.key:
            self._expects_until = time.monotonic() + _EXPECTATION_S
            return True
        return time.monotonic() < self._expects_until

    # ------------------------------------------------------------------ requests in

    def _enqueue_waiting_request(self, request: Request) -> None:
        # New requests, and sessions with new input: their arrival is that of the input.
        if self.headway_is_off is None:
            rank(request, self._headway_policy, self._num_ranked)
            self._num_ranked += 1
        super()._enqueue_waiting_request(request)

    def _waiting_heads(self, throttle_prefills: bool) -> Iterator[Request]:
        """Waiting requests that could start in this step, in rank order."""
        defers_prefills = throttle_prefills and not self.prefill_capacity_bound
        if defers_prefills or self._pause_state != PauseState.UNPAUSED:
            return
        if len(self.kv_holding_waiting) > self.num_waiting_for_streaming_input:
            # vLLM admits those first; whom to displace for them is not ours to say.
            logger.warning_once(
                "Headway displaces nobody while waiting requests hold KV blocks (streaming input)."
            )
            return
        for request in self.waiting:
            is_blocked = self._is_blocked_waiting_status(request.status)
            if is_blocked and not self._handle_blocked_waiting_request(request):
                continue
            if request.num_stale_output_tokens and not request.drop_stale_output:
                continue  # vLLM waits for its output in flight
            yield request

    # ------------------------------------------------------------------ a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step of vLLM's, of those whom the ranking puts into it."""
        if self.headway_is_off is not None:
            return super().schedule(throttle_prefills)
        if self._has_to_choose():
            output = self._schedule_as_planned(throttle_prefills)
        else:
            num_running = len(self.running)
            output = super().schedule(throttle_prefills)
            if len(self.running) > num_running:
                self.running.sort(key=_KEY)
        if self._clock is not None:
            self._clock.begin(output, self.requests, time.monotonic())
        return output

    def _has_to_choose(self) -> bool:
        """Whether vLLM, left alone, could do other than the ranking says. O(1)."""
        running, config = self.running, self.headway_config
        head: RankedRequest | None = self.waiting.peek_request().headway if self.waiting else None
        num_slots = self.max_num_active_reqs - self.num_waiting_for_streaming_input - len(running)
        if not running:
            return config.max_step_ms is not None or (config.share != "all" and head is not None)
        last: Key = running[-1].headway.key
        return (
            config.max_step_ms is not None
            or self.lora_config is not None
            or num_slots < 0
            or (head is not None and head.threshold < last)
            or (
                config.share != "all"
                and ((head is not None and num_slots) or running[0].headway.threshold < last)
            )
            or (bool(self._inflight_prefills or self.waiting) and self._expects_urgent())
            or not self._blocks.suffice(len(running), self.max_num_scheduled_tokens)
        )

    def _schedule_as_planned(self, throttle_prefills: bool) -> SchedulerOutput:
        clock = self._clock
        plan = StepPlan(self, self._blocks, None if clock is None else clock.budget())
        residents = list(map(_RANKED, self.running))
        if self._pause_state == PauseState.PAUSED_ALL:
            plan.paused = residents
        else:
            plan.fill(residents, self._waiting_heads(throttle_prefills))
        for victim in plan.evicted:
            self._evict(victim.request)
        paused = [one.request for one in plan.paused]
        for request in paused:
            # Drafts for its next token: by the time it goes on, the worker has lost them.
            request.spec_token_ids = []
        self.running = [one.request for one in plan.running]
        num_active, num_tokens = self.max_num_active_reqs, self.max_num_scheduled_tokens
        in_step = len(self.running) + plan.num_admitted
        if in_step:
            in_step += len(self.kv_holding_waiting)
            self.max_num_active_reqs = min(num_active, in_step)
            # vLLM pads whoever it admits for its first token with as many drafts.
            padding = plan.num_admitted * self.num_spec_tokens
            self.max_num_scheduled_tokens = min(num_tokens, plan.num_tokens + padding)
        try:
            return super().schedule(throttle_prefills)
        finally:
            self.max_num_active_reqs = num_active
            self.max_num_scheduled_tokens = num_tokens
            self.running += paused
            self.running.sort(key=_KEY)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        # A session whose turn ends with a token in flight would be enqueued a second time by it.
        super()._preempt_request(request, timestamp, drop_stale_output or request.resumable)

    def _evict(self, request: Request) -> None:
        """Take a running request's blocks; it waits for its turn to recompute what is lost."""
        assert request.status == RequestStatus.RUNNING
        self._preempt_request(
            request, time.monotonic(), drop_stale_output=self.requires_kv_delivery
        )
        # It may come back in this very step, and the worker would take it for one that stayed.
        self.prev_step_scheduled_req_ids.discard(request.request_id)

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        """As vLLM's; and what the step took is learnt."""
        if self.headway_is_off is None and self._clock is not None:
            self._clock.end(scheduler_output, time.monotonic())
        return super().update_from_output(scheduler_output, *args)


class HeadwayScheduler(HeadwaySchedulerMixin, AsyncScheduler):  # type: ignore[misc]
    """For ``--scheduler-cls``, with asynchronous scheduling, which is vLLM's default.

    vLLM turns that off by itself for what cannot have it (CPUs, some ways of speculative decoding),
    and does not swap a custom class then, as it does its own. So this one swaps itself.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        if cls is HeadwayScheduler and not config.scheduler_config.async_scheduling:
            return HeadwaySyncScheduler(*args, **kwargs)
        return super().__new__(cls)


class HeadwaySyncScheduler(HeadwaySchedulerMixin, Scheduler):  # type: ignore[misc]
    """The same without asynchronous scheduling."""
