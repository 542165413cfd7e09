"""One step, filled from the top of the ranking: who is in it, who waits, and who yields.

The walk is that of ``headway.core``: residents and waiting requests merged by rank, under the
budgets of slots, tokens, blocks and time (and, in vLLM, of LoRA adapters and of the rows of the
model runner). It ends in a plan that vLLM's own ``schedule`` carries out: it sees only those
residents that are in the step, and admits only as many waiting requests as have been planned.

vLLM gives tokens to running requests in the order of its list and then to waiting ones. So within
a step a resident may be given fewer tokens than it could compute only if it comes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vllm.v1.request import Request

from headway.core.ranking import end_of_equals, first_displaceable
from headway.core.reclaim import cheapest_last, plan_victims
from headway.core.time_sharing import share_time
from headway.vllm.kv_blocks import KVBlocks, Need
from headway.vllm.ranked_request import RankedRequest

if TYPE_CHECKING:
    from headway.core.cost_model import TimeBudget
    from headway.vllm.scheduler import HeadwaySchedulerMixin

__all__ = ["StepPlan"]


class StepPlan:
    """The plan of one step.

    Args:
        scheduler: whose budgets apply; nothing of it is changed.
        blocks: of the scheduler's pool.
        time: predicts and bounds what the step takes; None = time is no object.
    """

    def __init__(
        self, scheduler: HeadwaySchedulerMixin, blocks: KVBlocks, time: TimeBudget | None
    ) -> None:
        self._scheduler = scheduler
        self._config = scheduler.headway_config
        self._blocks = blocks
        self._time = time
        blocks.begin()
        #: Those that compute, in rank order; one that is given less than it could use comes last.
        self.running: list[RankedRequest] = []
        #: Those that sit the step out; their blocks stay.
        self.paused: list[RankedRequest] = []
        #: Those that lose their blocks.
        self.evicted: list[RankedRequest] = []
        #: Waiting requests to admit.
        self.num_admitted = 0
        #: Tokens to compute, as far as counted.
        self.num_tokens = 0
        waiting_for_input = scheduler.num_waiting_for_streaming_input
        self._slots = scheduler.max_num_active_reqs - waiting_for_input
        self._rows = scheduler.max_num_rows - waiting_for_input - len(scheduler.running)
        self._tokens: int = scheduler.max_num_scheduled_tokens
        self._blocks_suffice = blocks.suffice(len(scheduler.running), self._tokens)
        self._max_loras: int = scheduler.lora_config.max_loras if scheduler.lora_config else 0
        self._loras: set[int] = set()
        #: The most urgent in the step; whoever it could displace rides along.
        self._first: RankedRequest | None = None
        #: Tokens left for prompts that nobody present has to wait for.
        self._prefill_tokens: int = scheduler.prefill_allowance
        #: Tokens of prompts that somebody present has to wait for.
        self._urgent_prefill_tokens = 0
        #: The resident that is given less than it could compute.
        self._cut: RankedRequest | None = None
        #: Nobody so far has gone without; else nobody ranked below may be admitted.
        self._admits = True
        self._is_out: set[str] = set()

    def fill(self, residents: list[RankedRequest], heads: Iterator[Request]) -> None:
        """Walk down the ranking.

        Args:
            residents: all that are running or paused, in rank order.
            heads: waiting requests that could start now, in rank order.
        """
        index, size = 0, len(residents)
        head = next(heads, None)
        while self._slots > 0 and self._tokens > 0 and (index < size or head is not None):
            if not self._admits:
                head = None
            end = size
            if head is not None:
                if not self._fits_loras(head):
                    head = next(heads, None)
                    continue
                end = first_displaceable(head.headway, residents, index)
            if index < end:
                end = min(self._end_of_part(residents, index, end), index + self._slots)
                if not self._place(residents, index, end):
                    break
                index = end
            elif head is not None:
                # Nobody ranked below may be admitted to what this one could not get.
                head = next(heads, None) if self._admit(head, residents[index:]) else None
            else:
                break
        if self._cut is not None:
            self.running.append(self._cut)
        in_step = {one.request_id for one in self.running}
        self.paused = [
            one
            for one in residents
            if one.request_id not in in_step and one.request_id not in self._is_out
        ]

    # ------------------------------------------------------------------ residents

    def _end_of_part(self, residents: list[RankedRequest], index: int, end: int) -> int:
        """Where the part of ``residents[index:end]`` ends for which the same rules hold."""
        if self._config.share == "all" and self._time is None:
            return end
        end = min(end, end_of_equals(residents, index))
        if self._first is None or self._rides(residents[index]):
            return end
        return min(end, first_displaceable(self._first, residents, index))

    def _rides(self, ranked: RankedRequest) -> bool:
        """Whether somebody more urgent is in the step, by enough to displace ``ranked``."""
        return self._first is not None and ranked.key > self._first.threshold

    def _place(self, residents: list[RankedRequest], start: int, end: int) -> bool:
        """Put ``residents[start:end]`` into the step, as far as there is room.

        Returns:
            Whether those ranked below may be in the step, too.
        """
        rides = self._rides(residents[start])
        if rides and self._config.share == "none":
            return False
        part = residents[start:end]
        if self._first is None:
            self._first = residents[start]
        is_simple = self._time is None and self._blocks_suffice and not self._max_loras
        if is_simple and self._place_decodes(part):
            return True
        shares = self._share_time(part, rides)
        last = residents[-1].key
        for offset, one in enumerate(part):
            if one.request_id in self._is_out:
                continue
            wanted = self._wanted(one.request)
            count = min(wanted, self._tokens, wanted if shares is None else shares[one.request_id])
            if wanted > 1:
                count = self._allow_prefill(count, outranks=one.threshold < last)
            if count < wanted:
                self._admits = False
                # vLLM would give what is left to whoever comes last: to an admitted one, if any.
                if not count or self._cut is not None or self.num_admitted:
                    continue
            if not self._fits_loras(one.request):
                continue
            if not self._blocks_suffice:
                below = residents[start + offset + 1 :]
                if not self._grow(one, count, below):
                    self._admits = False
                    continue
            if shares is not None:
                one.last_step = self._scheduler.current_step
            if count < wanted:
                self._cut = one
            else:
                self.running.append(one)
            self._spend(one.request, count)
        return True

    def _place_decodes(self, part: Sequence[RankedRequest]) -> bool:
        """Put all of ``part`` into the step at once if each computes just the next token."""
        if len(part) > self._tokens or self._scheduler.num_spec_tokens:
            return False
        if any(one.request.is_prefill_chunk for one in part):
            return False
        self.running += [one for one in part if one.request_id not in self._is_out]
        self._slots -= len(part)
        self._tokens -= len(part)
        self.num_tokens += len(part)
        return True

    def _wanted(self, request: Request) -> int:
        """Tokens that a running request could compute in this step; 0 = all are in flight."""
        placeholders = request.num_output_placeholders
        last = request.num_prompt_tokens + request.max_tokens
        if placeholders and request.num_computed_tokens + 2 - placeholders >= last:
            return 0  # vLLM waits for its last token, which is in flight
        count: int = request.num_tokens_with_spec + placeholders - request.num_computed_tokens
        return max(0, min(count, self._scheduler.max_prefill_tokens))

    @property
    def _is_empty(self) -> bool:
        """Whether nobody is in the step yet."""
        return not self.running and not self.num_admitted and self._cut is None

    def _allow_prefill(self, count: int, outranks: bool) -> int:
        """How many of a prompt's ``count`` tokens the step may hold, as far as prompts go.

        Args:
            count: fits all other budgets.
            outranks: the prompt belongs to a request that could displace somebody present: it is
                what others are kept short for. In its step they get no more than it does.
        """
        if outranks:
            self._urgent_prefill_tokens += count
            if self._config.prefill_share < 1:
                self._prefill_tokens = min(self._prefill_tokens, self._urgent_prefill_tokens)
            return count
        if self._is_empty:
            return count
        count = min(count, self._prefill_tokens)
        self._prefill_tokens -= count
        return count

    def _share_time(self, part: Sequence[RankedRequest], rides: bool) -> dict[str, int] | None:
        """What time allows each of ``part``; None = everything."""
        time = self._time
        if time is None:
            return None
        if rides:
            self._tighten(time)
        wants = [(one, max(1, self._wanted(one.request))) for one in part]
        return share_time(wants, time, has_first=self._is_empty)

    def _tighten(self, time: TimeBudget) -> None:
        """Let the step take no longer than whoever rides along may make it.

        Not ``time.tighten``: that leaves everybody some time, and those who ride have no claim.
        """
        time.limit_ms = min(time.limit_ms, self._scheduler.share_ms)

    def _grow(self, one: RankedRequest, count: int, below: Sequence[RankedRequest]) -> bool:
        """Promise a resident the blocks for ``count`` tokens, at the cost of those below it."""
        blocks = self._blocks
        needed = blocks.growth(one.request, count) if count else 0
        shortage = needed - blocks.num_available
        if shortage > 0:
            victims = self._victims(below, shortage) or self._victims(
                below, shortage, spares_often_evicted=False
            )
            if not victims:
                return False
            self._evict(victims)
        blocks.num_available -= needed
        return True

    # ------------------------------------------------------------------ waiting requests

    def _admit(self, head: Request, candidates: Sequence[RankedRequest]) -> bool:
        """Plan to admit a waiting request, at the cost of ``candidates``, all of them if need be.

        Either its whole need can be met (slot, tokens, blocks, row), or nobody yields.
        """
        ranked: RankedRequest = head.headway
        rides = self._rides(ranked)
        if rides and self._config.share == "none":
            return False
        need = self._blocks.need(head)
        count = self._head_tokens(head, need, rides, outranks=bool(candidates))
        if not count:
            return False
        shortage = need.num_blocks - self._blocks.num_available
        if shortage > 0 or self._rows <= 0:
            victims = self._victims(candidates, max(shortage, 1), need.cached_blocks)
            if not victims:
                return False
            self._evict(victims)
        self._blocks.num_available -= need.num_blocks
        self._rows -= 1
        if self._first is None or ranked.key < self._first.key:
            self._first = ranked
        self._spend(head, count)
        self.num_admitted += 1
        if self._time is not None:
            self._time.spend(count, need.num_cached_tokens)
        return True

    def _head_tokens(self, head: Request, need: Need, rides: bool, outranks: bool) -> int:
        """How many tokens of a waiting request fit into the step; 0 = it must wait."""
        wanted = min(need.num_tokens, self._scheduler.max_prefill_tokens)
        count = self._allow_prefill(min(wanted, self._tokens), outranks)
        if count < wanted and not self._scheduler.scheduler_config.enable_chunked_prefill:
            return 0
        time = self._time
        if time is not None:
            if rides:
                self._tighten(time)
            count = time.affordable(count, need.num_cached_tokens, self._is_empty)
        return count

    # ------------------------------------------------------------------ budgets

    def _fits_loras(self, request: Request) -> bool:
        """Whether the step has room for the request's adapter."""
        lora = request.lora_request
        if not self._max_loras or lora is None or lora.lora_int_id in self._loras:
            return True
        return len(self._loras) < self._max_loras

    def _spend(self, request: Request, count: int) -> None:
        """Count a request as being in the step, with ``count`` tokens."""
        self._slots -= 1
        self._tokens -= count
        self.num_tokens += count
        if self._max_loras and request.lora_request is not None:
            self._loras.add(request.lora_request.lora_int_id)

    def _victims(
        self,
        candidates: Sequence[RankedRequest],
        shortage: int,
        cached_blocks: frozenset[int] = frozenset(),
        *,
        spares_often_evicted: bool = True,
    ) -> list[RankedRequest]:
        """Whose eviction frees ``shortage`` blocks; none if even all of them hold too little."""
        config, blocks = self._config, self._blocks
        may_free = self._scheduler._request_blocks_can_be_freed
        able = [
            one
            for one in candidates
            if one.request_id not in self._is_out
            and not (spares_often_evicted and one.request.num_preemptions >= config.max_preemptions)
            and may_free(one.request)
        ]
        for one in able:
            blocks.load_table(one)
        if config.victim == "cheapest":
            able = cheapest_last(able, lambda one: blocks.recompute_cost(one, shortage))
        plan = plan_victims(able, shortage, blocks.ref_counts(cached_blocks), takes_all=True)
        return [victim for victim, _ in plan]

    def _evict(self, victims: Sequence[RankedRequest]) -> None:
        for one in victims:
            self.evicted.append(one)
            self._is_out.add(one.request_id)
            self._blocks.num_available += self._blocks.num_gained(one)
            self._rows += 1
