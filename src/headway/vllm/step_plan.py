"""One step, filled from the top of the ranking: which requests compute, which wait, which yield.

The walk is that of ``headway.core.scheduler``, with its merge, its step and its victims; what vLLM
bounds besides (LoRA adapters, the rows of the model runner) is added here. It ends in a plan that
vLLM's own ``schedule`` carries out: vLLM sees only the residents that are in the step, and admits
only as many waiting requests as have been planned.

vLLM serves running requests in the order of its list and then waiting requests. So a waiting
request has its turn after the residents that it may not displace; and a request may be given fewer
tokens than it could compute only if vLLM serves it last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from vllm.v1.request import Request

from headway.core.merge import Merge
from headway.core.ranking import first_displaceable
from headway.core.reclaim import plan_victims, victim_candidates
from headway.core.sharing_rules import SharingRules
from headway.core.step import Step
from headway.core.step_rows import DecodeCounts
from headway.core.time_sharing import Want
from headway.vllm.kv_blocks import KVBlocks, Need
from headway.vllm.ranked_request import RankedRequest

__all__ = ["StepLimits", "StepPlan"]


class StepLimits(NamedTuple):
    """What vLLM bounds in a step beside its slots, tokens, blocks and time.

    Attributes:
        num_free_rows: requests that may be admitted until a resident has to be evicted for its
            row in the model runner.
        max_prefill_tokens: that one request may compute.
        max_loras: adapters in the step; 0 = requests have none.
        num_spec_tokens: drafts that a request may bring.
        may_cut_prompts: whether a prompt may be computed in parts.
        holds_prompts: vLLM computes no prompts in this step, only the next tokens of residents.
        may_free: whether a request's blocks are free as soon as it is evicted.
    """

    num_free_rows: int
    max_prefill_tokens: int
    max_loras: int
    num_spec_tokens: int
    may_cut_prompts: bool
    holds_prompts: bool
    may_free: Callable[[Request], bool]


class StepPlan:
    """The plan of one step.

    Args:
        step: the budgets, nothing placed yet.
        rules: what less urgent work gets beside more urgent work, and which requests yield.
        limits: of vLLM.
        blocks: of the scheduler's pool.
    """

    def __init__(
        self, step: Step, rules: SharingRules, limits: StepLimits, blocks: KVBlocks
    ) -> None:
        self._step = step
        self._rules = rules
        self._limits = limits
        self._blocks = blocks
        #: The residents that compute, in rank order; one that is cut comes last.
        self.running: list[RankedRequest] = []
        #: The residents that sit the step out; their blocks stay.
        self.paused: list[RankedRequest] = []
        #: The residents that lose their blocks.
        self.evicted: list[RankedRequest] = []
        #: Waiting requests to admit.
        self.num_admitted = 0
        #: Tokens to compute.
        self.num_tokens = 0
        self._num_free_rows = limits.num_free_rows
        self._loras: set[int] = set()
        self._evicted_ids: set[str] = set()
        #: The resident that is given fewer tokens than it could compute.
        self._cut: RankedRequest | None = None
        #: Whether every resident finds a free block when it needs it.
        self._blocks_suffice = False
        #: Whether a resident that decodes needs nothing but a slot and a token.
        self._has_plain_decodes = False

    def fill(
        self,
        residents: Sequence[RankedRequest],
        heads: Iterator[RankedRequest],
        was_short_of_time: bool = False,
    ) -> None:
        """Walk down the ranking.

        Args:
            residents: all requests that are running or paused, in rank order.
            heads: waiting requests that could start now, in rank order.
            was_short_of_time: whether the step before was.
        """
        self._blocks.begin()
        self._blocks_suffice = self._blocks.suffice(len(residents), self._step.tokens)
        self._has_plain_decodes = (
            self._blocks_suffice
            and self._step.time is None
            and self._rules.share == "all"
            and not self._limits.max_loras
            and not self._limits.num_spec_tokens
        )
        if was_short_of_time and self._step.time is not None:
            self._step.share(self._wants(residents))
        merge = Merge(residents, lambda: next(heads, None), first_displaceable)
        while (ranked := self._next(merge)) is not None:
            if ranked is merge.head:
                if self._admit(ranked, merge):
                    merge.refresh()
                else:
                    merge.stop_admitting()  # what it could not get is not for requests below it
                continue
            merge.index += 1
            if not self._place(ranked, merge):
                merge.stop_admitting()
        self.paused += [ranked for ranked in merge.rest if not self._is_evicted(ranked)]
        if self._cut is not None:
            self.running.append(self._cut)

    def _next(self, merge: Merge[RankedRequest]) -> RankedRequest | None:
        """The next request for which the step may have room; None if there is none."""
        if self._has_plain_decodes:
            self._place_decodes(merge)
        ranked = merge.first
        if ranked is None or self._step.is_full or self._step.bars(ranked):
            return None
        return ranked

    # ------------------------------------------------------------------ residents

    def _place_decodes(self, merge: Merge[RankedRequest]) -> None:
        """Place the residents that come next, as long as each computes its next token.

        What ``_place`` would do, without looking at what cannot be: most steps are nothing else.
        """
        step = self._step
        run = list(islice(merge.run, min(step.slots, step.tokens)))
        for index, ranked in enumerate(run):
            if ranked.request.is_prefill_chunk:
                del run[index:]
                break
        merge.index += len(run)
        if self._evicted_ids:
            run = [ranked for ranked in run if not self._is_evicted(ranked)]
        if run:
            # What they attend to matters for the time only, which is not bounded.
            step.add_decodes(run[0], DecodeCounts(len(run), 0, 0))
            self.running += run
            self.num_tokens += len(run)

    def _place(self, ranked: RankedRequest, merge: Merge[RankedRequest]) -> bool:
        """Put a resident into the step, as far as there is room.

        Returns:
            Whether waiting requests that rank below it may be admitted: it lacks nothing.
        """
        if self._is_evicted(ranked):
            return True
        request = ranked.request
        if self._is_held(request) or not self._fits_loras(request):
            self.paused.append(ranked)
            return True
        wanted = self._wanted(request)
        outranks = ranked.threshold < merge.residents[-1].key
        num_drafts = len(request.spec_token_ids)
        count = 0
        if wanted:
            count = self._step.fit(ranked, wanted, num_drafts=num_drafts, outranks=outranks)
        is_cut = count < wanted
        # vLLM gives what is left to the request that it serves last: to an admitted one, if any.
        may_be_cut = count > 0 and self._cut is None and not self.num_admitted
        if (is_cut and not may_be_cut) or not self._grow(ranked, count, merge):
            self.paused.append(ranked)
            return False
        if is_cut:
            self._cut = ranked
        else:
            self.running.append(ranked)
        self._add(ranked, count)
        return not is_cut

    def _is_held(self, request: Request) -> bool:
        """Whether a resident's prompt has to wait for a later step, whatever there is room for."""
        return self._limits.holds_prompts and bool(request.is_prefill_chunk)

    def _wanted(self, request: Request) -> int:
        """Tokens that a running request could compute in this step; 0 = all are in flight."""
        placeholders = request.num_output_placeholders
        last = request.num_prompt_tokens + request.max_tokens
        if placeholders and request.num_computed_tokens + 2 - placeholders >= last:
            return 0  # vLLM waits for its last token, which is in flight
        count: int = request.num_tokens_with_spec + placeholders - request.num_computed_tokens
        return max(0, min(count, self._limits.max_prefill_tokens))

    def _wants(self, residents: Sequence[RankedRequest]) -> list[Want]:
        """What each resident would compute if time were no object."""
        wants = [
            Want(ranked, self._wanted(ranked.request))
            for ranked in residents
            if not self._is_held(ranked.request)
        ]
        return [want for want in wants if want.num_tokens]

    def _grow(self, ranked: RankedRequest, count: int, merge: Merge[RankedRequest]) -> bool:
        """Promise a resident the blocks for ``count`` tokens, at the cost of lower-ranked ones."""
        if self._blocks_suffice or not count:
            return True
        blocks = self._blocks
        needed = blocks.growth(ranked.request, count)
        shortage = needed - blocks.num_available
        if shortage > 0:
            limit = self._rules.max_preemptions
            victims = self._victims(merge.rest, shortage, limit)
            if not victims and limit is not None:
                victims = self._victims(merge.rest, shortage, None)
            if not victims:
                return False
            self._evict(victims)
        blocks.num_available -= needed
        return True

    # ------------------------------------------------------------------ waiting requests

    def _admit(self, head: RankedRequest, merge: Merge[RankedRequest]) -> bool:
        """Plan to admit a waiting request, at the cost of the residents that it may displace.

        Either its whole need can be met (slot, tokens, time, blocks, row), or none yields.

        Returns:
            Whether requests that rank below it may be admitted: it lacks nothing, or just an
            adapter.
        """
        if not self._fits_loras(head.request):
            return True
        blocks = self._blocks
        need = blocks.need(head.request)
        wanted = min(need.num_tokens, self._limits.max_prefill_tokens)
        count = self._head_tokens(head, wanted, need, merge)
        if not count:
            return False
        shortage = need.num_blocks - blocks.num_available
        if shortage > 0 or self._num_free_rows <= 0:
            limit = self._rules.max_preemptions
            victims = self._victims(merge.rest, max(shortage, 1), limit, need.cached_blocks)
            if not victims:
                return False
            self._evict(victims)
        blocks.num_available -= need.num_blocks
        self._num_free_rows -= 1
        self.num_admitted += 1
        self._add(head, count)
        return count == wanted

    def _head_tokens(
        self, head: RankedRequest, wanted: int, need: Need, merge: Merge[RankedRequest]
    ) -> int:
        """How many of ``wanted`` tokens of a waiting request fit; 0 = it has to wait."""
        head.num_cached_tokens = need.num_cached_tokens
        outranks = merge.index < len(merge.residents)  # it would not be its turn otherwise
        count = self._step.fit(head, wanted, outranks=outranks)
        if count < wanted and not self._limits.may_cut_prompts:
            return 0
        return count

    # ------------------------------------------------------------------ what is in the step

    def _add(self, ranked: RankedRequest, count: int) -> None:
        """Count a request as being in the step, with ``count`` tokens."""
        self._step.add(ranked, count, ranked.num_computed_tokens)
        self.num_tokens += count
        lora = ranked.request.lora_request
        if self._limits.max_loras and lora is not None:
            self._loras.add(lora.lora_int_id)

    def _fits_loras(self, request: Request) -> bool:
        """Whether the step has room for the request's adapter."""
        lora = request.lora_request
        if not self._limits.max_loras or lora is None or lora.lora_int_id in self._loras:
            return True
        return len(self._loras) < self._limits.max_loras

    # ------------------------------------------------------------------ victims

    def _is_evicted(self, ranked: RankedRequest) -> bool:
        return ranked.request_id in self._evicted_ids

    def _victims(
        self,
        residents: Sequence[RankedRequest],
        shortage: int,
        max_preemptions: int | None,
        cached_blocks: frozenset[int] = frozenset(),
    ) -> list[RankedRequest]:
        """The residents whose eviction frees ``shortage`` blocks; none if all hold too little.

        Args:
            residents: that the beneficiary may displace.
            shortage: at least 1.
            max_preemptions: residents that were evicted so often are spared; None = none is.
            cached_blocks: that the beneficiary is about to share.
        """
        blocks, rules = self._blocks, self._rules
        holders = [
            ranked
            for ranked in residents
            if not self._is_evicted(ranked) and self._limits.may_free(ranked.request)
        ]
        for ranked in holders:
            blocks.load_table(ranked)
        candidates = victim_candidates(
            holders,
            rules.victim_order,
            max_preemptions,
            lambda ranked: blocks.recompute_cost(ranked, shortage),
        )
        ref_counts = blocks.ref_counts(cached_blocks)
        return [
            victim for victim, _ in plan_victims(candidates, shortage, ref_counts, takes_all=True)
        ]

    def _evict(self, victims: Sequence[RankedRequest]) -> None:
        for victim in victims:
            self.evicted.append(victim)
            self._evicted_ids.add(victim.request_id)
            self._blocks.num_available += self._blocks.num_gained(victim)
            self._num_free_rows += 1
