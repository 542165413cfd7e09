"""The step loop: drain the ingress, schedule, execute, update, hand out.

A request's way is a straight line. Any thread may submit, abort or re-rank: that enters a ring,
and the thread that steps takes it from there, so the scheduler needs no locks and a full ring
is the back-pressure.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from headway.core.circular_queue import CircularQueue
from headway.core.errors import HeadwayError, InvalidRequest, QueueFull, UnknownRequest
from headway.core.forecast import Forecast
from headway.core.request import Request, RequestStatus, check_priority
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.output_processor import OutputProcessor
from headway.engine.outputs import EngineOutput
from headway.engine.queue_limits import QueueLimits
from headway.engine.request_info import RequestInfo
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import Executor, ModelRunnerOutput, TokenLogprobs

__all__ = ["Clock", "Engine", "RequestObserver", "Step", "StepObserver"]

#: Seconds; never runs backwards.
Clock = Callable[[], float]


class Step(NamedTuple):
    """A step that was done, for whoever watches: live views, metrics, benchmarks.

    Attributes:
        output: what was scheduled.
        start: when scheduling began.
        execute_start: when the executor began.
        execute_end: when it was done.
        end: when the outputs were ready; seconds, all four.
        result: what the executor returned.
    """

    output: SchedulerOutput
    start: float
    execute_start: float
    execute_end: float
    end: float
    result: ModelRunnerOutput


#: Called after every step, from the thread that steps; it must return soon.
StepObserver = Callable[[Step], None]

#: Called at a request's end, however it ends, with the last that was said of it; as above.
RequestObserver = Callable[[Request, EngineOutput], None]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _SetPriority:
    request_id: str
    priority: int


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[], None]


_Command = Request | _Abort | _SetPriority | _Call


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
        #: When it will be whose turn; the stepping thread's own.
        self.forecast = Forecast(scheduler)
        #: The bounds of the queue.
        self.queue_limits = QueueLimits(
            scheduler, self.forecast, max_num_queued_reqs, max_queued_tokens, queue_timeout
        )
        #: Called after every step.
        self.observers: list[StepObserver] = []
        #: Called at every request's end.
        self.request_observers: list[RequestObserver] = []
        #: Called, from the submitting thread, when there is something to step for.
        self.on_ingress: Callable[[], None] = _nothing
        self._ingress: CircularQueue[_Command] = CircularQueue(ingress_capacity)
        #: The ring has one producer end; submitting threads take turns at it.
        self._ingress_lock = threading.Lock()
        #: Commands that the ring had no room for.
        self.num_ingress_refusals = 0
        #: Of the unfinished requests that the scheduler knows, by id.
        self._processors: dict[str, OutputProcessor] = {}
        self._seeds = random.Random()

    # ------------------------------------------------------------------ any thread

    def check(self, request: Request) -> None:
        """Refuse a request that could never be served.

        Raises:
            RequestTooLong: longer than the context, or than the pool could hold.
            InvalidRequest: a token id is outside the vocabulary.
        """
        self.scheduler.check_length(request)
        if self.tokenizer is None:
            return
        size = self.tokenizer.vocab_size
        smallest, largest = min(request.token_ids), max(request.token_ids)
        if smallest < 0 or largest >= size:
            raise InvalidRequest(
                f"prompt of request {request.request_id!r} has token id "
                f"{smallest if smallest < 0 else largest}, the vocabulary is 0 … {size - 1}"
            )
        biased = max(request.sampling_params.logit_bias, default=0)
        if biased >= size:
            raise InvalidRequest(
                f"logit_bias of request {request.request_id!r} has token id {biased}, the "
                f"vocabulary is 0 … {size - 1}"
            )

    @property
    def has_room(self) -> bool:
        """Whether ``submit`` would let a request in without anybody being turned away."""
        num_queued = len(self.scheduler.waiting_heap) + len(self._ingress)
        return not self._ingress.is_full() and num_queued < self.queue_limits.max_num_reqs

    def submit(self, request: Request) -> None:
        """Let a request in; its outcome, be it a refusal, comes out of ``step``.

        Raises:
            RequestTooLong, InvalidRequest: it could never be served; nothing will come out.
            QueueFull: the ring is full; nothing will come out.
        """
        self.check(request)
        params = request.sampling_params
        if params.temperature > 0 and params.seed is None:
            request.sampling_params = replace(params, seed=self._seeds.getrandbits(63))
        if request.arrival_time is None:
            request.arrival_time = self.clock()
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

    def call(self, function: Callable[[], None]) -> None:
        """Have ``function`` called between two steps, by the stepping thread; it must not raise.

        Raises:
            QueueFull: the ring is full; try again after a step.
        """
        self._enqueue(_Call(function))

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
        outputs: list[EngineOutput] = []
        start = self.clock()
        self._drain_ingress(outputs, start)
        scheduled = self.scheduler.schedule(start)
        self._apply_queue_limits(outputs, start)
        if scheduled.is_empty:
            self._notify_ends(outputs)
            return outputs
        execute_start = self.clock()
        result = self.executor.execute(scheduled)
        execute_end = self.clock()
        for index, error in result.errors.items():
            aborted = RequestStatus.FINISHED_ABORTED
            outputs.append(self._end(scheduled[index].request_id, aborted, execute_end, error))
        self.scheduler.update_from_output(scheduled, result.sampled_token_ids, execute_end)
        for index, rated in result.prompt_logprobs.items():
            self._processors[scheduled[index].request_id].rate_prompt(rated)
        for index, token_id in enumerate(result.sampled_token_ids):
            if token_id is not None:
                logprobs = result.logprobs.get(index)
                outputs.append(self._to_output(scheduled[index], token_id, logprobs, execute_end))
        end = self.clock()
        self._learn(scheduled, (end - start) * 1e3, result.swap_ms)
        if self.observers:
            step = Step(scheduled, start, execute_start, execute_end, end, result)
            for observer in self.observers:
                observer(step)
        self._notify_ends(outputs)
        return outputs

    def request_infos(self, limit: int | None = None) -> list[RequestInfo]:
        """Unfinished requests, most urgent first; for the stepping thread. O(n log n)."""
        now = self.clock()
        return [
            RequestInfo(
                request.request_id,
                request.status.value,
                request.priority,
                rank,
                now - (now if request.arrival_time is None else request.arrival_time),
                request.num_prompt_tokens,
                request.num_computed_tokens,
                request.num_output_tokens,
                request.max_tokens,
                request.num_preemptions,
                wait_ms / 1e3,
            )
            for rank, (request, wait_ms) in enumerate(self.forecast.waits_ms()[:limit])
        ]

    def abort_all(self, error: HeadwayError | None = None) -> list[EngineOutput]:
        """End everything that is unfinished, waiting in the ring or being served."""
        outputs: list[EngineOutput] = []
        now = self.clock()
        self._drain_ingress(outputs, now)
        for request_id in list(self.scheduler.requests):
            outputs.append(self._end(request_id, RequestStatus.FINISHED_ABORTED, now, error))
        self._notify_ends(outputs)
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

    def _drain_ingress(self, outputs: list[EngineOutput], now: float) -> None:
        while (command := self._ingress.dequeue()) is not None:
            if isinstance(command, Request):
                try:
                    self.scheduler.add_request(command, now)
                except InvalidRequest as error:
                    outputs.append(EngineOutput(command, finish_reason="rejected", error=error))
                else:
                    self.queue_limits.enter(command, now)
                    processor = OutputProcessor(command, self.tokenizer)
                    self._processors[command.request_id] = processor
            elif isinstance(command, _Abort):
                if command.request_id in self.scheduler.requests:
                    aborted = RequestStatus.FINISHED_ABORTED
                    outputs.append(self._end(command.request_id, aborted, now))
            elif isinstance(command, _Call):
                command.function()
            else:
                with suppress(UnknownRequest):  # it has ended meanwhile
                    self.scheduler.set_priority(command.request_id, command.priority)

    def _apply_queue_limits(self, outputs: list[EngineOutput], now: float) -> None:
        for request, error in self.queue_limits.overdue(now):
            timed_out = RequestStatus.FINISHED_TIMED_OUT
            outputs.append(self._end(request.request_id, timed_out, now, error))
        for request, error in self.queue_limits.surplus():
            rejected = RequestStatus.FINISHED_REJECTED
            outputs.append(self._end(request.request_id, rejected, now, error))

    def _notify_ends(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                if output.error is None and output.finish_reason != "abort":
                    self.forecast.observe_finished(output.request)
                for observer in self.request_observers:
                    observer(output.request, output)

    def _end(
        self,
        request_id: str,
        status: RequestStatus,
        now: float,
        error: HeadwayError | None = None,
    ) -> EngineOutput:
        request = self.scheduler.finish(request_id, status, now)
        text = self._processors.pop(request_id).flush().text
        return EngineOutput(request, (), text, request.status.finish_reason, error=error)

    def _learn(self, scheduled: SchedulerOutput, step_ms: float, swap_ms: float) -> None:
        if scheduled.num_swapped_blocks:
            self.scheduler.cost_model.observe_swap(scheduled.num_swapped_blocks, swap_ms)
        if scheduled.requests:
            self.scheduler.cost_model.observe(scheduled.features, step_ms - swap_ms)

    def _to_output(
        self, request: Request, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> EngineOutput:
        finish_reason = request.status.finish_reason
        stop_reason: str | int | None = None
        if finish_reason == "stop" and token_id in request.sampling_params.stop_token_ids:
            stop_reason = token_id
        processor = self._processors[request.request_id]
        if finish_reason == "stop":
            text = processor.flush().text  # the end token is not part of the text
        else:
            text, stop = processor.append(token_id)
            if finish_reason is not None and stop is None:
                rest, stop = processor.flush()
                text += rest
            if stop is not None:
                if finish_reason is None:
                    self.scheduler.finish(request.request_id, RequestStatus.FINISHED_STOPPED, now)
                finish_reason, stop_reason = "stop", stop
        if finish_reason is not None:
            del self._processors[request.request_id]
        return EngineOutput(
            request,
            (token_id,),
            text,
            finish_reason,
            stop_reason,
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=processor.take_prompt_logprobs(),
        )


def _nothing() -> None:
    """Nobody waits for the ingress."""
