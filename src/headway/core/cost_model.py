"""What a step costs: a linear model of its time, fitted while the engine runs.

::

    step_ms ≈ c0 + c1·prefill_tokens + c2·decode_seqs + c3·context_tokens

It decides how much fits into a step of bounded time, whether swapping or recomputing is the
cheaper way to take blocks, and what wait to tell a client; and it is data that the operator can
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headway.core.errors import ConfigError

__all__ = ["CostModel", "StepFeatures", "TimeBudget"]


class StepFeatures(NamedTuple):
    """What a step's time depends on.

    Attributes:
        prefill_tokens: tokens of requests that compute more than one.
        decode_seqs: requests that compute one token.
        context_tokens: tokens that the decoding requests attend to, summed.
    """

    prefill_tokens: int
    decode_seqs: int
    context_tokens: int


class CostModel:
    """Recursive least squares with exponential forgetting, O(1) a step.

    The update is the standard one (Haykin, *Adaptive Filter Theory*, ch. 10): with input x,
    inverse correlation P and forgetting λ, gain k = Px / (λ + xᵀPx), error e = y − cᵀx,
    c += k·e, P = (P − k xᵀP) / λ. Inputs are scaled to about 1, so that one initial P fits all,
    and P's trace is bounded: a load that never varies must not blow it up. A coefficient that
    noise drives below zero is read as zero.

    Args:
        coefficients: first guess, in ms (a step; a prefill token; a decoding sequence; a
            context token).
        swap_ms_per_block: first guess of copying one block one way.
        forgetting: weight of the past per step, in (0, 1].

    Raises:
        ConfigError: ``forgetting`` is out of range.
    """

    _SCALES = (1.0, 1 / 128, 1 / 16, 1 / 8192)
    _INITIAL_VARIANCE = 1e3
    _MAX_TRACE = 4e3

    def __init__(
        self,
        coefficients: Sequence[float] = (5.0, 0.6, 0.8, 0.0005),
        swap_ms_per_block: float = 0.1,
        forgetting: float = 0.995,
    ) -> None:
        if not 0 < forgetting <= 1:
            raise ConfigError(f"forgetting is {forgetting}, must be above 0 and at most 1")
        self._forgetting = forgetting
        #: Coefficients of the scaled inputs.
        self._weights = [c / s for c, s in zip(coefficients, self._SCALES, strict=True)]
        #: Inverse correlation of the scaled inputs, symmetric.
        self._p = [[self._INITIAL_VARIANCE * (i == j) for j in range(4)] for i in range(4)]
        #: Steps observed.
        self.num_observations = 0
        #: Copying one block between the pool and the swap space, one way.
        self.swap_ms_per_block = swap_ms_per_block

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """(ms a step, ms a prefill token, ms a decoding sequence, ms a context token)."""
        c0, c1, c2, c3 = (max(0.0, w * s) for w, s in zip(self._weights, self._SCALES, strict=True))
        return c0, c1, c2, c3

    def predict_ms(self, features: StepFeatures) -> float:
        """Expected duration of a step."""
        c0, c1, c2, c3 = self.coefficients
        return (
            c0
            + c1 * features.prefill_tokens
            + c2 * features.decode_seqs
            + c3 * features.context_tokens
        )

    def recompute_ms(self, num_prefill_tokens: int, num_replayed_tokens: int) -> float:
        """Expected cost of computing tokens again: some by prefill, some one a step.

        A step that replays a token may replay or decode others' beside it; that it does not is
        the cautious guess, since a victim returns when others have ended.
        """
        c0, c1, c2, _ = self.coefficients
        return c1 * num_prefill_tokens + (c0 + c2) * num_replayed_tokens

    def swap_ms(self, num_blocks: int) -> float:
        """Expected cost of copying blocks out and, later, in."""
        return 2 * num_blocks * self.swap_ms_per_block

    def observe(self, features: StepFeatures, measured_ms: float) -> None:
        """Learn from a measured step."""
        lam = self._forgetting
        x = [s * f for s, f in zip(self._SCALES, (1, *features), strict=True)]
        px = [sum(a * b for a, b in zip(row, x, strict=True)) for row in self._p]
        denominator = lam + sum(a * b for a, b in zip(x, px, strict=True))
        gain = [v / denominator for v in px]
        error = measured_ms - sum(w * v for w, v in zip(self._weights, x, strict=True))
        self._weights = [w + g * error for w, g in zip(self._weights, gain, strict=True)]
        self._p = [[(self._p[i][j] - gain[i] * px[j]) / lam for j in range(4)] for i in range(4)]
        trace = sum(self._p[i][i] for i in range(4))
        if trace > self._MAX_TRACE:
            shrink = self._MAX_TRACE / trace
            self._p = [[v * shrink for v in row] for row in self._p]
        self.num_observations += 1

    def observe_swap(self, num_blocks: int, measured_ms: float) -> None:
        """Learn from ``num_blocks`` blocks copied in ``measured_ms`` (moving average)."""
        if num_blocks:
            self.swap_ms_per_block += 0.2 * (measured_ms / num_blocks - self.swap_ms_per_block)


class TimeBudget:
    """The fourth budget of a step, beside slots, tokens and blocks: its predicted time."""

    __slots__ = ("limit_ms", "per_context", "per_prefill", "per_seq", "spent_ms")

    def __init__(self, cost_model: CostModel, limit_ms: float | None) -> None:
        self.limit_ms = limit_ms
        self.spent_ms, self.per_prefill, self.per_seq, self.per_context = cost_model.coefficients

    def allows(self, num_context_tokens: int) -> bool:
        """Whether a request may start, be it with one token of prefill or by decoding."""
        if self.limit_ms is None:
            return True
        decode = self.per_seq + self.per_context * num_context_tokens
        return max(decode, self.per_prefill) <= self.limit_ms - self.spent_ms

    def affordable(self, count: int, num_context_tokens: int, is_first: bool) -> int:
        """How many of ``count`` tokens still fit.

        The first-ranked request always gets some, so that every step makes progress.
        """
        assert self.limit_ms is not None
        left = self.limit_ms - self.spent_ms
        if count == 1:
            return int(is_first or self.per_seq + self.per_context * num_context_tokens <= left)
        # Rounding must not deny what ``allows`` has granted: a hair more than the quotient.
        fitting = left / self.per_prefill * (1 + 1e-12) if self.per_prefill > 0 else count
        return int(min(count, max(fitting, is_first)))

    def spend(self, count: int, num_context_tokens: int) -> None:
        """Count ``count`` tokens of one request as spent."""
        if count == 1:
            self.spent_ms += self.per_seq + self.per_context * num_context_tokens
        else:
            self.spent_ms += self.per_prefill * count
