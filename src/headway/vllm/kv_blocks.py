"""vLLM's KV blocks while a step is planned: free, promised, or lost by victims.

vLLM allocates while it schedules. A plan is made before that, so it counts: with vLLM's own
arithmetic, of which these are the only users.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, overload

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from headway.vllm.compatibility import max_cache_hit_length
from headway.vllm.ranked_request import RankedRequest

__all__ = ["BlockTable", "KVBlocks", "Need"]


class BlockTable(Sequence[int]):
    """The ids of a request's blocks, read off vLLM's own lists when asked for."""

    def __init__(self, blocks: Sequence[KVCacheBlock]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [block.block_id for block in self.blocks[index]]
        return int(self.blocks[index].block_id)


class RefCounts:
    """How many requests hold a block; what the beneficiary would share counts as held by it.

    A block that it finds in the prefix cache is of no use to it as an empty block.
    """

    def __init__(self, blocks: Sequence[KVCacheBlock], cached: frozenset[int]) -> None:
        self._blocks = blocks
        self._cached = cached

    def __getitem__(self, block: int) -> int:
        return int(self._blocks[block].ref_cnt) + (block in self._cached)


class Need(NamedTuple):
    """What a waiting request needs to be admitted."""

    #: Free blocks; in all groups together.
    num_blocks: int
    #: Tokens to compute, before any limit.
    num_tokens: int
    #: Tokens that the prefix cache has.
    num_cached_tokens: int
    #: The blocks that these are in.
    cached_blocks: frozenset[int]


class KVBlocks:
    """The block pool of one scheduler. Call ``begin`` before each plan."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        self._coordinator = self._manager.coordinator
        self._pool = self._manager.block_pool
        managers = self._coordinator.single_type_managers
        self._num_groups = len(managers)
        sizes = [int(manager.block_size) for manager in managers]
        self._smallest_size = min(sizes, default=1)
        #: Whether tables may hold null blocks, in place of blocks that attention has left behind.
        self._has_nulls = not all(isinstance(manager, FullAttentionManager) for manager in managers)
        #: Only where the position is a multiple of this can the next token need a block.
        self._stride = math.gcd(*sizes) if sizes else 1
        self._num_extra_tokens: int = scheduler.num_lookahead_tokens + scheduler.num_spec_tokens
        #: Free blocks that the plan does not use; the blocks of victims count as free.
        self.num_available = 0

    def begin(self) -> None:
        """Start a plan: nothing has been promised, no request evicted."""
        self.num_available = self._pool.get_num_free_blocks()

    def suffice(self, num_residents: int, num_tokens: int) -> bool:
        """Whether the residents, or any of them, can compute ``num_tokens`` in a step. O(1)."""
        extra = 1 + math.ceil(self._num_extra_tokens / self._smallest_size)
        bound = num_residents * extra + math.ceil(num_tokens / self._smallest_size)
        return bound * self._num_groups <= int(self._pool.get_num_free_blocks())

    def growth(self, request: Request, count: int) -> int:
        """Blocks that a running request needs to compute ``count`` more tokens."""
        computed = request.num_computed_tokens
        if count == 1 and computed % self._stride and not self._num_extra_tokens:
            return 0
        limit = self._scheduler.max_model_len
        return self._count(
            request,
            min(computed + count + self._scheduler.num_lookahead_tokens, limit),
            min(computed + count, limit),
        )

    def need(self, request: Request) -> Need:
        """What a waiting request needs. O(blocks of its prompt)."""
        scheduler, manager = self._scheduler, self._manager
        blocks, cached = manager.empty_kv_cache_blocks.blocks, 0
        if request.num_computed_tokens:
            cached = request.num_computed_tokens
        elif manager.prefix_cache_lookup_enabled(request):
            blocks, cached, _ = self._coordinator.find_longest_cache_hit(
                request.block_hashes, max_cache_hit_length(scheduler, request)
            )
        num_tokens = min(request.num_tokens, scheduler.max_model_len)
        if not scheduler.scheduler_reserve_full_isl:
            num_tokens = min(num_tokens, cached + scheduler.max_num_scheduled_tokens)
        num_blocks = self._count(
            request, num_tokens, num_tokens, blocks, cached, apply_admission_cap=True
        )
        return Need(
            num_blocks + (manager.watermark_blocks if scheduler.running else 0),
            max(request.num_tokens - cached, 1),
            cached,
            frozenset(block.block_id for block in chain.from_iterable(blocks)),
        )

    def load_table(self, ranked: RankedRequest) -> None:
        """Let ``ranked.block_table`` be what the request holds now."""
        groups = self._groups(ranked)
        ranked.block_table = BlockTable(
            groups[0] if len(groups) == 1 else list(chain.from_iterable(groups))
        )

    def _groups(self, ranked: RankedRequest) -> list[list[KVCacheBlock]]:
        """The request's blocks by KV cache group, without null blocks."""
        groups = self._coordinator.get_blocks(ranked.request_id)
        if self._has_nulls:
            return [[block for block in group if not block.is_null] for group in groups]
        return list(groups)

    def ref_counts(self, cached_blocks: frozenset[int]) -> RefCounts:
        """Block id → requests that hold it, and the one that is about to share it."""
        return RefCounts(self._pool.blocks, cached_blocks)

    def num_gained(self, ranked: RankedRequest) -> int:
        """Blocks that would be free if the request were evicted.

        What other requests share with it are its first blocks. O(groups · log blocks).
        """
        return sum(
            len(group) - bisect_left(group, True, key=lambda block: block.ref_cnt <= 1)
            for group in self._groups(ranked)
        )

    def recompute_cost(self, ranked: RankedRequest, shortage: int) -> float:
        """Tokens to recompute for each needed block gained, if the request were evicted."""
        gained = self.num_gained(ranked)
        if not gained:
            return math.inf
        held = len(ranked.block_table)
        lost_tokens = ranked.num_computed_tokens * gained / held
        return lost_tokens / max(1, min(gained, shortage))

    def _count(
        self,
        request: Request,
        num_tokens: int,
        num_tokens_main_model: int,
        cached_blocks: tuple[Sequence[KVCacheBlock], ...] | None = None,
        num_cached: int = 0,
        *,
        apply_admission_cap: bool = False,
    ) -> int:
        computed = min(max(request.num_computed_tokens, num_cached), self._scheduler.max_model_len)
        return int(
            self._coordinator.get_num_blocks_to_allocate(
                request_id=request.request_id,
                num_tokens=num_tokens,
                new_computed_blocks=cached_blocks or self._manager.empty_kv_cache_blocks.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=computed,
                num_local_computed_tokens=computed,
                num_tokens_main_model=num_tokens_main_model,
                apply_admission_cap=apply_admission_cap,
                prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
            )
        )
