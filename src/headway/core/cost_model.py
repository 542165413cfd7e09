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
    """A Kalman filter on the coefficients, O(1) a step.

    The coefficients are unknowns that wander around a first guess w̄ (an Ornstein-Uhlenbeck prior
    with covariance Q̄): before each step w = w̄ + a·(w − w̄), P = a²P + (1 − a²)Q̄; then the standard
    update (Kalman, 1960) with input x, gain k = Px / (r + xᵀPx), w += k·(y − wᵀx), P −= k xᵀP.
    Q̄ says that the machine as a whole may be slower or faster, and each coefficient a little
    besides, so a few steps of one kind tell about the others; what a load does not show is
    remembered, and no load, however monotonous, makes the model wind up. From time to time the
    guess becomes what has been learnt. Q̄ and the noise r are relative to what is expected.

    A step that took several times what was expected says more about the machine than about the
    step (a kernel was compiled, another process ran): it counts as twice what was expected. A
    coefficient that noise drives below zero is read as zero. Inputs are scaled to about 1.

    Args:
        coefficients: first guess, in ms (a step; a prefill token; a decoding sequence; a
            context token; a prefill token's context token); those left out are 0.
        swap_ms_per_block: first guess of copying one block one way.
    """

    _SCALES = (1.0, 1 / 128, 1 / 16, 1 / 8192, 1 / 65536)
    _DEFAULTS = (5.0, 0.6, 0.8, 0.0005, 0.0002)
    #: Of the deviation from the guess, what is left after a step.
    _MEMORY = 0.999
    #: Standard deviations, relative: of a step's duration, of the speed of the machine, of each
    #: coefficient besides, and of a guess that nobody has checked.
    _NOISE, _COMMON, _OWN, _UNCHECKED = 0.15, 0.5, 0.3, 3.0
    _MAX_SURPRISE = 2.0
    _CALIBRATION_INTERVAL = 256

    def __init__(
        self,
        coefficients: Sequence[float] = _DEFAULTS,
        swap_ms_per_block: float = 0.1,
    ) -> None:
        #: Copying one block between the pool and the swap space, one way.
        self.swap_ms_per_block = swap_ms_per_block
        self._first_guess = [
            c / s for c, s in zip_longest(coefficients, self._SCALES, fillvalue=0.0)
        ]
        self.reset()

    def reset(self) -> None:
        """Forget what steps took; what swapping took is kept."""
        #: Coefficients of the scaled inputs.
        self._weights = list(self._first_guess)
        #: What they wander around, and the covariance of that.
        self._mean = self._weights
        self._wander = self._prior(self._OWN, self._COMMON)
        #: Covariance of the weights.
        self._p = self._prior(self._UNCHECKED, 0.0)
        #: Steps observed.
        self.num_observations = 0

    def calibrate(self) -> None:
        """Take what has been learnt for the guess from now on."""
        self._mean = [
            max(w, 0.05 * d / s)
            for w, d, s in zip(self._weights, self._DEFAULTS, self._SCALES, strict=True)
        ]
        self._wander = self._prior(self._OWN, self._COMMON)

    def _prior(self, own: float, common: float) -> list[list[float]]:
        """The covariance of independent relative deviations and of one that all share."""
        mean = self._mean
        spread = [
            own * max(w, 0.3 * d / s)
            for w, d, s in zip(mean, self._DEFAULTS, self._SCALES, strict=True)
        ]
        return [
            [spread[i] ** 2 * (i == j) + common**2 * mean[i] * mean[j] for j in _DIM] for i in _DIM
        ]

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
        a, a2 = self._MEMORY, self._MEMORY**2
        x = [s * f for s, f in zip(self._SCALES, (1, *features), strict=True)]
        guess_ms = sum(m * v for m, v in zip(self._mean, x, strict=True))
        weights = [m + a * (w - m) for w, m in zip(self._weights, self._mean, strict=True)]
        expected_ms = sum(w * v for w, v in zip(weights, x, strict=True))
        scale_ms = max(expected_ms, 1.0)
        pace = (1 - a2) * max(1.0, scale_ms / max(guess_ms, 1.0)) ** 2
        p = [
            [a2 * v + pace * q for v, q in zip(row, wander, strict=True)]
            for row, wander in zip(self._p, self._wander, strict=True)
        ]
        px = [sum(u * v for u, v in zip(row, x, strict=True)) for row in p]
        noise = (self._NOISE * scale_ms) ** 2 + sum(u * v for u, v in zip(x, px, strict=True))
        error = min(measured_ms, self._MAX_SURPRISE * scale_ms) - expected_ms
        gain = [v / noise for v in px]
        self._weights = [w + g * error for w, g in zip(weights, gain, strict=True)]
        self._p = [
            [v - g * u for v, u in zip(row, px, strict=True)]
            for row, g in zip(p, gain, strict=True)
        ]
        self.num_observations += 1
        if self.num_observations % self._CALIBRATION_INTERVAL == 0:
            self.calibrate()

    def observe_swap(self, num_blocks: int, measured_ms: float) -> None:
        """Learn from ``num_blocks`` blocks copied in ``measured_ms`` (moving average)."""
        if num_blocks:
            self.swap_ms_per_block += 0.2 * (measured_ms / num_blocks - self.swap_ms_per_block)


class TimeBudget:
    """The fourth budget of a step, beside slots, tokens and blocks: its predicted time.

    No bound is kept at any price: a step may take ``MIN_STEP`` times its fixed cost. On a machine
    that is too slow for a target, steps as short as the target would do next to nothing, and
    everybody would wait for ever so short steps.

    Args:
        cost_model: predicts.
        max_ms: what no step may take; infinite = no bound.
        min_chunk: tokens that the first-ranked request gets, however little time is left. Every
            step makes progress, and the model sees what a chunk takes: one that has come to think
            that no step is short enough is soon put right.
    """

    #: A fifth of a step, at least, is for what is in it.
    MIN_STEP = 1.25

    __slots__ = ("costs", "floor_ms", "limit_ms", "max_ms", "min_chunk", "spent_ms")

    def __init__(self, cost_model: CostModel, max_ms: float, min_chunk: int = 1) -> None:
        self.costs = cost_model.coefficients
        self.spent_ms = self.costs.step
        self.min_chunk = min_chunk
        self.floor_ms = self.MIN_STEP * self.costs.step
        #: What no step may take; infinite = no bound.
        self.max_ms = max(max_ms, self.floor_ms)
        #: What those in this step allow; at most ``max_ms``.
        self.limit_ms = self.max_ms

    def tighten(self, limit_ms: float) -> None:
        """Let the step take no longer than ``limit_ms``, for the sake of somebody in it."""
        if limit_ms < self.limit_ms:
            self.limit_ms = max(limit_ms, self.floor_ms)

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
        """How many of ``count`` tokens still fit; arguments as of ``allows``."""
        left = (self.limit_ms if limit_ms is None else limit_ms) - self.spent_ms
        price = self.price(count, num_context_tokens)
        if price <= left:
            return count
        if count == 1:
            return int(is_first)
        # By the average price of the whole chunk: a token of a shorter one costs no more.
        fitting = int(left / price * count) if price else 0
        if fitting < 1 and self.allows(num_context_tokens, limit_ms):
            fitting = 1  # rounding, or that average, must not deny what was granted
        return max(fitting, min(count, self.min_chunk) if is_first else 0)

    def spend(self, count: int, num_context_tokens: int) -> None:
        """Count ``count`` tokens of one request as spent."""
        self.spent_ms += self.price(count, num_context_tokens)
