"""A request's blocks, with their contents: found, granted, cut off, swapped out and in.

``BlockManager`` counts blocks; this knows what is in them. It decides nothing about who gets
blocks from whom: the scheduler asks for a ``Claim``, finds what is short, and grants or
withdraws it.
"""

from __future__ import annotations

from typing import NamedTuple

from headway.core.block_manager import BlockManager, hash_block
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.request import Request
from headway.core.scheduler_output import SchedulerOutput

__all__ = ["Claim", "CutOff", "KVCacheManager"]


class Claim(NamedTuple):
    """What a request needs so that all its tokens have blocks.

    Attributes:
        found: blocks of the prefix cache that continue its table; referenced for it already.
        num_fresh: blocks to allocate after those.
        shared: a partly filled block of its table that others have too, to be copied before
            it is written; or None.
    """

    found: list[int]
    num_fresh: int
    shared: int | None

    @property
    def num_blocks(self) -> int:
        """Blocks that must be available."""
        return self.num_fresh + (self.shared is not None)


class CutOff(NamedTuple):
    """What a victim lost: blocks of its table, computed tokens, and whether to the swap space."""

    num_blocks: int
    num_tokens: int
    is_swapped: bool


class KVCacheManager:
    """Keeps every request's block table, swap table and ``num_computed_tokens`` in step.

    A request's computed tokens are ``num_computed_tokens`` in the pool, and, if its swap table
    is not empty, those that follow, up to ``num_swapped_tokens``, in the swap space.
    """

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        #: The scheduler's settings.
        self.config = config
        #: Tells swapping and recomputing apart by cost.
        self.cost_model = cost_model
        #: Owns the block tables; a request has one exactly while it is resident.
        self.block_manager = BlockManager(
            config.num_blocks, config.block_size, config.enable_prefix_caching
        )
        #: Swap slots that hold nothing, used from the end.
        self._free_swap_slots = list(range(config.num_swap_blocks - 1, -1, -1))
        #: Swap slots that the scheduled step still reads; free from the next step on, since
        #: a step copies out before it copies in.
        self._read_swap_slots: list[int] = []

    @property
    def num_free_swap_slots(self) -> int:
        """Swap slots that hold nothing a request needs."""
        return len(self._free_swap_slots) + len(self._read_swap_slots)

    def begin_step(self) -> None:
        """The step before has been executed: what it read may be overwritten."""
        if self._read_swap_slots:
            self._free_swap_slots.extend(self._read_swap_slots)
            self._read_swap_slots.clear()

    # ------------------------------------------------------------------ growing

    def append_block(self, request: Request) -> bool:
        """Give one block to a decode that has just filled its last; False if it is not that.

        By far the most frequent growth, and a short one: there is nothing to find, copy or
        swap in, and a block is available.
        """
        manager = self.block_manager
        capacity = len(request.block_table) * manager.block_size
        if (
            request.num_computed_tokens != capacity
            or not 0 < len(request.token_ids) - capacity <= manager.block_size
            or request.swap_table
            or not manager.num_available
        ):
            return False
        manager.append(request.request_id)
        request.capacity = capacity + manager.block_size
        return True

    def claim(self, request: Request) -> Claim:
        """What ``request`` needs; to be granted or withdrawn before the next claim.

        The blocks found are referenced at once, so that making room cannot reuse them.
        """
        manager = self.block_manager
        table = request.block_table
        computed = request.num_computed_tokens
        num_needed = manager.num_blocks_for(len(request.token_ids)) - len(table)
        found = self._find_cached(request) if computed == len(table) * manager.block_size else []
        shared = None
        partial, is_partial = divmod(computed, manager.block_size)
        if is_partial and manager.ref_counts[table[partial]] > 1:
            shared = table[partial]
        manager.touch(found)
        return Claim(found, num_needed - len(found), shared)

    def withdraw(self, claim: Claim) -> None:
        """Undo a claim that cannot be met."""
        self.block_manager.release(reversed(claim.found))

    def grant(self, request: Request, claim: Claim, output: SchedulerOutput) -> None:
        """Give ``request`` what it claimed; as many blocks must be available.

        What was swapped out is copied back in, as far as the prefix cache did not have it.
        """
        manager = self.block_manager
        table = request.block_table
        if claim.shared is not None:
            partial = request.num_computed_tokens // manager.block_size
            copy = manager.copy_on_write(request.request_id, partial)
            if copy is not None:  # None: the others were among the victims
                output.block_copies.append(copy)
        num_held, num_found = len(table), len(claim.found)
        manager.share(request.request_id, claim.found)
        manager.append(request.request_id, claim.num_fresh)
        request.capacity = len(table) * manager.block_size
        if num_found:
            request.num_computed_tokens = (num_held + num_found) * manager.block_size
        if request.swap_table:
            slots, start = request.swap_table, num_held + num_found
            blocks = table[start : num_held + len(slots)]
            output.swap_in.extend(zip(slots[num_found:], blocks, strict=True))
            request.num_computed_tokens = max(
                request.num_computed_tokens, request.num_swapped_tokens
            )
            self.drop_swapped(request)
            self.commit(request, start, request.num_computed_tokens // manager.block_size)

    def fork(self, parent: Request, child: Request) -> None:
        """Let ``child`` share the blocks of the parent's computed tokens."""
        manager = self.block_manager
        computed = parent.num_computed_tokens
        child.block_table = manager.fork(parent.request_id, child.request_id)
        manager.trim(child.request_id, manager.num_blocks_for(computed))
        child.num_computed_tokens = computed
        child.capacity = len(child.block_table) * manager.block_size
        if computed % manager.block_size:
            # Neither may write into the shared last block: both claim before their next token.
            parent.capacity = child.capacity = computed

    # ------------------------------------------------------------------ shrinking

    def cut(
        self, victim: Request, num_kept: int, mode: PreemptionMode, output: SchedulerOutput
    ) -> CutOff:
        """Cut a table to its first ``num_kept`` blocks, to be swapped or recomputed."""
        manager = self.block_manager
        num_blocks = len(victim.block_table) - num_kept
        computed = victim.num_computed_tokens
        num_kept_tokens = min(computed, num_kept * manager.block_size)
        victim.peak_computed_tokens = max(
            victim.peak_computed_tokens, computed, victim.num_swapped_tokens
        )
        is_swapped = num_kept_tokens < computed and self._swap_out(victim, num_kept, mode, output)
        if not is_swapped:
            self.drop_swapped(victim)
        victim.num_computed_tokens = num_kept_tokens
        victim.capacity = num_kept * manager.block_size
        manager.trim(victim.request_id, num_kept)
        return CutOff(num_blocks, computed - num_kept_tokens, is_swapped)

    def drop_swapped(self, request: Request) -> None:
        """Give up what a request has in the swap space."""
        self._read_swap_slots.extend(request.swap_table)
        request.swap_table = []
        request.num_swapped_tokens = 0

    def _swap_out(
        self, victim: Request, num_kept: int, mode: PreemptionMode, output: SchedulerOutput
    ) -> bool:
        """Copy the computed blocks from ``num_kept`` on to the swap space, if that is the way.

        A victim whose tail is swapped out already has everything before it computed, so the
        slots together still cover a stretch without a hole.
        """
        manager = self.block_manager
        blocks = victim.block_table[num_kept : manager.num_blocks_for(victim.num_computed_tokens)]
        if mode not in (PreemptionMode.SWAP, PreemptionMode.AUTO):
            return False
        if len(blocks) > len(self._free_swap_slots):
            return False
        if mode is PreemptionMode.AUTO and not self._swap_is_cheaper(victim, num_kept, blocks):
            return False
        slots = [self._free_swap_slots.pop() for _ in blocks]
        output.swap_out.extend(zip(blocks, slots, strict=True))
        if not victim.swap_table:
            victim.num_swapped_tokens = victim.num_computed_tokens
        victim.swap_table[:0] = slots
        return True

    def _swap_is_cheaper(self, victim: Request, num_kept: int, blocks: list[int]) -> bool:
        start = num_kept * self.config.block_size
        end = max(victim.num_computed_tokens, victim.num_swapped_tokens)
        replay_start = victim.num_prompt_tokens if self.config.deterministic else end
        num_replayed = max(0, end - max(start, replay_start))
        return self.cost_model.swap_ms(len(blocks)) < self.cost_model.recompute_ms(
            end - start - num_replayed, num_replayed
        )

    # ------------------------------------------------------------------ the prefix cache

    def commit(self, request: Request, start: int, end: int) -> None:
        """Make the blocks ``start … end − 1`` of a request's table findable; they are full."""
        if self.config.enable_prefix_caching and end > start:
            self._hash_blocks(request, end)
            commit, table, hashes = (
                self.block_manager.commit,
                request.block_table,
                request.block_hashes,
            )
            for index in range(start, end):
                commit(table[index], hashes[index])

    def _find_cached(self, request: Request) -> list[int]:
        """Blocks that continue the request's table and are in the prefix cache.

        At least one token is left to compute, because something must be sampled from.
        """
        num_held = len(request.block_table)
        limit = (request.num_tokens - 1) // self.config.block_size
        if request.sampling_params.prompt_logprobs is not None:
            # They come from computing the prompt: only what it once computed itself may be found.
            limit = min(limit, request.peak_computed_tokens // self.config.block_size)
        if not self.config.enable_prefix_caching or limit <= num_held:
            return []
        self._hash_blocks(request, limit)
        return self.block_manager.find(request.block_hashes[num_held:limit])

    def _hash_blocks(self, request: Request, num_blocks: int) -> None:
        """Extend ``block_hashes`` to the first ``num_blocks`` blocks of the request's tokens."""
        hashes, size = request.block_hashes, self.config.block_size
        for index in range(len(hashes), num_blocks):
            end = (index + 1) * size
            # Contents of generated tokens depend on where generation began (deterministic).
            is_generated = self.config.deterministic and end > request.num_prompt_tokens
            salt = request.num_prompt_tokens if is_generated else 0
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, request.token_ids[end - size : end], salt))
