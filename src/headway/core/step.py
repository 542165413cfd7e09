"""What one step may still hold: slots, tokens and time, and which requests may share it.

Blocks are the fourth budget; they are the block manager's. The rules here are the same for
Headway's own engine and inside vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from headway.core.cost_model import StepFeatures
from headway.core.policy import Key
from headway.core.ranking import end_of_equals, start_of_equals
from headway.core.sharing_rules import SharingRules
from headway.core.step_rows import DecodeCounts
from headway.core.time_budget import TimeBudget
from headway.core.time_sharing import NO_SHARES, Sharer, Want, affordable, share_time, spend

__all__ = ["Placeable", "Step", "UrgencyMemory"]

#: How long more urgent work is expected after it was seen (seconds).
_MEMORY_S: Final = 60.0


class Placeable(Sharer, Protocol):
    """A request that may be placed in a step."""

    #: What the step may take that computes its first token (ms); infinite = no bound.
    @property
    def first_step_ms(self) -> float: ...

    #: Whether no token of it has been generated.
    @property
    def awaits_first_token(self) -> bool: ...

    #: The last step it was in; counted while steps are bounded in time.
    last_step: int


class UrgencyMemory:
    """Whether more urgent work than other work is about: there, or there a minute ago."""

    def __init__(self) -> None:
        self._until = -math.inf

    def holds(self, is_present: bool, now: float) -> bool:
        """Whether it is expected at ``now`` (s); ``is_present``: it is there."""
        if is_present:
            self._until = now + _MEMORY_S
        return now < self._until


class Step:
    """The budgets of one step, and what has been placed in it, from the top of the ranking.

    A waiting request may be added after residents that it does not outrank by enough to displace
    them, although its rank is above theirs.

    Args:
        number: of the step.
        slots: sequences that it may hold.
        tokens: that it may compute.
        time: what it may take; None = steps are not bounded in time.
        rules: what less urgent work gets beside more urgent work.
        prefill_tokens: of the tokens, those that prompts may have which no present request has to
            wait for; None = no bound.
    """

    __slots__ = (
        "_barrier",
        "_context_tokens",
        "_decode_seqs",
        "_logit_rows",
        "_prefill_context",
        "_prefill_count",
        "_prefill_tokens",
        "_share_ms",
        "_shares",
        "_urgent_prefill_tokens",
        "first",
        "is_short_of_time",
        "number",
        "slots",
        "time",
        "tokens",
    )

    def __init__(
        self,
        number: int,
        slots: int,
        tokens: int,
        time: TimeBudget | None,
        rules: SharingRules,
        prefill_tokens: int | None = None,
    ) -> None:
        self.number = number
        #: Sequences that still fit.
        self.slots = slots
        #: Tokens that still fit.
        self.tokens = tokens
        #: What is left of the time; None = no bound.
        self.time = time
        #: The first-ranked request in the step; a request that it outranks rides along.
        self.first: Placeable | None = None
        #: Whether a request would have computed more, had there been time.
        self.is_short_of_time = False
        self._share_ms = rules.share_ms
        self._prefill_tokens = prefill_tokens
        self._urgent_prefill_tokens = 0
        #: Of the time, by request id, where it was too short in the step before.
        self._shares: Mapping[str, int] = NO_SHARES
        #: No request with a key above it is in this step: a first token does not wait for
        #: requests that it outranks.
        self._barrier: Key | None = None
        self._prefill_count = self._decode_seqs = self._context_tokens = self._logit_rows = 0
        self._prefill_context = 0.0

    @property
    def is_full(self) -> bool:
        """Whether no slot or no token is left."""
        return self.slots <= 0 or self.tokens <= 0

    # ------------------------------------------------------------------ who may be in it

    def bars(self, request: Placeable) -> bool:
        """Whether neither ``request`` nor any that ranks below it may be in the step."""
        if self._barrier is not None and request.key > self._barrier:
            return True
        return self._share_ms == 0.0 and self.rides(request)

    def rides(self, request: Placeable) -> bool:
        """Whether a more urgent request is in the step, by enough to displace ``request``."""
        return self.first is not None and request.key > self.first.threshold

    def may_start(self, request: Placeable, num_context_tokens: int) -> bool:
        """Whether there is time for a waiting request that attends to so many tokens."""
        if self.time is None or self.first is None:
            return True
        return self.time.allows(num_context_tokens, self._limit_ms(request, self.time))

    # ------------------------------------------------------------------ how much it may compute

    def share(self, wants: Sequence[Want]) -> None:
        """Let the residents among which the step's time runs out take turns. O(residents).

        The requests above them get what they want; for the requests below them nothing is left.
        To be called before anything is added, if the step before was short of time.

        Args:
            wants: of all residents, in rank order.
        """
        time = self.time
        assert time is not None and self.first is None
        limit_ms, spent_ms = time.limit_ms, time.spent_ms
        spent_before: list[float] = []
        first_rider = 0
        for index, want in enumerate(wants):
            spent_before.append(time.spent_ms)
            if self._share_ms < math.inf and want.request.key > wants[0].request.threshold:
                first_rider = first_rider or index
                time.limit_ms = min(time.limit_ms, self._share_ms)
            if want.request.slo is not None:
                time.tighten(want.request.slo.max_step_ms)
            if affordable(time, want, is_first=False) < want.num_tokens:
                residents = [want.request for want in wants]
                # A request that does not ride has its time before the riders have theirs.
                above = max(first_rider, start_of_equals(residents, index))
                below = end_of_equals(residents, index)
                time.spent_ms = spent_before[above]
                self._shares = share_time(wants[above:below], time, has_first=not above)
                break
            spend(time, want)
        time.limit_ms, time.spent_ms = limit_ms, spent_ms

    def fit(
        self,
        request: Placeable,
        wanted: int,
        num_rows: int = 1,
        num_logit_rows: int = 0,
        num_drafts: int = 0,
        *,
        outranks: bool = False,
    ) -> int:
        """How many of ``wanted`` tokens the step has room for; ``add`` spends them.

        Args:
            request: next in rank.
            wanted: tokens that it could compute, at least 1.
            num_rows: sequences that compute them, in equal parts; all of the sequences or none.
            num_logit_rows: rows of logits that are read for them.
            num_drafts: of the tokens, drafts, which are no part of a prompt.
            outranks: whether a request is present that it outranks.
        """
        count = min(wanted, self.tokens)
        if num_rows > 1 and num_rows > self.slots:
            return 0
        if wanted - num_drafts > num_rows and self._prefill_tokens is not None:
            count = self._fit_prefill(count, outranks)
        count -= count % num_rows
        if count and self.time is not None:
            count = self._fit_time(request, count, num_rows, num_logit_rows, self.time)
        return count

    def _fit_prefill(self, count: int, outranks: bool) -> int:
        """How many of a prompt's ``count`` tokens the rules for prompts allow.

        A prompt of a request that outranks another is what others are kept short for: beside it
        the prompts of others get no more than it does.
        """
        assert self._prefill_tokens is not None
        if outranks:
            self._urgent_prefill_tokens += count
            self._prefill_tokens = min(self._prefill_tokens, self._urgent_prefill_tokens)
            return count
        if self.first is None:
            return count
        count = min(count, self._prefill_tokens)
        self._prefill_tokens -= count
        return count

    def _fit_time(
        self, request: Placeable, count: int, num_rows: int, num_logit_rows: int, time: TimeBudget
    ) -> int:
        if self._share_ms < math.inf and self.rides(request):
            # Not ``tighten``, which leaves some time to all: a rider has no claim to any.
            time.limit_ms = min(time.limit_ms, self._share_ms)
        share = min(count, self._shares.get(request.request_id, count))
        share -= share % num_rows
        if num_rows > 1 and not share and self.first is None:
            # The first of all gets a token in any case, and what it would compute was asked before
            # it got blocks: then of its leader, perhaps.
            share = num_rows
        if share:
            share = affordable(
                time,
                Want(request, share, num_rows, num_logit_rows),
                is_first=self.first is None,
                limit_ms=self._limit_ms(request, time),
            )
        if share < count:
            self.is_short_of_time = True
        return share

    def _limit_ms(self, request: Placeable, time: TimeBudget) -> float:
        """What the step may take as far as ``request`` goes (ms).

        A request that awaits its first token is not cut by a bound that is meant for its class
        beside it: its class has a bound for that step. A more urgent class is kept its own.
        """
        slo = request.slo
        if slo is None or slo.ttft_ms is None or not request.awaits_first_token:
            return time.limit_ms
        above = None if self.first is None else self.first.slo
        if above is not None and above.priority < slo.priority:
            return time.limit_ms
        return max(time.limit_ms, request.first_step_ms, time.floor_ms)

    # ------------------------------------------------------------------ what is in it

    def add(
        self,
        request: Placeable,
        num_tokens: int,
        num_computed: int,
        num_logit_rows: int = 0,
    ) -> None:
        """Count a sequence of ``request`` as being in the step.

        Args:
            request: whose sequence it is.
            num_tokens: that it computes.
            num_computed: tokens that these follow.
            num_logit_rows: rows of logits that are read for it.
        """
        if self.first is None or request.key < self.first.key:
            self.first = request
        self.slots -= 1
        self.tokens -= num_tokens
        self._logit_rows += num_logit_rows
        if self.time is not None:
            self._spend_time(request, num_tokens, num_computed, num_logit_rows, self.time)
        if num_tokens > 1:
            self._prefill_count += num_tokens
            self._prefill_context += num_tokens * (num_computed + num_tokens / 2)
        else:
            self._decode_seqs += 1
            self._context_tokens += num_computed

    def _spend_time(
        self,
        request: Placeable,
        num_tokens: int,
        num_computed: int,
        num_logit_rows: int,
        time: TimeBudget,
    ) -> None:
        time.spend(num_tokens, num_computed, num_logit_rows)
        request.last_step = self.number
        if request.slo is not None:
            time.tighten(request.slo.max_step_ms)
        if num_tokens > 1 and request.awaits_first_token:
            barrier = request.threshold
            self._barrier = barrier if self._barrier is None else min(barrier, self._barrier)

    def add_decodes(self, first: Placeable, counts: DecodeCounts) -> None:
        """Count sequences that compute one token each, ``first`` the first-ranked of them."""
        if self.first is None:
            self.first = first
        self.slots -= counts.num_seqs
        self.tokens -= counts.num_seqs
        self._decode_seqs += counts.num_seqs
        self._context_tokens += counts.num_context_tokens
        self._logit_rows += counts.num_logit_rows

    @property
    def features(self) -> StepFeatures:
        """What the step's time is predicted from."""
        return StepFeatures(
            self._prefill_count,
            self._decode_seqs,
            self._context_tokens,
            self._prefill_context,
            self._logit_rows,
        )
