"""What a step costs: a linear model of its time, fitted while the engine runs.

::

    step_ms ≈ c0 + c1·prefill_tokens + c2·decode_seqs + c3·context_tokens + c4·prefill_context

It decides how much fits into a step of bounded time, whether swapping or recomputing is the
cheaper way to take blocks, and what wait to tell a client; and it is data that the operator can
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from headway.core.errors import ConfigError

__all__ = ["Coefficients", "CostModel", "StepFeatures", "TimeBudget"]


class StepFeatures(NamedTuple):
    """What a step's time depends on.

    Attributes:
        prefill_tokens: tokens of requests that compute more than one.
        decode_seqs: requests that compute one token.
        context_tokens: tokens that the decoding requests attend to, summed.
        prefill_context: tokens that each prefill token attends to, summed: for a chunk of n
            tokens after c others, n·(c + n/2).
    """

    prefill_tokens: int
    decode_seqs: int
    context_tokens: int
    prefill_context: float = 0.0


class Coefficients(NamedTuple):
    """What a step, and each of its features, costs (ms)."""

    step: float
    prefill_token: float
    decode_seq: float
    context_token: float
    prefill_context: float


_DIM = range(len(Coefficients._fields))


class CostModel:
    """Recursive least squares with exponential forgetting, O(1) a step.

    The update is the standard one (Haykin, *Adaptive Filter Theory*, ch. 10): with input x,
    inverse correlation P and forgetting λ, gain k = Px / (λ + xᵀPx), error e = y − cᵀx,
    c += k·e, P = (P − k xᵀP) / λ. Inputs are scaled to about 1, so that one initial P fits all,
    and P's trace is bounded: a load that never varies must not blow it up. A coefficient that
    noise drives below zero is read as zero.

    Args:
        coefficients: first guess, in ms (a step; a prefill token; a decoding sequence; a
            context token; a prefill token's context token); those left out are 0.
        swap_ms_per_block: first guess of copying one block one way.
        forgetting: weight of the past per step, in (0, 1].

    Raises:
        ConfigError: ``forgetting`` is out of range.
    """

    _SCALES = (1.0, 1 / 128, 1 / 16, 1 / 8192, 1 / 65536)
    _INITIAL_VARIANCE = 1e3
    _MAX_TRACE = 4e3

    def __init__(
        self,
        coefficients: Sequence[float] = (5.0, 0.6, 0.8, 0.0005, 0.0002),
        swap_ms_per_block: float = 0.1,
        forgetting: float = 0.995,
    ) -> None:
        if not 0 < forgetting <= 1:
            raise ConfigError(f"forgetting is {forgetting}, must be above 0 and at most 1")
        self._forgetting = forgetting
        #: Coefficients of the scaled inputs.
        self._weights = [c / s for c, s in zip_longest(coefficients, self._SCALES, fillvalue=0.0)]
        #: Inverse correlation of the scaled inputs, symmetric.
        self._p = [[self._INITIAL_VARIANCE * (i == j) for j in _DIM] for i in _DIM]
        #: Steps observed.
        self.num_observations = 0
        #: Copying one block between the pool and the swap space, one way.
        self.swap_ms_per_block = swap_ms_per_block

    @property
    def coefficients(self) -> Coefficients:
        """What each feature costs, in ms; none below 0."""
        w0, w1, w2, w3, w4 = self._weights
        s0, s1, s2, s3, s4 = self._SCALES
        return Coefficients(
            max(0.0, w0 * s0),
            max(0.0, w1 * s1),
            max(0.0, w2 * s2),
            max(0.0, w3 * s3),
            max(0.0, w4 * s4),
        )

    def predict_ms(self, features: StepFeatures) -> float:
        """Expected duration of a step."""
        c0, c1, c2, c3, c4 = self.coefficients
        return (
            c0
            + c1 * features.prefill_tokens
            + c2 * features.decode_seqs
            + c3 * features.context_tokens
            + c4 * features.prefill_context
        )

    def recompute_ms(self, num_prefill_tokens: int, num_replayed_tokens: int) -> float:
        """Expected cost of computing tokens again: some by prefill, some one a step.

        A step that replays a token may replay or decode others' beside it; that it does not is
        the cautious guess, since a victim returns when others have ended.
        """
        c0, c1, c2, _, _ = self.coefficients
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
        self._p = [[(self._p[i][j] - gain[i] * px[j]) / lam for j in _DIM] for i in _DIM]
        trace = sum(self._p[i][i] for i in _DIM)
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

    __slots__ = ("costs", "limit_ms", "max_ms", "spent_ms")

    def __init__(self, cost_model: CostModel, max_ms: float) -> None:
        self.costs = cost_model.coefficients
        self.spent_ms = self.costs.step
        #: What no step may take; infinite = no bound.
        self.max_ms = max_ms
        #: What those in this step allow; at most ``max_ms``.
        self.limit_ms = max_ms

    def tighten(self, limit_ms: float) -> None:
        """Let the step take no longer than ``limit_ms``, for the sake of somebody in it."""
        self.limit_ms = min(self.limit_ms, limit_ms)

    def price(self, count: int, num_context_tokens: int) -> float:
        """What ``count`` tokens of a request cost after ``num_context_tokens`` others (ms)."""
        costs = self.costs
        if count == 1:
            return costs.decode_seq + costs.context_token * num_context_tokens
        each = costs.prefill_token + costs.prefill_context * (num_context_tokens + count / 2)
        return each * count

    def allows(self, num_context_tokens: int, limit_ms: float | None = None) -> bool:
        """Whether a request may start, be it with one token of prefill or by decoding.

        Args:
            num_context_tokens: that it attends to.
            limit_ms: of the step as far as this request goes; None = ``self.limit_ms``.
        """
        limit = self.limit_ms if limit_ms is None else limit_ms
        prefill = self.costs.prefill_token + self.costs.prefill_context * num_context_tokens
        return max(self.price(1, num_context_tokens), prefill) <= limit - self.spent_ms

    def affordable(
        self, count: int, num_context_tokens: int, is_first: bool, limit_ms: float | None = None
    ) -> int:
        """How many of ``count`` tokens still fit; arguments as of ``allows``.

        The first-ranked request always gets some, so that every step makes progress.
        """
        left = (self.limit_ms if limit_ms is None else limit_ms) - self.spent_ms
        price = self.price(count, num_context_tokens)
        if price <= left:
            return count
        if count == 1:
            return int(is_first)
        # By the average price of the whole chunk: a token of a shorter one costs no more.
        fitting = int(left / price * count)
        if fitting < 1 and self.allows(num_context_tokens, limit_ms):
            fitting = 1  # rounding, or that average, must not deny what was granted
        return max(fitting, int(is_first), 0)

    def spend(self, count: int, num_context_tokens: int) -> None:
        """Count ``count`` tokens of one request as spent."""
        self.spent_ms += self.price(count, num_context_tokens)
