"""The step loop: drain the ingress, schedule, execute, update, hand out.

A request's way is a straight line. Any thread may submit, abort or re-rank: that enters a ring,
and the thread that steps takes it from there, so the scheduler needs no locks and a full ring
is the back-pressure.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from headway.core.circular_queue import CircularQueue
from headway.core.errors import HeadwayError, InvalidRequest, QueueFull, UnknownRequest
from headway.core.forecast import Forecast, Work
from headway.core.life import RequestStatus
from headway.core.priority import check_priority
from headway.core.request import Request
from headway.core.request_limits import check_fits
from headway.core.request_table import StatusChange
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.client import EngineDescription, EngineListener, EngineStatistics, StepReport
from headway.engine.outputs import EngineOutput
from headway.engine.queue_limits import QueueLimits
from headway.engine.request_state import RequestState, reject
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import Executor, ModelRunnerOutput, TokenLogprobs

__all__ = ["Clock", "Engine"]

#: Seconds; never runs backwards.
Clock = Callable[[], float]

#: Weight of the latest request in what requests generate of what they may.
_LEARNING_RATE: Final = 0.05

_ABORTED: Final = RequestStatus.FINISHED_ABORTED

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _SetPriority:
    request_id: str
    priority: int


_Command = Request | _Abort | _SetPriority


class Engine:
    """Runs requests to their end on one executor.

    ``submit``, ``abort`` and ``set_priority`` may be called from any thread; ``step`` from one.

    Args:
        executor: runs the steps.
        scheduler: decides them; its pool may be smaller than the executor's, not larger.
        tokenizer: turns tokens into text; None hands out tokens only.
        clock: seconds; arrival times come from it.
        max_num_queued_reqs: requests that may wait for their first step; of more, the least
            urgent end with ``QueueFull``.
        max_queued_tokens: the same for the tokens of their prompts; None = no limit.
        queue_timeout: seconds that a request may wait for its first step before it ends with
            ``QueueTimeout``; None = no limit.
        ingress_capacity: commands that may pile up between two steps.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: PriorityScheduler,
        tokenizer: Tokenizer | None = None,
        *,
        clock: Clock = time.monotonic,
        max_num_queued_reqs: int = 100_000,
        max_queued_tokens: int | None = None,
        queue_timeout: float | None = None,
        ingress_capacity: int = 1024,
    ) -> None:
        assert scheduler.config.num_blocks <= executor.num_blocks
        assert scheduler.config.block_size == executor.block_size
        assert scheduler.config.num_swap_blocks <= executor.num_swap_blocks
        self.executor = executor
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.clock = clock
        #: The bounds of the queue.
        self.queue_limits = QueueLimits(
            scheduler, self._slots_ms, max_num_queued_reqs, max_queued_tokens, queue_timeout
        )
        #: Told of every step, by the stepping thread; see ``EngineListener``.
        self.listeners: list[EngineListener] = []
        #: Of ``max_tokens``, what a request is expected to generate: what requests that ended by
        #: themselves did, as a moving average.
        self._output_fraction = 1.0
        #: What has moved since the step before.
        self._changes: list[StatusChange] = []
        scheduler.table.on_change = self._changes.append
        #: Called, from the submitting thread, when there is something to step for.
        self.on_ingress: Callable[[], None] = _nothing
        self._ingress: CircularQueue[_Command] = CircularQueue(ingress_capacity)
        #: The ring has one producer end; submitting threads take turns at it.
        self._ingress_lock = threading.Lock()
        #: Commands that the ring had no room for.
        self.num_ingress_refusals = 0
        #: Of the unfinished requests that the scheduler knows, by id.
        self._states: dict[str, RequestState] = {}
        self._seeds = random.Random()
        #: The latest value that was published; any thread may read it.
        self.statistics: EngineStatistics = self._statistics()

    # ------------------------------------------------------------------ any thread

    def check(self, request: Request) -> None:
        """Refuse a request that could never be served.

        Raises:
            RequestTooLong: longer than the context, or than the pool could hold.
            InvalidRequest: a token id is outside the vocabulary.
        """
        check_fits(request, self.scheduler.config)
        if self.tokenizer is None:
            return
        size = self.tokenizer.vocab_size
        for sequence in request.live:
            largest = max(sequence.token_ids)
            if largest >= size:
                raise InvalidRequest(
                    f"prompt of request {request.request_id!r} has token id {largest}, the "
                    f"vocabulary is 0 … {size - 1}"
                )
        params = request.sampling_params
        for name, token_ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            largest = max(token_ids, default=0)
            if largest >= size:
                raise InvalidRequest(
                    f"{name} of request {request.request_id!r} has token id {largest}, the "
                    f"vocabulary is 0 … {size - 1}"
                )

    def submit(self, request: Request) -> None:
        """Let a request in; its outcome, be it a refusal, comes out of ``step``.

        A full queue refuses nothing here: the limits turn the least urgent request away after the
        next step has been scheduled, and that need not be this one.

        Raises:
            RequestTooLong, InvalidRequest: it could never be served; nothing will come out.
            QueueFull: the ring is full; nothing will come out.
        """
        self.prepare(request)
        self.enqueue(request)

    def prepare(self, request: Request) -> None:
        """The part of ``submit`` that is done once; then ``enqueue``.

        Raises:
            RequestTooLong, InvalidRequest: it could never be served.
        """
        self.check(request)
        request.draw_seed(self._seeds.getrandbits(63))
        if request.arrival_time is None:
            request.arrival_time = self.clock()

    def enqueue(self, request: Request) -> None:
        """Let a prepared request in.

        Raises:
            QueueFull: the ring is full; try again after a step.
        """
        self._enqueue(request)

    def abort(self, request_id: str) -> None:
        """End a request; if it is unfinished by then, ``step`` hands out its end.

        Raises:
            QueueFull: the ring is full; try again after a step.
        """
        self._enqueue(_Abort(request_id))

    def set_priority(self, request_id: str, priority: int) -> None:
        """Change how urgent a request is, from the next step on.

        Raises:
            InvalidRequest: the priority is no int64.
            QueueFull: the ring is full; try again after a step.
        """
        check_priority(request_id, priority)
        self._enqueue(_SetPriority(request_id, priority))

    @property
    def description(self) -> EngineDescription:
        """What does not change about it."""
        config = self.scheduler.config
        describe = getattr(self.executor, "describe", dict)
        return EngineDescription(
            max_request_tokens=config.max_request_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_choices=config.max_num_choices,
            scheduling_policy=self.scheduler.policy.name,
            preemption_mode=self.scheduler.mode.value,
            slos=config.slos,
            step_limit_ms=config.step_limit_ms,
            max_step_ms=math.inf if config.max_step_ms is None else config.max_step_ms,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            num_swap_blocks=config.num_swap_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
            facts=describe(),
        )

    @property
    def ingress_usage(self) -> float:
        """Share of the ring that is taken, 0 … 1."""
        return len(self._ingress) / self._ingress.capacity

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self.scheduler.has_unfinished_requests or not self._ingress.is_empty()

    # ------------------------------------------------------------------ the stepping thread

    def step(self) -> list[EngineOutput]:
        """One step; returns what it added to which request, ends and refusals included."""
        start = self.clock()
        outputs = list(self._drain_ingress(start))
        scheduled = self.scheduler.schedule(start)
        outputs += self._apply_queue_limits(start)
        result, execute_start, execute_end = None, start, start
        if not scheduled.is_empty:
            execute_start = self.clock()
            result = self.executor.execute(scheduled)
            execute_end = self.clock()
        num_recomputed = self._num_recomputed
        tokens = [()] * len(scheduled) if result is None else result.tokens
        ended = self._end_failed(scheduled, result, execute_end)
        self.scheduler.update_from_output(scheduled, tokens, execute_end)
        if result is not None:
            outputs += ended
            outputs += self._tokens_out(scheduled, result, execute_end)
        end = self.clock()
        if result is not None:
            self._learn(scheduled, (end - start) * 1e3, result.swap_ms)
        self._publish(
            StepReport(
                scheduled,
                result,
                start,
                execute_start,
                execute_end,
                end,
                self._take_changes(),
                self._num_recomputed - num_recomputed,
            ),
            outputs,
        )
        return outputs

    def abort_all(self, error: HeadwayError | None = None) -> list[EngineOutput]:
        """End everything that is unfinished, waiting in the ring or being served."""
        now = self.clock()
        outputs = list(self._drain_ingress(now))
        for request_id in list(self.scheduler.requests):
            outputs += self._end(request_id, _ABORTED, now, error)
        changes = self._take_changes()
        report = StepReport(SchedulerOutput(), None, now, now, now, now, changes, 0)
        self._publish(report, outputs)
        return outputs

    def close(self) -> None:
        """Release the executor."""
        self.executor.close()

    # ------------------------------------------------------------------ internals

    def _enqueue(self, command: _Command) -> None:
        with self._ingress_lock:
            accepted = self._ingress.enqueue(command)
            self.num_ingress_refusals += not accepted
        if not accepted:
            raise QueueFull(
                f"{self._ingress.capacity} requests have arrived since the last step, no more fit"
            )
        self.on_ingress()

    def _drain_ingress(self, now: float) -> Iterator[EngineOutput]:
        while (command := self._ingress.dequeue()) is not None:
            if isinstance(command, Request):
                try:
                    self.scheduler.add_request(command, now)
                except InvalidRequest as error:
                    yield from reject(command, error)
                else:
                    yield from self._begin(command, now)
            elif isinstance(command, _Abort):
                if command.request_id in self.scheduler.requests:
                    yield from self._end(command.request_id, _ABORTED, now)
            else:
                with suppress(UnknownRequest):  # it has ended meanwhile
                    self.scheduler.set_priority(command.request_id, command.priority)
                    self.queue_limits.rerank(self.scheduler.requests[command.request_id])

    def _begin(self, request: Request, now: float) -> Iterator[EngineOutput]:
        state = self._states[request.request_id] = RequestState(request, self.tokenizer)
        if not request.num_output_tokens:  # one that has begun elsewhere is never turned away
            self.queue_limits.enter(request, now)
        for output in state.end_complete(self.scheduler, now):
            yield output
            if output.is_last:
                del self._states[request.request_id]

    def _apply_queue_limits(self, now: float) -> Iterator[EngineOutput]:
        for request, error in self.queue_limits.overdue(now):
            yield from self._end(request.request_id, RequestStatus.FINISHED_TIMED_OUT, now, error)
        for request, error in self.queue_limits.surplus():
            yield from self._end(request.request_id, RequestStatus.FINISHED_REJECTED, now, error)

    def _end(
        self,
        request_id: str,
        status: RequestStatus,
        now: float,
        error: HeadwayError | None = None,
    ) -> list[EngineOutput]:
        self.scheduler.finish(request_id, status, now)
        return list(self._states.pop(request_id).end(status.finish_reason, error))

    def _end_failed(
        self, scheduled: SchedulerOutput, result: ModelRunnerOutput | None, now: float
    ) -> list[EngineOutput]:
        """End the requests that the executor could not compute, before the others go on."""
        outputs: list[EngineOutput] = []
        for index, error in ({} if result is None else result.errors).items():
            request_id = scheduled[index].request_id
            if request_id in self._states:
                outputs += self._end(request_id, _ABORTED, now, error)
        return outputs

    def _tokens_out(
        self, scheduled: SchedulerOutput, result: ModelRunnerOutput, now: float
    ) -> Iterator[EngineOutput]:
        """What the rows of a step have added to their requests."""
        for position, rated in result.prompt_logprobs.items():
            state = self._states.get(scheduled[position].request_id)
            if state is not None:
                state.rate_prompt(rated)
        for position, (row, sampled) in enumerate(zip(scheduled.rows, result.tokens, strict=True)):
            state = self._states.get(row.request_id)
            if not sampled or state is None:
                continue
            logprobs = result.logprobs.get(position, ())
            if len(row.seeds) > 1:  # the first token of each choice
                for index in range(len(sampled)):
                    yield self._advance(state, index, logprobs[index : index + 1], now)
            else:
                yield self._advance(state, row.index, logprobs, now)

    def _advance(
        self,
        state: RequestState,
        index: int,
        logprobs: tuple[TokenLogprobs, ...],
        now: float,
    ) -> EngineOutput:
        output = state.advance(index, logprobs, self.scheduler, now)
        if output.is_last:
            request = self._states.pop(output.request_id).request
            fraction = request.num_output_tokens / (request.max_tokens * request.n)
            self._output_fraction += _LEARNING_RATE * (fraction - self._output_fraction)
        return output

    def _learn(self, scheduled: SchedulerOutput, step_ms: float, swap_ms: float) -> None:
        if scheduled.num_swapped_blocks:
            self.scheduler.cost_model.observe_swap(scheduled.num_swapped_blocks, swap_ms)
        if scheduled:
            self.scheduler.cost_model.observe(scheduled.features, step_ms - swap_ms)

    # ------------------------------------------------------------------ what others are told

    def publish_statistics(self) -> None:
        """Publish how it is doing; every step does. For the stepping thread."""
        self.statistics = self._statistics()

    def _publish(self, report: StepReport, outputs: list[EngineOutput]) -> None:
        self.publish_statistics()
        for listener in tuple(self.listeners):
            try:
                listener(report, outputs)
            except Exception:
                _logger.exception("%r raised, and is not told of anything any more", listener)
                with suppress(ValueError):  # it may have taken itself off
                    self.listeners.remove(listener)

    def _take_changes(self) -> tuple[StatusChange, ...]:
        changes = tuple(self._changes)
        self._changes.clear()
        return changes

    @property
    def _num_recomputed(self) -> int:
        return self.scheduler.num_recomputed_tokens

    def _forecast(self) -> Forecast:
        config = self.scheduler.config
        return Forecast(
            self.scheduler.cost_model.coefficients,
            config.step_limit_ms,
            config.max_num_seqs,
            config.num_blocks * config.block_size,
            self._output_fraction,
        )

    def _slots_ms(self) -> Iterator[float]:
        """Times until one, two, three … of the residents have made room."""
        return self._forecast().slots_ms(
            Work(
                max(0, request.num_prompt_tokens - request.num_computed_tokens),
                request.token_limit - request.leader.num_tokens,
                request.leader.num_tokens,
                request.num_rows,
            )
            for request in self.scheduler.resident
        )

    def _statistics(self) -> EngineStatistics:
        scheduler = self.scheduler.statistics()
        num_swap_blocks = max(1, self.scheduler.config.num_swap_blocks)
        return EngineStatistics(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_paused=scheduler.num_paused,
            num_swapped=scheduler.num_swapped,
            num_preempted=scheduler.num_preempted,
            num_finished=scheduler.num_finished,
            num_queued_tokens=scheduler.num_queued_tokens,
            kv_cache_usage=scheduler.blocks.usage,
            swap_space_usage=scheduler.num_swap_blocks_used / num_swap_blocks,
            ingress_usage=self.ingress_usage,
            num_ingress_refusals=self.num_ingress_refusals,
            preemptions=scheduler.preemptions,
            recomputed_tokens=scheduler.recomputed_tokens,
            swap_ms_per_block=self.scheduler.cost_model.swap_ms_per_block,
            forecast=self._forecast(),
        )


def _nothing() -> None:
    """Nothing waits for the ingress."""
