"""Every step ranks all unfinished requests by one key and fills the step from the top.

A request that is not reached yields in the cheapest way that makes room. Priority, preemption,
pausing and resuming, first come first served, ageing and deadlines are consequences of the
ranking and of one reclaim ladder; there is no running phase and waiting phase with rules of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import islice
from typing import Final

from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.errors import DuplicateRequest, InvalidRequest, UnknownRequest
from headway.core.kv_cache_manager import KVCacheManager
from headway.core.merge import Merge
from headway.core.policy import NOBODY, SchedulingPolicy
from headway.core.priority import check_priority
from headway.core.ranking import first_displaceable, fits_slots
from headway.core.reclaim_ladder import ReclaimLadder
from headway.core.request import Request, RequestStatus
from headway.core.request_limits import check_fits, token_limit
from headway.core.request_table import RequestTable
from headway.core.scheduler_output import SchedulerOutput
from headway.core.scheduler_statistics import SchedulerStatistics
from headway.core.sequence import Sequence
from headway.core.step import Step, UrgencyMemory
from headway.core.step_rows import StepRows, num_logit_rows
from headway.core.time_budget import TimeBudget
from headway.core.token_intake import TokenIntake
from headway.core.wants import ready_sequences, want_of

__all__ = ["PriorityScheduler"]

_RUNNING: Final = RequestStatus.RUNNING


class PriorityScheduler:
    """Decides, step by step, which requests compute how many tokens, and which yield.

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
        s.update_from_output(batch, [(42,)])
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
        #: What each class of requests has been promised.
        self.slos = config.slo_table
        #: Predicts what a step and a swap cost.
        self.cost_model = cost_model or CostModel()
        #: The residents' blocks and what is in them.
        self.kv_cache = KVCacheManager(config, self.cost_model)
        #: Owns the block tables.
        self.block_manager = self.kv_cache.block_manager
        #: Every unfinished request, in the collection that its status stands for.
        self.table = RequestTable()
        #: Unfinished requests without blocks in the pool, by key; the table's own.
        self.waiting_heap = self.table.waiting
        #: Unfinished requests with blocks in the pool, sorted by key; the table's own.
        self.resident = self.table.resident
        #: Every unfinished request by id; the table's own.
        self.requests = self.table.by_id
        #: Gives requests blocks, and makes others yield them.
        self._ladder = ReclaimLadder(config, self.kv_cache, self.table)
        #: Takes in what was computed.
        self._intake = TokenIntake(self.kv_cache, self.table, getattr(self.policy, "serve", None))
        #: The latest time it was told; never decreases.
        self.now = 0.0
        #: Whether residents that only decode may be placed without looking at the others' rules.
        self._has_plain_steps = not config.is_timed and config.sharing.share == "all"
        #: Whether a request in the last step would have computed more, had there been time.
        self._is_short_of_time = False
        self._urgency = UrgencyMemory()
        #: Steps scheduled; the number of the latest, which is the one that may be given back.
        self._num_steps = 0
        #: The rows of that step, while it is being filled and has not been given back.
        self._in_flight: StepRows | None = None
        self._num_arrivals = 0

    # ------------------------------------------------------------------ requests in and out

    def add_request(self, request: Request, now: float | None = None) -> None:
        """Let a request wait for its turn. O(log n).

        Its arrival is ``request.arrival_time`` where the caller has set one, else ``now``.

        Raises:
            DuplicateRequest: an unfinished request has its id.
            RequestTooLong: the prompt leaves no room for one token in the context or the pool.
            InvalidRequest: it was added before, or has more choices than a step has room for.
        """
        now = self._advance(now)
        if request.request_id in self.requests:
            raise DuplicateRequest(f"request id {request.request_id!r} is in use")
        if request.status is not RequestStatus.WAITING or request.arrival_order >= 0:
            raise InvalidRequest(
                f"request {request.request_id!r} is {request.status.value}; add a fresh one"
            )
        check_fits(request, self.config)
        if request.arrival_time is None:
            request.arrival_time = now
        request.arrival_order = self._num_arrivals
        self._num_arrivals += 1
        request.begin(token_limit(request, self.config), self.config.eos_token_ids)
        self._rank(request)
        self.table.add(request, now)

    def abort(self, request_id: str, now: float | None = None) -> Request:
        """End a request at once, wherever it is. O(log n) if it waits.

        Raises:
            UnknownRequest: no unfinished request has this id.
        """
        return self.finish(request_id, RequestStatus.FINISHED_ABORTED, now)

    def finish(self, request_id: str, status: RequestStatus, now: float | None = None) -> Request:
        """End all choices of a request; what they held is free at once.

        Raises:
            UnknownRequest: no unfinished request has this id.
        """
        assert status.is_finished
        now = self._advance(now)
        request = self.table.get(request_id)
        for sequence in request.live.copy():
            self._intake.end(sequence, status, now)
        return request

    def stop_sequence(self, request_id: str, index: int, now: float | None = None) -> Request:
        """End one choice of a request as stopped; with the last of them the request ends.

        Raises:
            UnknownRequest: no unfinished request has this id, or the choice has ended.
        """
        now = self._advance(now)
        sequence = self._sequence(request_id, index)
        self._intake.end(sequence, RequestStatus.FINISHED_STOPPED, now)
        return sequence.request

    def preempt(self, request_id: str, now: float | None = None) -> None:
        """Send a resident request back to the waiting heap, its tokens kept.

        Its full blocks stay findable, so what is not overwritten meanwhile is not recomputed.

        Raises:
            UnknownRequest: no unfinished request has this id.
            InvalidRequest: it holds no blocks.
        """
        now = self._advance(now)
        request = self.table.get(request_id)
        if not request.holds_blocks:
            raise InvalidRequest(f"request {request_id!r} is {request.status.value}, not resident")
        cuts = [(sequence, 0) for sequence in request.live if sequence.block_table]
        self._ladder.evict(request, cuts, PreemptionMode.RECOMPUTE, None, now)

    def set_priority(self, request_id: str, priority: int) -> None:
        """Change how urgent a request is, while it waits or runs. O(log n), O(n) if resident.

        Raises:
            UnknownRequest: no unfinished request has this id.
            InvalidRequest: the priority is no int64.
        """
        request = self.table.get(request_id)
        check_priority(request_id, priority)

        def rank(request: Request) -> None:
            request.priority = priority
            self._rank(request)

        self.table.rerank(request, rank)

    def propose(self, request_id: str, index: int, token_ids: Seq[int]) -> None:
        """Give a choice draft tokens, which the next step that it decodes in checks.

        They replace earlier ones. A choice takes none before its first token.

        Raises:
            UnknownRequest: no unfinished request has this id, or the choice has ended.
            InvalidRequest: a step is being computed, so that the last token is not known.
        """
        sequence = self._sequence(request_id, index)
        if self._in_flight is not None:
            when = f"while step {self._num_steps} is being computed, must come after it"
            raise InvalidRequest(f"drafts for request {request_id!r} come {when}")
        room = sequence.request.token_limit - sequence.num_tokens - 1
        if sequence.num_output_tokens:  # before that, its next token is the prompt's to tell
            sequence.draft_token_ids = tuple(token_ids[: max(0, room)])
            sequence.quiet_until = 0

    # ------------------------------------------------------------------ a step

    def schedule(self, now: float | None = None) -> SchedulerOutput:
        """Fill one step from the top of the ranking.

        O(residents + admitted·log waiting + blocks moved). Calling it again without
        ``update_from_output`` in between chooses the same requests again; block operations
        are told once, so no output may be dropped.
        """
        now = self._advance(now)
        step = self._begin_step(now)
        merge = Merge(self.resident, self.table.next_waiting)
        while (request := self._next(merge, step)) is not None:
            if request is merge.head and not self._admit(request, merge, step, now):
                merge.stop_admitting()  # what it could not get is not for requests below it
                continue
            merge.index += 1
            if not self._place(request, merge, step, now):
                self._ladder.pause(request, now)
                merge.stop_admitting()
        for request in merge.rest:
            self._ladder.pause(request, now)
        return self._end_step(step)

    def update_from_output(
        self,
        output: SchedulerOutput,
        tokens: Seq[tuple[int, ...]],
        now: float | None = None,
    ) -> list[Request]:
        """Take in what the executor computed; returns the requests that this finished.

        Args:
            output: what ``schedule`` returned last.
            tokens: parallel to its rows, as in ``ModelRunnerOutput``. Rows of requests that were
                aborted or preempted since are passed over.

        Raises:
            InvalidRequest: the output is not the latest, or was given back before.
        """
        now = self._advance(now)
        if self._in_flight is None or output.step != self._num_steps:
            given = "has been given back" if output.step <= self._num_steps else "is unknown"
            raise InvalidRequest(
                f"step {output.step} {given}, the latest is {self._num_steps}: it can be given "
                "back once"
            )
        rows, self._in_flight = self._in_flight, None
        return self._intake.take_step(rows, tokens, now)

    # ------------------------------------------------------------------ reading

    @property
    def running_queue(self) -> list[Request]:
        """The requests of the last step that are unfinished, most urgent first. O(residents)."""
        return [request for request in self.resident if request.status is _RUNNING]

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether another step would do something."""
        return bool(self.requests)

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens computed again after their blocks had been taken."""
        return self._intake.num_recomputed_tokens

    def statistics(self) -> SchedulerStatistics:
        """Counts for metrics. O(1)."""
        return SchedulerStatistics.of(
            self.table,
            self.kv_cache,
            {mode.value: count for mode, count in self._ladder.preemptions.items()},
            dict(self._intake.recomputed_tokens),
        )

    # ------------------------------------------------------------------ the parts of a step

    def _begin_step(self, now: float) -> Step:
        config, rules = self.config, self.config.sharing
        slots, tokens = config.max_num_seqs, config.max_num_batched_tokens
        self.kv_cache.begin_step()
        self._ladder.take_yields()  # what a caller's ``preempt`` left
        self._num_steps += 1
        self._in_flight = StepRows()
        time = None
        if config.is_timed:
            time = TimeBudget(self.cost_model, self.slos.step_limit_ms, config.block_size)
        allowance = None
        if rules.prefill_share < 1 and self._urgency.holds(self._has_urgent(), now):
            allowance = max(config.block_size, int(rules.prefill_share * tokens))
        step = Step(self._num_steps, slots, tokens, time, rules, allowance)
        if self._is_short_of_time:
            step.share([want_of(request, config) for request in self.resident])
        return step

    def _next(self, merge: Merge[Request], step: Step) -> Request | None:
        """The next request for which the step may have room; None if there is none."""
        if self._has_plain_steps:
            self._place_decodes(merge, step)
        request = merge.first
        return None if request is None or step.is_full or step.bars(request) else request

    def _place_decodes(self, merge: Merge[Request], step: Step) -> None:
        """Place the residents that come next, as long as each has room for its next token.

        What ``_place`` would do, without looking at what cannot be: most steps are nothing else.
        """
        assert self._in_flight is not None
        run = islice(merge.run, min(step.slots, step.tokens))
        counts = self._in_flight.add_quiet(run, self.kv_cache.append_block)
        if counts.num_seqs:
            step.add_decodes(merge.residents[merge.index], counts)
            merge.index += counts.num_seqs

    def _admit(self, head: Request, merge: Merge[Request], step: Step, now: float) -> bool:
        """Move the head of the waiting heap to its rank among the residents.

        It may use the slots and blocks of exactly the residents that it may displace, and
        is admitted only if its whole need is met; otherwise nothing changes.
        """
        resident, index = self.resident, merge.index
        if not (
            step.may_start(head, head.leader.num_tokens)
            and fits_slots(head, resident, index, step.slots, self.table.num_groups > 0)
        ):
            return False
        first_victim = len(resident)
        if self.mode.lets_waiting_take_blocks:
            first_victim = first_displaceable(head, resident, index)
        if not self._ladder.extend(head, first_victim, now, is_admission=True):
            return False
        if head.life.first_scheduled_time is None:
            cached = head.leader.num_computed_tokens
            head.num_cached_tokens = min(cached, head.num_prompt_tokens)
        self.table.move(head, _RUNNING, now)
        merge.refresh()
        return True

    def _place(self, request: Request, merge: Merge[Request], step: Step, now: float) -> bool:
        """Give a resident what it computes in this step: blocks, then tokens and time."""
        if any(sequence.lacks_blocks for sequence in request.live):
            if not self._ladder.extend(request, merge.index, now):
                return False
            if self._ladder.has_yields:  # a victim may be the first of the waiting requests now
                merge.refresh()
        want = want_of(request, self.config)
        outranks = bool(self.resident) and request.threshold < self.resident[-1].key
        count = step.fit(request, *want[1:], outranks=outranks)
        if not count:
            return False
        if request.status is not _RUNNING:
            self.table.move(request, _RUNNING, now)
        assert self._in_flight is not None
        for sequence in ready_sequences(request, self.config.block_size):
            each = count // want.num_rows
            row = self._in_flight.add(sequence, each)
            step.add(request, each, sequence.num_computed_tokens, num_logit_rows(row))
        return True

    def _end_step(self, step: Step) -> SchedulerOutput:
        self._is_short_of_time = step.is_short_of_time
        assert self._in_flight is not None
        features = step.features
        return SchedulerOutput(
            self._num_steps,
            self._in_flight.fields,
            *self._ladder.take_moves(),
            self._ladder.take_yields(),
            features,
            self.cost_model.predict_ms(features),
        )

    # ------------------------------------------------------------------ small parts

    def _advance(self, now: float | None) -> float:
        if now is not None and now > self.now:
            self.now = now
        return self.now

    def _sequence(self, request_id: str, index: int) -> Sequence:
        for sequence in self.table.get(request_id).live:
            if sequence.index == index:
                return sequence
        raise UnknownRequest(f"request {request_id!r} has no unfinished choice {index}")

    def _rank(self, request: Request) -> None:
        request.key = (*self.policy.key(request), request.arrival_order)
        request.threshold = self.policy.threshold(request)
        request.displaces = NOBODY if self.mode is PreemptionMode.NONE else request.threshold
        if self.config.is_timed:
            request.slo, request.first_step_ms = self.slos.bounds_of(request.priority)

    def _has_urgent(self) -> bool:
        """Whether one of the residents and the first waiting request outranks another of them."""
        resident, head = self.resident, self.table.next_waiting()
        if not resident:
            return False
        ranked = [resident[0], resident[-1], *([] if head is None else [head])]
        return min(ranked).threshold < max(ranked).key
