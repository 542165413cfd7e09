"""The time that a step may take, as a budget beside its slots, tokens and blocks."""

from __future__ import annotations

from headway.core.cost_model import CostModel

__all__ = ["TimeBudget"]


class TimeBudget:
    """The fourth budget of a step, beside slots, tokens and blocks: its predicted time.

    No bound is kept at any price: a step may take ``MIN_STEP`` times its fixed cost. On a machine
    that is too slow for a target, steps as short as the target would compute next to nothing, and
    every request would wait for many such steps.

    ``logit_rows`` in the methods are the rows of logits that the host reads for the tokens in
    question: none for a chunk that ends before its prompt does, one for the token that a request
    samples in another way than greedily, one per prompt token whose log-probability is asked for.

    Args:
        cost_model: predicts.
        max_ms: what no step may take; infinite = no bound.
        min_chunk: tokens that the first-ranked request gets, however little time is left. So every
            step makes progress, and the model sees what a chunk takes: a model that has come to
            expect too much of every chunk is soon put right.
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
        #: What the requests in this step allow; at most ``max_ms``.
        self.limit_ms = self.max_ms

    def tighten(self, limit_ms: float) -> None:
        """Let the step take no longer than ``limit_ms``, for the sake of a request in it."""
        if limit_ms < self.limit_ms:
            self.limit_ms = max(limit_ms, self.floor_ms)

    def price(self, count: int, num_context_tokens: int, logit_rows: int = 0) -> float:
        """What ``count`` tokens of a request cost after ``num_context_tokens`` others (ms)."""
        costs = self.costs
        logits = costs.logit_row * logit_rows
        if count == 1:
            return costs.decode_seq + costs.context_token * num_context_tokens + logits
        each = costs.prefill_token + costs.prefill_context * (num_context_tokens + count / 2)
        return each * count + logits

    def allows(
        self, num_context_tokens: int, limit_ms: float | None = None, logit_rows: int = 0
    ) -> bool:
        """Whether a request may start, be it with one token of prefill or by decoding.

        Args:
            num_context_tokens: that the request attends to.
            limit_ms: of the step as far as this request goes; None = ``self.limit_ms``.
            logit_rows: of that one token, so at most 1.
        """
        limit = self.limit_ms if limit_ms is None else limit_ms
        costs = self.costs
        prefill = costs.prefill_token + costs.prefill_context * num_context_tokens
        decode = costs.decode_seq + costs.context_token * num_context_tokens
        return max(decode, prefill) + costs.logit_row * logit_rows <= limit - self.spent_ms

    def affordable(
        self,
        count: int,
        num_context_tokens: int,
        is_first: bool,
        limit_ms: float | None = None,
        logit_rows: int = 0,
    ) -> int:
        """How many of ``count`` tokens still fit.

        Args:
            count: tokens that the request would compute, at least 1.
            num_context_tokens: computed before them.
            is_first: whether the request is the first-ranked in the step, which gets
                ``min_chunk`` in any case.
            limit_ms: as of ``allows``.
            logit_rows: of all ``count`` tokens; fewer tokens are taken to need no larger part.
        """
        left = (self.limit_ms if limit_ms is None else limit_ms) - self.spent_ms
        price = self.price(count, num_context_tokens, logit_rows)
        if price <= left:
            return count
        if count == 1:
            return int(is_first)
        # By the average price of the whole chunk: a token of a shorter chunk costs no more.
        fitting = int(left / price * count) if price else 0
        if fitting < 1 and self.allows(num_context_tokens, limit_ms, min(logit_rows, 1)):
            fitting = 1  # rounding, or that average, must not deny what was granted
        return max(fitting, min(count, self.min_chunk) if is_first else 0)

    def spend(self, count: int, num_context_tokens: int, logit_rows: int = 0) -> None:
        """Count ``count`` tokens of a request as spent."""
        self.spent_ms += self.price(count, num_context_tokens, logit_rows)
