"""What a step costs: a linear model of its time, fitted while the engine runs.

::

    step_ms ≈ c0 + c1·prefill_tokens + c2·decode_seqs + c3·context_tokens + c4·prefill_context
              + c5·logit_rows

It decides how much fits into a step of bounded time, whether swapping or recomputing is the
cheaper way to take blocks, and what wait to tell a client; and it is data that the operator can
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Final, NamedTuple

__all__ = ["SMALL_CPU_COSTS", "SMALL_CPU_SWAP_MS", "Coefficients", "CostModel", "StepFeatures"]


class StepFeatures(NamedTuple):
    """What a step's time depends on.

    Attributes:
        prefill_tokens: tokens of requests that compute more than one.
        decode_seqs: requests that compute one token.
        context_tokens: tokens that the decoding requests attend to, summed.
        prefill_context: tokens that each prefill token attends to, summed: for a chunk of n
            tokens after c others, n·(c + n/2).
        logit_rows: tokens whose logits are read on the host: for sampling other than the model's
            own greedy choice, penalties or log-probabilities.
    """

    prefill_tokens: int
    decode_seqs: int
    context_tokens: int
    prefill_context: float = 0.0
    logit_rows: int = 0


class Coefficients(NamedTuple):
    """What a step, and each of its features, costs (ms)."""

    step: float
    prefill_token: float
    decode_seq: float
    context_token: float
    prefill_context: float
    logit_row: float


#: A first guess for a model of a hundred million parameters on a few CPU cores, for where nothing
#: is known of the machine. An executor that knows better gives the cost model its own guess.
SMALL_CPU_COSTS: Final = Coefficients(
    step=5.0,
    prefill_token=0.6,
    decode_seq=0.8,
    context_token=0.0005,
    prefill_context=0.0002,
    logit_row=0.2,
)
#: The same machine's time to copy a block between the pool and the swap space, one way.
SMALL_CPU_SWAP_MS: Final = 0.1

_DIM: Final = len(Coefficients._fields)


class CostModel:
    """A Kalman filter on the coefficients, O(1) a step.

    The coefficients are unknowns that wander around a first guess w̄ (an Ornstein-Uhlenbeck prior
    with covariance Q̄): before each step w = w̄ + a·(w − w̄), P = a²P + (1 − a²)Q̄; then the standard
    update (Kalman, 1960) with input x, gain k = Px / (r + xᵀPx), w += k·(y − wᵀx), P −= k xᵀP.
    Q̄ says that the machine as a whole may be slower or faster, and each coefficient a little
    besides, so a few steps of one kind tell about the others; what a load does not show is
    remembered, and no load, however monotonous, makes the model wind up. From time to time the
    model calibrates itself: w̄ becomes what has been learnt.

    The filter holds no machine's times. Noise r is relative to what is expected of the step, and
    covariance Q̄ to w̄. A coefficient that is next to nothing in w̄ would be certain to stay so;
    therefore its deviations are relative to a tenth of the *unit*, which is the time that w̄
    expects of a step with a typical amount of every feature. A machine whose steps take
    microseconds is learnt like a machine whose steps take seconds.

    A step that took several times what was expected says more about the machine than about the
    step (a kernel was compiled, another process ran): it counts as twice what was expected. A
    coefficient that noise drives below zero is read as zero.

    Args:
        coefficients: first guess, in ms, in the order of ``Coefficients``; those left out are 0.
            If all are 0, the first step's time, divided evenly, becomes the guess.
        swap_ms_per_block: first guess of copying one block one way.
    """

    #: A typical step has about one of each input after scaling.
    _SCALES = (1.0, 1 / 128, 1 / 16, 1 / 8192, 1 / 65536, 1 / 16)
    #: Of the deviation from the guess, what is left after a step.
    _MEMORY = 0.999
    #: Standard deviations, relative: of a step's duration, of the speed of the machine, and of each
    #: coefficient besides.
    _NOISE, _COMMON, _OWN = 0.15, 0.5, 0.3
    #: Relative standard deviations of a guess that no step has checked: of each coefficient, and of
    #: all coefficients together but the first. What is in a step costs arithmetic, of which one
    #: machine does ten or a hundred times as much as another; a step's fixed cost varies by itself.
    _UNCHECKED_OWN, _UNCHECKED_COMMON = 1.0, 3.0
    #: Parts of the unit: the least that the deviations of a coefficient are relative to, and the
    #: least that the noise of a step is relative to.
    _LEAST_COEFFICIENT, _LEAST_STEP = 0.1, 0.01
    #: The least unit (ms): the resolution of clocks.
    _TICK_MS = 1e-6
    _MAX_SURPRISE = 2.0
    #: Calibrations, in steps: the first, and the longest time between two. Up to that the time
    #: doubles, so that a guess that is far off is soon replaced. Later calibrations go a part of
    #: the way each: what noise makes of a coefficient that the load does not show averages out.
    _FIRST_CALIBRATION, _CALIBRATION_INTERVAL, _LATER_PART = 16, 256, 0.1

    def __init__(
        self,
        coefficients: Sequence[float] = SMALL_CPU_COSTS,
        swap_ms_per_block: float = SMALL_CPU_SWAP_MS,
    ) -> None:
        #: Copying one block between the pool and the swap space, one way.
        self.swap_ms_per_block = swap_ms_per_block
        self._first_guess = [
            c / s for c, s in zip_longest(coefficients, self._SCALES, fillvalue=0.0)
        ]
        self.reset()

    def reset(self) -> None:
        """Forget what steps took; what swapping took is kept."""
        #: Steps observed.
        self.num_observations = 0
        self._next_calibration = self._FIRST_CALIBRATION
        self._start(self._first_guess)

    def _start(self, guess: list[float]) -> None:
        #: Coefficients of the scaled inputs.
        self._weights = guess
        self._expect(guess)
        #: Covariance of the weights.
        self._p = self._covariance(
            self._UNCHECKED_OWN, (0.0, *[self._UNCHECKED_COMMON] * (_DIM - 1))
        )

    def calibrate(self, part: float = 1.0) -> None:
        """Let the coefficients wander around what has been learnt from now on.

        Args:
            part: of the way from what they wandered around before.
        """
        self._expect(
            [max(m + part * (w - m), 0.0) for m, w in zip(self._mean, self._weights, strict=True)]
        )

    def _expect(self, mean: list[float]) -> None:
        #: What the weights wander around, none below 0, and the covariance of that.
        self._mean = mean
        #: What is expected of a step with one of each scaled input (ms).
        self._unit = max(sum(mean), self._TICK_MS)
        self._wander = self._covariance(self._OWN, (self._COMMON,) * _DIM)

    def _covariance(self, own: float, common: Sequence[float]) -> list[list[float]]:
        """Of independent relative deviations, and of one that all coefficients share."""
        mean, least = self._mean, self._LEAST_COEFFICIENT * self._unit
        shared = [c * m for c, m in zip(common, mean, strict=True)]
        return [
            [u * v + (i == j) * (own * max(mean[i], least)) ** 2 for j, v in enumerate(shared)]
            for i, u in enumerate(shared)
        ]

    @property
    def coefficients(self) -> Coefficients:
        """What each feature costs, in ms; none below 0."""
        w0, w1, w2, w3, w4, w5 = self._weights
        s0, s1, s2, s3, s4, s5 = self._SCALES
        return Coefficients(
            max(0.0, w0 * s0),
            max(0.0, w1 * s1),
            max(0.0, w2 * s2),
            max(0.0, w3 * s3),
            max(0.0, w4 * s4),
            max(0.0, w5 * s5),
        )

    def predict_ms(self, features: StepFeatures) -> float:
        """Expected duration of a step."""
        c0, c1, c2, c3, c4, c5 = self.coefficients
        return (
            c0
            + c1 * features.prefill_tokens
            + c2 * features.decode_seqs
            + c3 * features.context_tokens
            + c4 * features.prefill_context
            + c5 * features.logit_rows
        )

    def recompute_ms(self, num_tokens: int) -> float:
        """Expected cost of computing tokens again, in steps that there would be anyway."""
        return self.coefficients.prefill_token * num_tokens

    def swap_ms(self, num_blocks: int) -> float:
        """Expected cost of copying blocks out and, later, in."""
        return 2 * num_blocks * self.swap_ms_per_block

    def observe(self, features: StepFeatures, measured_ms: float) -> None:
        """Learn from a measured step."""
        x0, x1, x2, x3, x4, x5 = x = [
            s * f for s, f in zip(self._SCALES, (1, *features), strict=True)
        ]
        if not any(self._mean):
            self._start([max(measured_ms, self._TICK_MS) / sum(x)] * _DIM)
        mean = self._mean
        a, a2 = self._MEMORY, self._MEMORY**2
        weights = [m + a * (w - m) for w, m in zip(self._weights, mean, strict=True)]
        expected_ms = sum([w * v for w, v in zip(weights, x, strict=True)])
        guess_ms = sum([m * v for m, v in zip(mean, x, strict=True)])
        least_ms = self._LEAST_STEP * self._unit
        scale_ms = max(expected_ms, least_ms)
        pace = (1 - a2) * max(1.0, scale_ms / max(guess_ms, least_ms)) ** 2
        p = [
            [a2 * v + pace * q for v, q in zip(row, wander, strict=True)]
            for row, wander in zip(self._p, self._wander, strict=True)
        ]
        px = [
            p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3 + p4 * x4 + p5 * x5
            for p0, p1, p2, p3, p4, p5 in p
        ]
        noise = (self._NOISE * scale_ms) ** 2 + sum([u * v for u, v in zip(x, px, strict=True)])
        error = min(measured_ms, self._MAX_SURPRISE * scale_ms) - expected_ms
        gain = [v / noise for v in px]
        self._weights = [w + g * error for w, g in zip(weights, gain, strict=True)]
        self._p = [
            [v - g * u for v, u in zip(row, px, strict=True)]
            for row, g in zip(p, gain, strict=True)
        ]
        self.num_observations += 1
        if self.num_observations == self._next_calibration:
            is_early = self._next_calibration < self._CALIBRATION_INTERVAL
            self._next_calibration += min(self._next_calibration, self._CALIBRATION_INTERVAL)
            self.calibrate(1.0 if is_early else self._LATER_PART)

    def observe_swap(self, num_blocks: int, measured_ms: float) -> None:
        """Learn from ``num_blocks`` blocks copied in ``measured_ms`` (moving average)."""
        if num_blocks:
            self.swap_ms_per_block += 0.2 * (measured_ms / num_blocks - self.swap_ms_per_block)
