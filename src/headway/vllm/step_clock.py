"""How long vLLM's steps take: measured from outside, to predict the next step.

With asynchronous scheduling a step is scheduled while the one before it runs. So a step's time is
counted from when it was scheduled or the one before it ended, whichever came later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from headway.core.cost_model import CostModel, StepFeatures
from headway.core.time_budget import TimeBudget

__all__ = ["StepClock"]


class StepClock:
    """Learns what steps take, and hands out budgets of time.

    Args:
        max_ms: what no step may take; infinite = no bound.
        min_chunk: tokens that the first in a step gets, however little time is left.
    """

    def __init__(self, max_ms: float, min_chunk: int) -> None:
        self.cost_model = CostModel()
        self._max_ms = max_ms
        self._min_chunk = min_chunk
        #: Of the steps in flight, in order: when it was scheduled (s), and what is in it.
        self._in_flight: deque[tuple[float, StepFeatures]] = deque()
        self._last_end = 0.0

    def budget(self) -> TimeBudget:
        """For the next step."""
        return TimeBudget(self.cost_model, self._max_ms, self._min_chunk)

    def begin(self, output: SchedulerOutput, requests: Mapping[str, Request], now: float) -> None:
        """A step was scheduled at ``now`` (s). O(requests in it)."""
        if output.total_num_scheduled_tokens:
            self._in_flight.append((now, _features(output, requests)))

    def end(self, output: SchedulerOutput, now: float) -> None:
        """The oldest step in flight has ended at ``now`` (s)."""
        if not output.total_num_scheduled_tokens:
            return
        start, features = self._in_flight.popleft()
        self.cost_model.observe(features, 1e3 * (now - max(start, self._last_end)))
        self._last_end = now


def _features(output: SchedulerOutput, requests: Mapping[str, Request]) -> StepFeatures:
    """What is in a step; requests already count what they compute in it as computed."""
    counts = output.num_scheduled_tokens
    num_tokens = output.total_num_scheduled_tokens
    if num_tokens == len(counts):  # the usual step: all requests decode
        context = sum([requests[request_id].num_computed_tokens for request_id in counts])
        return StepFeatures(0, num_tokens, context - num_tokens)
    prefill_tokens = context_tokens = 0
    prefill_context = 0.0
    for request_id, count in counts.items():
        computed = requests[request_id].num_computed_tokens - count
        if count == 1:
            context_tokens += computed
        else:
            prefill_tokens += count
            prefill_context += count * (computed + count / 2)
    return StepFeatures(
        prefill_tokens, num_tokens - prefill_tokens, context_tokens, prefill_context
    )
