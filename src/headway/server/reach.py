"""What the machine can promise: times to first token and per token, from its learnt costs.

The case that counts is an urgent request that arrives while the machine is full. It waits for the
step in flight, which may take as long as any step, and is then computed before all others, in as
many steps as its prompt needs.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from headway.core.cost_model import Coefficients
from headway.core.slo import SLO, TTFT_SHARE
from headway.core.time_budget import TimeBudget

__all__ = ["TYPICAL_PROMPT", "Reach", "format_ms"]

#: Tokens of the prompt that is spoken of: a question, or what the prefix cache lacks of a chat.
TYPICAL_PROMPT: Final = 100

#: Milliseconds among which the shortest target within reach is looked for, and how many halvings
#: find it.
_LONGEST_MS: Final = 1e9
_NUM_HALVINGS: Final = 64


class Reach(NamedTuple):
    """What can be promised to a request with a prompt of ``TYPICAL_PROMPT`` tokens.

    Attributes:
        costs: learnt by the cost model.
        max_num_batched_tokens: tokens in a step, at most.
        max_step_ms: what no step may be predicted to take, targets or not; infinite = no bound.
    """

    costs: Coefficients
    max_num_batched_tokens: int
    max_step_ms: float = math.inf

    def ttft_ms(self, step_limit_ms: float) -> float:
        """The time to first token when no step takes longer than a limit (infinite = no limit)."""
        costs = self.costs
        # As the scheduler does: no step is cut below a multiple of what every step costs.
        limit = max(step_limit_ms, TimeBudget.MIN_STEP * costs.step)
        in_flight = min(limit, costs.step + self._prefill_ms(self.max_num_batched_tokens))
        own = self._prefill_ms(TYPICAL_PROMPT)
        num_steps = max(
            math.ceil(own / (limit - costs.step)),
            math.ceil(TYPICAL_PROMPT / self.max_num_batched_tokens),
        )
        return in_flight + num_steps * costs.step + own

    def tpot_ms(self) -> float:
        """The time per token when steps are as short as they get."""
        costs = self.costs
        alone = costs.step + costs.decode_seq + costs.context_token * TYPICAL_PROMPT
        return max(alone, TimeBudget.MIN_STEP * costs.step)

    def shortest_ttft_ms(self) -> float:
        """The tightest target for the time to first token that can be kept.

        A tighter target makes steps shorter, and a prompt that is cut into more of them costs more.
        """
        low, high = 0.0, _LONGEST_MS
        for _ in range(_NUM_HALVINGS):
            target = (low + high) / 2
            if self.ttft_ms(min(self.max_step_ms, TTFT_SHARE * target)) <= target:
                high = target
            else:
                low = target
        return high

    def beyond(self, slo: SLO) -> list[str]:
        """The targets that cannot be kept, a line for each that says what can."""
        within = (
            ("ttft", slo.ttft_ms, self.shortest_ttft_ms()),
            ("tpot", slo.tpot_ms, self.tpot_ms()),
        )
        return [
            f"{slo.priority}:{name}={target:g}ms is beyond reach, about {format_ms(reachable)} is "
            f"within (a prompt of {TYPICAL_PROMPT} tokens)"
            for name, target, reachable in within
            if target is not None and target < reachable
        ]

    def _prefill_ms(self, num_tokens: int) -> float:
        """What tokens of a prompt cost, beside what a step does."""
        costs = self.costs
        return num_tokens * (costs.prefill_token + costs.prefill_context * num_tokens / 2)


def format_ms(ms: float) -> str:
    """A time that was estimated, with as many digits as it deserves."""
    return f"{ms:,.0f} ms" if ms >= 10 else f"{ms:.2g} ms"
