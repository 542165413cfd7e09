"""When will it be whose turn: what a client that waits, or is turned away, is told.

The unfinished requests are laid onto the slots in order of rank, each for as long as the cost model
expects it to take (list scheduling: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from operator import attrgetter

from headway.core.cost_model import StepFeatures
from headway.core.request import Request, RequestStatus
from headway.core.scheduler import PriorityScheduler

__all__ = ["Forecast"]

_KEY = attrgetter("key")


class Forecast:
    """Expected waits, as things stand: nobody more urgent arrives, and nobody leaves early."""

    #: Weight of the latest request in what requests generate of what they may.
    _LEARNING_RATE = 0.05

    def __init__(self, scheduler: PriorityScheduler) -> None:
        self._scheduler = scheduler
        #: Of ``max_tokens``, what a request is expected to generate.
        self.output_fraction = 1.0

    def observe_finished(self, request: Request) -> None:
        """Learn from a request that has ended by itself (moving average)."""
        fraction = request.num_output_tokens / request.max_tokens
        self.output_fraction += self._LEARNING_RATE * (fraction - self.output_fraction)

    def waits_ms(self) -> list[tuple[Request, float]]:
        """Every unfinished request, by rank, and the time until it is in a step. O(n log n)."""
        ranked = sorted(self._scheduler.requests.values(), key=_KEY)
        free = [0.0] * self._num_slots(ranked)
        interval_ms = self._interval_ms(ranked[: len(free)])
        waits = []
        prefilled_ms = 0.0
        for request in ranked:
            prefill_ms = self._prefill_ms(request)
            start = heapq.heappop(free)
            if prefill_ms:
                start = max(start, prefilled_ms)
                prefilled_ms = start + prefill_ms
            busy_ms = prefill_ms + self._remaining_tokens(request) * interval_ms
            heapq.heappush(free, start + busy_ms)
            waits.append((request, 0.0 if request.status is RequestStatus.RUNNING else start))
        return waits

    def next_slot_ms(self, count: int = 1) -> float:
        """Time until ``count`` of those who are resident have made room. O(residents · log)."""
        resident = self._scheduler.resident
        if not resident:
            return 0.0
        interval_ms = self._interval_ms(resident)
        ends = sorted(
            self._prefill_ms(request) + self._remaining_tokens(request) * interval_ms
            for request in resident
        )
        rounds, index = divmod(count - 1, len(ends))
        return rounds * ends[-1] + ends[index]

    def _num_slots(self, requests: Sequence[Request]) -> int:
        """Requests that can be served at once: as many as there are slots, or blocks for."""
        config = self._scheduler.config
        longest = sum(request.token_limit for request in requests) or 1
        fitting = config.num_blocks * config.block_size * len(requests) // longest
        return max(1, min(config.max_num_seqs, fitting))

    def _interval_ms(self, requests: Sequence[Request]) -> float:
        """Time between two tokens of a request while all of ``requests`` decode."""
        model, limit_ms = self._scheduler.cost_model, self._scheduler.config.step_limit_ms
        context = sum(request.num_tokens for request in requests)
        step_ms = model.predict_ms(StepFeatures(0, len(requests), context))
        fixed_ms = model.coefficients.step
        if not fixed_ms < limit_ms < step_ms:
            return step_ms
        # They take turns: a step of the longest duration is shared by as many as fit.
        return limit_ms * math.ceil((step_ms - fixed_ms) / (limit_ms - fixed_ms))

    def _prefill_ms(self, request: Request) -> float:
        left = request.num_prompt_tokens - request.num_computed_tokens
        return max(0, left) * self._scheduler.cost_model.coefficients.prefill_token

    def _remaining_tokens(self, request: Request) -> float:
        expected = request.max_tokens * self.output_fraction
        return max(1.0, expected - request.num_output_tokens)
