"""When a request will have its turn: what a client that waits, or is turned away, is told.

Estimates from values only, so that they can be made anywhere: as things stand, no more urgent
request arrives, and none leaves early.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from headway.core.cost_model import Coefficients

__all__ = ["Forecast", "Work"]


class Work(NamedTuple):
    """What is left to do for a request.

    Attributes:
        prefill_tokens: prompt tokens that are not computed.
        output_tokens: tokens that it may generate yet, of each choice.
        context_tokens: tokens that its next one attends to.
        num_rows: sequences that generate them.
    """

    prefill_tokens: int
    output_tokens: int
    context_tokens: int
    num_rows: int = 1


class Forecast(NamedTuple):
    """What the engine expects of its own speed.

    Attributes:
        coefficients: what steps cost.
        step_limit_ms: what no step may take; infinite = no bound.
        max_num_seqs: sequences that are served at once, at most.
        num_pool_tokens: tokens that the KV pool holds.
        output_fraction: of the tokens that it may generate, what a request is expected to.
    """

    coefficients: Coefficients
    step_limit_ms: float
    max_num_seqs: int
    num_pool_tokens: int
    output_fraction: float = 1.0

    def slots_ms(self, residents: Iterable[Work]) -> Iterator[float]:
        """Times until one, two, three … of the residents have made room; there is no last.

        O(residents · log residents) when the first is asked for; O(1) for each after it.
        """
        works = list(residents)
        interval_ms = self._interval_ms(works)
        ends = sorted(self._busy_ms(work, interval_ms) for work in works) or [0.0]
        for num_rounds in itertools.count():
            for end in ends:
                yield num_rounds * ends[-1] + end

    def waits_ms(self, ranked: Sequence[Work]) -> list[float]:
        """For each request, the time until it is in a step, if it is not in one. O(requests).

        A fluid estimate: the work ahead of it, divided by the requests that are served at once;
        and no less than the prompts ahead take, which are computed one after the other.
        """
        num_slots = self._num_slots(ranked)
        interval_ms = self._interval_ms(ranked[:num_slots])
        waits_ms = []
        prefill_ms = busy_ms = 0.0
        for rank, work in enumerate(ranked):
            has_slot = rank < num_slots
            waits_ms.append(prefill_ms if has_slot else max(prefill_ms, busy_ms / num_slots))
            prefill_ms += work.prefill_tokens * self.coefficients.prefill_token
            busy_ms += self._busy_ms(work, interval_ms)
        return waits_ms

    def wait_ms(self, ahead: Sequence[Work]) -> float:
        """The same of one request, behind the others. O(others)."""
        return self.waits_ms([*ahead, Work(0, 1, 1)])[-1]

    def _num_slots(self, works: Sequence[Work]) -> int:
        """Requests that can be served at once: as many as there are slots, or blocks for."""
        longest = sum(self._longest(work) for work in works) or 1
        fitting = self.num_pool_tokens * len(works) // longest
        rows = sum(work.num_rows for work in works) or 1
        slots = self.max_num_seqs * max(1, len(works)) // rows
        return max(1, min(slots, fitting))

    def _longest(self, work: Work) -> int:
        return work.prefill_tokens + work.context_tokens + work.num_rows * work.output_tokens

    def _interval_ms(self, works: Sequence[Work]) -> float:
        """Time between two tokens of a request while all of them decode."""
        costs, limit_ms = self.coefficients, self.step_limit_ms
        rows = sum(work.num_rows for work in works)
        context = sum(work.num_rows * work.context_tokens for work in works)
        step_ms = costs.step + costs.decode_seq * rows + costs.context_token * context
        if not costs.step < limit_ms < step_ms:
            return step_ms
        # They take turns: a step of the longest duration is shared by as many as fit.
        return limit_ms * math.ceil((step_ms - costs.step) / (limit_ms - costs.step))

    def _busy_ms(self, work: Work, interval_ms: float) -> float:
        expected = max(1.0, work.output_tokens * self.output_fraction)
        return work.prefill_tokens * self.coefficients.prefill_token + expected * interval_ms
