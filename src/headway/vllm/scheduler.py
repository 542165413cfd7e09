"""vLLM's scheduler with Headway's decisions: a mixin, and the two classes vLLM may be given.

vLLM's ``schedule`` is left to do what it does; the mixin decides what it sees. Before the call, it
ranks, plans the step, evicts the requests that must yield their blocks, and takes out of
``running`` the requests that sit the step out (a request that is not scheduled keeps its blocks,
and nothing is computed again); after it, they are put back. What holds between any two calls:

- ``running`` is sorted by rank; every request in it or in a waiting queue has a rank;
- ``waiting`` is an indexed heap by rank;
- vLLM's own policy is FCFS: when a running request cannot grow, vLLM preempts the last of
  ``running``, which is the last-ranked.
"""

from __future__ import annotations

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
from headway.core.step import Step, UrgencyMemory
from headway.vllm.compatibility import is_between_prefills
from headway.vllm.config import HeadwayConfig
from headway.vllm.kv_blocks import KVBlocks
from headway.vllm.ranked_request import RankedRequest, rank
from headway.vllm.request_queue import RankedRequestQueue
from headway.vllm.step_clock import StepClock
from headway.vllm.step_plan import StepLimits, StepPlan

__all__ = ["HeadwayScheduler", "HeadwaySchedulerMixin", "HeadwaySyncScheduler"]

# Under vLLM's name, whose handlers it has: other loggers of this process show warnings only.
logger = init_logger(f"vllm.{__name__}")

_RANKED = attrgetter("headway")
_KEY = attrgetter("headway.key")

# What the mixin calls ``super()`` is vLLM's class, which comes after it.
_AnyScheduler: Any = object


class HeadwaySchedulerMixin(_AnyScheduler):  # type: ignore[misc]
    """Put before ``Scheduler`` or a subclass of it; ``HeadwayConfig`` has its settings."""

    running: list[Request]
    max_num_active_reqs: int
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.headway_config = HeadwayConfig.parse(self.vllm_config.additional_config)
        self._rules = self.headway_config.sharing
        self._slos = self.headway_config.slo_table
        #: Requests that were ranked; makes the rank of each differ from all others.
        self._num_ranked = 0
        self._urgency = UrgencyMemory()
        #: Whether a request in the last step would have computed more, had there been time.
        self._was_short_of_time = False
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
            self._clock = StepClock(self._slos.step_limit_ms, self.block_size)
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
    def max_prefill_tokens(self) -> int:
        """Tokens that one request may compute in a step."""
        config = self.scheduler_config
        if config.long_prefill_token_threshold and not self.adaptive_long_prefill_threshold:
            return int(min(config.long_prefill_token_threshold, self.max_num_scheduled_tokens))
        return int(self.max_num_scheduled_tokens)

    @property
    def _num_free_rows(self) -> int:
        """How many requests may be admitted before a resident has to give up its row.

        vLLM's newer model runner has one row for each request that is running or paused, in the
        step or not; the older one only has rows for the requests in the step.
        """
        if not self.use_v2_model_runner:
            return 2**62
        num_rows: int = self.max_num_running_reqs - self.num_waiting_for_streaming_input
        return num_rows - len(self.running)

    def _limits(self, holds_prompts: bool) -> StepLimits:
        return StepLimits(
            num_free_rows=self._num_free_rows,
            max_prefill_tokens=self.max_prefill_tokens,
            max_loras=self.lora_config.max_loras if self.lora_config else 0,
            num_spec_tokens=self.num_spec_tokens,
            may_cut_prompts=self.scheduler_config.enable_chunked_prefill,
            holds_prompts=holds_prompts,
            may_free=self._request_blocks_can_be_freed,
        )

    # ------------------------------------------------------------------ requests in

    def _enqueue_waiting_request(self, request: Request) -> None:
        # New requests, and sessions with new input: their arrival is that of the input.
        if self.headway_is_off is None:
            rank(request, self._headway_policy, self._slos, self._num_ranked)
            self._num_ranked += 1
        super()._enqueue_waiting_request(request)

    def _waiting_heads(self) -> Iterator[RankedRequest]:
        """Waiting requests that could start in this step, in rank order."""
        if self._pause_state != PauseState.UNPAUSED:
            return
        if len(self.kv_holding_waiting) > self.num_waiting_for_streaming_input:
            # vLLM admits these first, and displaces none for them.
            logger.warning_once(
                "Headway displaces no request while waiting requests hold KV blocks "
                "(streaming input)."
            )
            return
        for request in self.waiting:
            is_blocked = self._is_blocked_waiting_status(request.status)
            if is_blocked and not self._handle_blocked_waiting_request(request):
                continue
            if request.num_stale_output_tokens and not request.drop_stale_output:
                continue  # vLLM waits for its output in flight
            yield request.headway

    # ------------------------------------------------------------------ a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step of vLLM's, of the requests that the ranking puts into it."""
        if self.headway_is_off is not None:
            return super().schedule(throttle_prefills)
        holds_prompts = self._would_hold_prompts(throttle_prefills)
        if holds_prompts and self._has_urgent_prompt():
            # With this vLLM holds nothing in this step, at the end of which it sets it anew.
            self.prefill_capacity_bound = True
            holds_prompts = False
        is_urgent = self._urgency.holds(self._has_urgent(), time.monotonic())
        if self._has_to_choose(is_urgent):
            output = self._schedule_as_planned(throttle_prefills, holds_prompts, is_urgent)
        else:
            num_running = len(self.running)
            output = super().schedule(throttle_prefills)
            if len(self.running) > num_running:
                self.running.sort(key=_KEY)
        if self._clock is not None:
            self._clock.begin(output, self.requests, time.monotonic())
        return output

    def _would_hold_prompts(self, throttle_prefills: bool) -> bool:
        """Whether vLLM would compute no prompts in this step, so that decoding is undisturbed.

        See its ``prefill_schedule_interval``. O(1), without it.
        """
        is_asked_to = throttle_prefills or is_between_prefills(self)
        return (
            is_asked_to
            and not self.prefill_capacity_bound
            and any(not request.is_prefill_chunk for request in self.running)
        )

    def _has_urgent_prompt(self) -> bool:
        """Whether a prompt is due that belongs to a request more urgent than one that is running.

        O(running).
        """
        last: Key = self.running[-1].headway.key
        head = next(self._waiting_heads(), None)
        if head is not None and head.threshold < last:
            return True
        return any(
            request.is_prefill_chunk and request.headway.threshold < last
            for request in self.running
        )

    def _first_waiting(self) -> RankedRequest | None:
        """The first waiting request, whether or not it could start. O(1)."""
        return self.waiting.peek_request().headway if self.waiting else None

    def _has_urgent(self) -> bool:
        """Whether a resident or the first waiting request outranks the last resident. O(1)."""
        if not self.running:
            return False
        last: Key = self.running[-1].headway.key
        head = self._first_waiting()
        if head is not None and head.threshold < last:
            return True
        return bool(self.running[0].headway.threshold < last)

    def _has_to_choose(self, is_urgent: bool) -> bool:
        """Whether vLLM, left alone, could do other than the ranking says. O(1).

        Args:
            is_urgent: more urgent work is about.
        """
        running, rules = self.running, self._rules
        if self.headway_config.bounds_all_steps:
            return True
        head = self._first_waiting()
        if not running:
            return rules.share != "all" and head is not None
        last: Key = running[-1].headway.key
        num_slots = self.max_num_active_reqs - self.num_waiting_for_streaming_input - len(running)
        return (
            self.lora_config is not None
            or num_slots < 0
            or (head is not None and head.threshold < last)
            or (
                rules.share != "all"
                and ((head is not None and num_slots) or running[0].headway.threshold < last)
            )
            or (is_urgent and rules.prefill_share < 1 and self._has_prompts())
            or not self._blocks.suffice(len(running), self.max_num_scheduled_tokens)
        )

    def _has_prompts(self) -> bool:
        """Whether a step could compute more than the next tokens of residents. O(1)."""
        return bool(self._inflight_prefills or self.waiting)

    def _begin_step(self, is_urgent: bool) -> Step:
        """The budgets of the next step."""
        tokens, rules = self.max_num_scheduled_tokens, self._rules
        allowance = None
        if is_urgent and rules.prefill_share < 1:
            allowance = max(int(self.block_size), int(rules.prefill_share * tokens))
        return Step(
            self.current_step,
            self.max_num_active_reqs - self.num_waiting_for_streaming_input,
            tokens,
            None if self._clock is None else self._clock.budget(),
            rules,
            allowance,
        )

    def _schedule_as_planned(
        self, throttle_prefills: bool, holds_prompts: bool, is_urgent: bool
    ) -> SchedulerOutput:
        step = self._begin_step(is_urgent)
        plan = StepPlan(step, self._rules, self._limits(holds_prompts), self._blocks)
        residents = list(map(_RANKED, self.running))
        if self._pause_state == PauseState.PAUSED_ALL:
            plan.paused = residents
        else:
            heads = iter(()) if holds_prompts else self._waiting_heads()
            plan.fill(residents, heads, self._was_short_of_time)
            self._was_short_of_time = step.is_short_of_time
        for victim in plan.evicted:
            self._evict(victim.request)
        paused = [ranked.request for ranked in plan.paused]
        for request in paused:
            # Drafts for its next token: by the time it goes on, the worker has lost them.
            request.spec_token_ids = []
        self.running = [ranked.request for ranked in plan.running]
        num_active, num_tokens = self.max_num_active_reqs, self.max_num_scheduled_tokens
        in_step = len(self.running) + plan.num_admitted
        if in_step:
            in_step += len(self.kv_holding_waiting)
            self.max_num_active_reqs = min(num_active, in_step)
            # vLLM pads what it admits for a first token with as many drafts.
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
        # A session whose turn ends with a token in flight would be enqueued a second time by it in
        # vLLM 0.32; that token is computed again.
        super()._preempt_request(request, timestamp, drop_stale_output or request.resumable)

    def _evict(self, request: Request) -> None:
        """Take a running request's blocks; it waits for its turn to recompute what is lost."""
        assert request.status == RequestStatus.RUNNING
        self._preempt_request(
            request, time.monotonic(), drop_stale_output=self.requires_kv_delivery
        )
        # It may come back in this very step, which the worker must not take for having stayed.
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
