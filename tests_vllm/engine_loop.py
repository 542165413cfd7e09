"""A scheduler stepped as the engine core does, by a made-up worker.

The worker keeps what vLLM's model runners keep between steps (the tokens, block table and row of
every request), follows the scheduler's output as they do, and fails if it would compute another
token or read another block than the scheduler means. Every token is a function of its request and
position: whatever is lost, doubled or out of order is found.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any

from scheduler_harness import BLOCK_SIZE, STOP, make_request
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from headway.core.cost_model import CostModel


def token_at(request_id: str, position: int) -> int:
    """What the model says there; about every fiftieth is ``STOP``."""
    value = zlib.crc32(f"{request_id} {position}".encode())
    return STOP if value % 50 == 0 else 10 + value % 40_000


class Row:
    """What a model runner keeps of a request."""

    def __init__(self, new: NewRequestData) -> None:
        self.blocks = [list(ids) for ids in new.block_ids]
        self.tokens: list[int] = list(new.prefill_token_ids or new.prompt_token_ids)
        self.num_prompt_tokens = len(new.prompt_token_ids)
        #: Drafts of the last step that were wrong.
        self.num_rejected = 0


class Worker:
    """The bookkeeping of vLLM's model runners, and sampling.

    Args:
        scheduler: whose output it follows; looked at only to compare.
        seed: of the drafts.
    """

    def __init__(self, scheduler: Scheduler, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.is_async = isinstance(scheduler, AsyncScheduler)
        self.is_v2 = scheduler.use_v2_model_runner
        self.rows: dict[str, Row] = {}
        #: The requests of the step before.
        self.batch: set[str] = set()
        self.random = random.Random(seed)

    def execute(self, output: SchedulerOutput, *, is_ahead: bool) -> ModelRunnerOutput:
        """Compute a step, right after it was scheduled.

        Args:
            output: the step.
            is_ahead: the scheduler does not know yet what came of the step before.
        """
        self.is_ahead = is_ahead
        starts = self._update_rows(output)
        sampled = [
            self._compute(request_id, starts[request_id], count, output)
            for request_id, count in output.num_scheduled_tokens.items()
        ]
        self.batch = set(starts)
        return ModelRunnerOutput(
            req_ids=list(output.num_scheduled_tokens),
            req_id_to_index={name: i for i, name in enumerate(output.num_scheduled_tokens)},
            sampled_token_ids=sampled,
        )

    def draft(self, output: ModelRunnerOutput, num_tokens: int) -> DraftTokenIds:
        """Guesses of what comes after ``output``: up to ``num_tokens`` each, some of them right."""
        drafts = [
            self._guess(request_id, self.random.randint(0, num_tokens) if sampled else 0)
            for request_id, sampled in zip(output.req_ids, output.sampled_token_ids, strict=True)
        ]
        return DraftTokenIds(list(output.req_ids), drafts)

    def _guess(self, request_id: str, count: int) -> list[int]:
        start = len(self.rows[request_id].tokens)
        return [
            token_at(request_id, start + i) if self.random.random() < 0.6 else 5
            for i in range(count)
        ]

    def _update_rows(self, output: SchedulerOutput) -> dict[str, int]:
        """Take in what is new.

        Returns:
            Where each request of the step starts.
        """
        starts = {}
        cached = output.scheduled_cached_reqs
        gone = set(output.finished_req_ids)
        if self.is_v2:
            gone |= set(output.preempted_req_ids or ())
        else:
            self.batch &= output.num_scheduled_tokens.keys() - cached.resumed_req_ids
        for request_id in gone:
            self.rows.pop(request_id, None)
            self.batch.discard(request_id)
        for new in output.scheduled_new_reqs:
            if new.req_id in self.rows:
                assert self.scheduler.requests[new.req_id].resumable, f"{new.req_id}: is new twice"
                self.batch.discard(new.req_id)
            self.rows[new.req_id] = Row(new)
            starts[new.req_id] = new.num_computed_tokens
        for i, request_id in enumerate(cached.req_ids):
            assert request_id in self.rows, f"{request_id}: unknown to the worker"
            row, new_ids = self.rows[request_id], cached.new_block_ids[i]
            starts[request_id] = cached.num_computed_tokens[i]
            if request_id in cached.resumed_req_ids:
                row.blocks = [list(ids) for ids in new_ids]
            else:
                for table, ids in zip(row.blocks, new_ids or (), strict=False):
                    table.extend(ids)
            if not self.is_v2:
                num_outputs = cached.num_output_tokens[i]
                if request_id in self.batch or not self.is_async or not num_outputs:
                    del row.tokens[row.num_prompt_tokens + num_outputs :]
                else:
                    outputs = cached.all_token_ids[request_id][-num_outputs:]
                    row.tokens[row.num_prompt_tokens :] = outputs
        return starts

    def _compute(
        self, request_id: str, start: int, count: int, output: SchedulerOutput
    ) -> list[int]:
        """The tokens that a request gets from a step."""
        row, request = self.rows[request_id], self.scheduler.requests[request_id]
        held = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        assert row.blocks == [list(ids) for ids in held], f"{request_id}: other blocks"
        drafts = output.scheduled_spec_decode_tokens.get(request_id, [])
        end = start + count
        assert end <= len(row.blocks[0]) * BLOCK_SIZE, f"{request_id}: no block for a token"
        end -= len(drafts)
        if self.is_ahead and request_id in self.batch:
            # The scheduler took all drafts of that step for right, and there are new ones.
            start, end = start - row.num_rejected, end - row.num_rejected
            drafts = self._guess(request_id, len(drafts))
        known = list(request.all_token_ids[start:end])
        meant = known + [token_at(request_id, p) for p in range(start + len(known), end)]
        assert row.tokens[start:end] == meant, f"{request_id}: other tokens"
        row.num_rejected = 0
        if end < len(row.tokens):
            assert not drafts, f"{request_id}: drafts in the middle of a prompt"
            return []
        sampled = [token_at(request_id, end)]
        for draft in drafts:
            if draft != sampled[-1]:
                break
            sampled.append(token_at(request_id, end + len(sampled)))
        row.num_rejected = len(drafts) + 1 - len(sampled)
        row.tokens += sampled
        return sampled


class Answer:
    """What has come of a request; a session has one turn for each input."""

    def __init__(self, request: Request) -> None:
        self.request_id = request.request_id
        self.num_prompt_tokens = [request.num_prompt_tokens]
        self.max_tokens = request.max_tokens
        self.turns: list[list[int]] = [[]]
        self.finish_reason: str | None = None

    def check(self) -> None:
        """The model said this, in this order, and nothing is missing unless it was aborted."""
        start = 0
        for num_prompt_tokens, tokens in zip(self.num_prompt_tokens, self.turns, strict=False):
            start += num_prompt_tokens
            said = [token_at(self.request_id, start + i) for i in range(len(tokens))]
            assert tokens == said, f"{self.request_id}: another answer"
            is_whole = len(tokens) == self.max_tokens or tokens[-1:] == [STOP]
            is_failed = self.finish_reason in ("abort", "error")
            assert is_whole or is_failed, f"{self.request_id}: cut short"
            # Of a turn's answer, a session's next input takes the place of the last token.
            start += len(tokens) - 1


class EngineLoop:
    """The engine core's loop: two steps in flight for an asynchronous scheduler, else one.

    Args:
        scheduler: to be driven.
        seed: of the drafts.
        costs: what the plug-in is made to believe steps cost (ms), in every step anew: it would
            learn what the made-up ones really take; see ``CostModel``.
    """

    def __init__(
        self, scheduler: Scheduler, *, seed: int = 0, costs: Sequence[float] | None = None
    ) -> None:
        self.scheduler = scheduler
        self.worker = Worker(scheduler, seed)
        self.costs = costs
        #: Whether the engine asks for steps without prompts, as data-parallel engines do at times.
        self.throttles = False
        self.depth = 2 if isinstance(scheduler, AsyncScheduler) else 1
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.answers: dict[str, Answer] = {}

    def add(self, request_id: str, prompt: int | Sequence[int], **options: Any) -> Request:
        """A request arrives; see ``make_request``. One that is there is given more input."""
        request = make_request(request_id, prompt, **options)
        if request_id in self.answers:
            self.answers[request_id].num_prompt_tokens.append(request.num_prompt_tokens)
        else:
            self.answers[request_id] = Answer(request)
        self.scheduler.add_request(request)
        return request

    def abort(self, *request_ids: str) -> None:
        """The clients of these are gone."""
        for request in self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED):
            self.answers[request.request_id].finish_reason = "abort"

    def end_session(self, request_id: str) -> None:
        """There will be no more input."""
        self.scheduler.add_request(make_request(request_id, 1))

    def step(self) -> SchedulerOutput | None:
        """Schedule a step if there is work, and take in the oldest once enough are in flight.

        Returns:
            What was scheduled.
        """
        output = None
        if self.scheduler.has_requests():
            output = self.schedule()
            computed = self.worker.execute(output, is_ahead=bool(self.in_flight))
            self.in_flight.append((output, computed))
            if len(self.in_flight) < self.depth and (
                output.total_num_scheduled_tokens or self.scheduler.has_requests()
            ):
                return output
        if self.in_flight:
            self._update(*self.in_flight.popleft())
        return output

    def schedule(self) -> SchedulerOutput:
        """What the scheduler says; to be executed."""
        if self.costs is not None:
            self.scheduler._clock.cost_model = CostModel(self.costs)
        return self.scheduler.schedule(self.throttles)

    def _update(self, scheduled: SchedulerOutput, computed: ModelRunnerOutput) -> None:
        outputs = self.scheduler.update_from_output(scheduled, computed)
        for output in chain.from_iterable(client.outputs for client in outputs.values()):
            answer = self.answers[output.request_id]
            answer.turns[-1] += output.new_token_ids
            if output.finish_reason is not None:
                answer.finish_reason = str(output.finish_reason)
                answer.turns.append([])
        if self.scheduler.num_spec_tokens and self.depth == 1 and computed.req_ids:
            drafts = self.worker.draft(computed, self.scheduler.num_spec_tokens)
            self.scheduler.update_draft_token_ids(drafts)

    def run(self, max_steps: int = 10_000) -> None:
        """Step until all have ended."""
        while self.scheduler.has_requests() or self.in_flight:
            assert max_steps, "does not end"
            max_steps -= 1
            self.step()

    def check_done(self) -> None:
        """All requests have their whole answers, and nothing is held any more."""
        for answer in self.answers.values():
            answer.check()
        scheduler = self.scheduler
        assert not scheduler.requests and not scheduler.running
        assert not scheduler.waiting and not scheduler.kv_holding_waiting
        assert not scheduler.deferred_waiting and not scheduler.num_waiting_for_streaming_input
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
