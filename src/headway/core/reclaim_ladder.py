"""How a request gets blocks: found, free, cached, and in the end blocks of others.

The order is: blocks that have its contents (in the prefix cache, or a sibling's), free blocks,
cached blocks that no sequence references, and blocks of residents, from the last-ranked upwards.
Either the whole need of a request can be met, or no resident yields.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Final

from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.kv_cache_manager import NO_MOVES, BlockMoves, Claim, KVCacheManager
from headway.core.life import RequestStatus
from headway.core.reclaim import plan_victims, victim_candidates
from headway.core.request import Request
from headway.core.request_table import RequestTable
from headway.core.scheduler_output import Preemption
from headway.core.sequence import Sequence

__all__ = ["ReclaimLadder"]

#: Modes that take a victim's blocks only as far as needed, from its end.
_TAIL_MODES: Final = frozenset({PreemptionMode.TAIL, PreemptionMode.AUTO})


class ReclaimLadder:
    """Gives requests blocks for all their tokens, at the cost of residents that rank below them.

    Args:
        config: says how victims yield.
        kv_cache: whose blocks they are.
        table: the residents; victims that lose everything leave them.
    """

    def __init__(
        self, config: SchedulerConfig, kv_cache: KVCacheManager, table: RequestTable
    ) -> None:
        assert isinstance(config.preemption_mode, PreemptionMode)
        self._mode: PreemptionMode = config.preemption_mode
        self._rules = config.sharing
        self._kv_cache = kv_cache
        self._manager = kv_cache.block_manager
        self._table = table
        #: What the next step has to copy.
        self._moves: list[BlockMoves] = []
        #: The requests that have yielded since this was taken last, in order of the decisions.
        self._yields: list[Preemption] = []
        #: Times a request yielded, by the way in which it did.
        self.preemptions: Counter[PreemptionMode] = Counter()

    def take_moves(self) -> BlockMoves:
        """What has to be copied before the step that has just been filled."""
        moves, self._moves = self._moves, []
        if not moves:
            return NO_MOVES
        return BlockMoves(
            *(tuple(chain.from_iterable(parts)) for parts in zip(*moves, strict=True))
        )

    def take_yields(self) -> tuple[Preemption, ...]:
        """The requests that have yielded since this was called last."""
        yields, self._yields = tuple(self._yields), []
        return yields

    @property
    def has_yields(self) -> bool:
        """Whether a request has yielded since they were taken last."""
        return bool(self._yields)

    # ------------------------------------------------------------------ giving blocks

    def extend(
        self, request: Request, first_victim: int, now: float, *, is_admission: bool = False
    ) -> bool:
        """Give the sequences of a request blocks for all their tokens.

        Args:
            request: next in rank.
            first_victim: residents from this index on may lose blocks to it.
            now: seconds.
            is_admission: the request waits. Room is made for what its choices will need once its
                prompt has been computed, too, and residents that have lost blocks too often are
                spared.

        Returns:
            Whether the whole need could be met; if not, no resident has yielded.
        """
        is_single = request.n == 1
        if is_single and not is_admission and self._kv_cache.append_block(request.leader):
            return True
        reserve = self._reserve(request) if is_admission and not is_single else 0
        while claims := self._claims(request):
            needed = _num_needed(claims, self._manager.ref_counts) + reserve
            shortage = needed - self._manager.num_available
            if shortage > 0 and not self._make_room(
                request, first_victim, shortage, now, is_admission
            ):
                self._kv_cache.withdraw(claims)
                return False
            for claim in claims:
                self._note_moves(self._kv_cache.grant(claim))
            if is_admission:
                break  # the siblings claim once it is a resident
        return True

    def _claims(self, request: Request) -> list[Claim]:
        """What the sequences of a request lack, as far as it can be said now.

        While the prompt of a group is being computed, by its leader, the other sequences have
        nothing to share yet, and wait.
        """
        live = request.live
        if len(live) == 1:
            return [self._kv_cache.claim(live[0])] if live[0].lacks_blocks else []
        donor = self._donor(request)
        claimants = live if donor is not None else live[:1]
        return [
            self._kv_cache.claim(sequence, None if sequence is donor else donor)
            for sequence in claimants
            if sequence.lacks_blocks
        ]

    def _donor(self, request: Request) -> Sequence | None:
        """A sequence that has computed the prompt's full blocks, for its siblings to share."""
        size = self._manager.block_size
        shared = request.num_prompt_tokens // size * size
        for sequence in request.live:
            if sequence.num_computed_tokens >= shared and sequence.block_table:
                return sequence
        return None

    def _reserve(self, request: Request) -> int:
        """Blocks that the choices beside the leader will need when they fork from it."""
        manager = self._manager
        shared = request.num_prompt_tokens // manager.block_size
        forks = [sequence.num_tokens for sequence in request.live[1:]]
        forks += [request.num_prompt_tokens + 1] * (request.n - len(request.sequences))
        return sum(manager.num_blocks_for(num_tokens) - shared for num_tokens in forks)

    def _make_room(
        self, request: Request, first_victim: int, shortage: int, now: float, is_admission: bool
    ) -> bool:
        """Take ``shortage`` blocks from residents; if that is impossible, none yields."""
        rules, residents = self._rules, self._table.resident[first_victim:]
        limits = [rules.max_preemptions]
        if not is_admission and rules.max_preemptions is not None:
            limits.append(None)  # a resident that cannot grow otherwise spares none
        for limit in limits:
            candidates = victim_candidates(
                residents, rules.victim_order, limit, self._kv_cache.recompute_cost
            )
            victims = self._plan(candidates, shortage)
            for victim, cuts in victims:
                self.evict(victim, cuts, self._mode, request, now)
            if victims:
                return True
        return False

    def _plan(
        self, candidates: list[Request], shortage: int
    ) -> list[tuple[Request, list[tuple[Sequence, int]]]]:
        """Which candidates yield, and how many of its first blocks each sequence keeps."""
        takes_all = self._mode not in _TAIL_MODES
        holders = [
            sequence
            for candidate in candidates
            for sequence in candidate.live
            if sequence.block_table
        ]
        victims: dict[str, tuple[Request, list[tuple[Sequence, int]]]] = {}
        for sequence, num_kept in plan_victims(
            holders, shortage, self._manager.ref_counts, takes_all=takes_all
        ):
            request = sequence.request
            _, cuts = victims.setdefault(request.request_id, (request, []))
            if not takes_all or request.n == 1:
                cuts.append((sequence, num_kept))
            elif not cuts:
                cuts += [(sibling, 0) for sibling in request.live if sibling.block_table]
        return list(victims.values())

    # ------------------------------------------------------------------ taking blocks

    def evict(
        self,
        victim: Request,
        cuts: list[tuple[Sequence, int]],
        mode: PreemptionMode,
        beneficiary: Request | None,
        now: float,
    ) -> None:
        """Cut sequences of a resident to their first blocks; without any left, it waits again."""
        lost = [self._kv_cache.cut(sequence, num_kept, mode) for sequence, num_kept in cuts]
        for each in lost:
            self._note_moves(each.moves)
        victim.num_preemptions += 1
        is_swapped = any(each.is_swapped for each in lost)
        if victim.holds_blocks:
            yielded = PreemptionMode.SWAP if is_swapped else PreemptionMode.TAIL
            if victim.status is RequestStatus.RUNNING:
                self._table.move(victim, RequestStatus.PAUSED, now)  # until it has its tail again
        else:
            outside = victim.status_outside
            is_swapped = outside is RequestStatus.SWAPPED
            yielded = PreemptionMode.SWAP if is_swapped else PreemptionMode.RECOMPUTE
            self._table.move(victim, outside, now)
        self._note_yield(
            victim,
            yielded,
            None if beneficiary is None else beneficiary.request_id,
            sum(each.num_blocks for each in lost),
            sum(each.num_tokens for each in lost),
        )

    def pause(self, victim: Request, now: float) -> None:
        """Let a resident sit the step out, if it was in the last one; its blocks stay."""
        if victim.status is RequestStatus.RUNNING:
            self._table.move(victim, RequestStatus.PAUSED, now)
            self._note_yield(victim, PreemptionMode.PAUSE)

    def _note_yield(
        self,
        victim: Request,
        mode: PreemptionMode,
        beneficiary_id: str | None = None,
        num_blocks: int = 0,
        num_tokens: int = 0,
    ) -> None:
        self.preemptions[mode] += 1
        self._yields.append(
            Preemption(
                victim.request_id,
                mode,
                beneficiary_id,
                num_blocks,
                num_tokens,
                victim.priority,
                victim.tenant,
            )
        )

    def _note_moves(self, moves: BlockMoves) -> None:
        if moves is not NO_MOVES:
            self._moves.append(moves)


def _num_needed(claims: list[Claim], ref_counts: list[int]) -> int:
    """Blocks that the claims of one request need together.

    Siblings that share a block with each other alone need a copy less than they are: the last of
    them may keep the block.
    """
    if len(claims) == 1:
        return claims[0].num_blocks
    shared = Counter(claim.shared for claim in claims if claim.shared is not None)
    num_spared = sum(ref_counts[block] == count for block, count in shared.items())
    return sum(claim.num_blocks for claim in claims) - num_spared
