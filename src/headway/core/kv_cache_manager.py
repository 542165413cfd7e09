"""A sequence's blocks, with their contents: found, granted, cut off, swapped out and in.

``BlockManager`` counts blocks; this knows what is in them. It decides nothing about who gets
blocks from whom: the scheduler asks for a ``Claim``, finds what is short, and grants or
withdraws it. What the executor has to copy is returned as ``BlockMoves``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from headway.core.block_manager import BlockManager, hash_block
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.request import Request
from headway.core.sequence import Sequence

__all__ = ["NO_MOVES", "BlockMoves", "Claim", "KVCacheManager", "LostBlocks"]

_NONE: Final[tuple[int, ...]] = ()


class BlockMoves(NamedTuple):
    """What the executor has to copy before a step; as in ``SchedulerOutput``."""

    swap_out: tuple[tuple[int, int], ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()


NO_MOVES: Final = BlockMoves()


class Claim(NamedTuple):
    """What a sequence needs so that all its tokens have blocks; granted or withdrawn next.

    Attributes:
        sequence: that needs it.
        found: blocks that continue its table and have its contents, its siblings' or the prefix
            cache's; referenced for it already.
        num_fresh: blocks to allocate after those.
        shared: a partly filled block of its table that others have too, to be copied before
            it is written; or None.
    """

    sequence: Sequence
    found: list[int]
    num_fresh: int
    shared: int | None

    @property
    def num_blocks(self) -> int:
        """Blocks that must be available."""
        return self.num_fresh + (self.shared is not None)


class LostBlocks(NamedTuple):
    """What a victim lost: blocks, computed tokens, whether to the swap space, and what to copy."""

    num_blocks: int
    num_tokens: int
    is_swapped: bool
    moves: BlockMoves


class KVCacheManager:
    """Keeps every sequence's block table, swap table and ``num_computed_tokens`` in step."""

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        #: The scheduler's settings.
        self.config = config
        #: Tells swapping and recomputing apart by cost.
        self.cost_model = cost_model
        #: Owns the block tables; a sequence has one exactly while it holds blocks.
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
        """Swap slots that hold nothing a sequence needs."""
        return len(self._free_swap_slots) + len(self._read_swap_slots)

    def begin_step(self) -> None:
        """The step before has been executed: what it read may be overwritten."""
        if self._read_swap_slots:
            self._free_swap_slots.extend(self._read_swap_slots)
            self._read_swap_slots.clear()

    # ------------------------------------------------------------------ growing

    def append_block(self, sequence: Sequence) -> bool:
        """Give one block to a decode that has just filled its last; False if it is not that.

        By far the most frequent growth, and a short one: there is nothing to find, copy or
        swap in, and a block is available.
        """
        manager, size = self.block_manager, self.config.block_size
        table = sequence.block_table
        capacity = len(table) * size
        if (
            sequence.num_computed_tokens != capacity
            or not 0 < len(sequence.token_ids) + len(sequence.draft_token_ids) - capacity <= size
            or sequence.swap_table
            or not table
            or not manager.num_available
        ):
            return False
        sequence.block_table = (*table, manager.append_one(sequence.sequence_id))
        sequence.capacity = capacity + size
        if sequence.quiet_until:
            sequence.stay_quiet()
        return True

    def claim(self, sequence: Sequence, donor: Sequence | None = None) -> Claim:
        """What ``sequence`` needs; to be granted or withdrawn before anything else is claimed
        than by other sequences of the same request.

        The blocks found are referenced at once, so that making room cannot reuse them.

        Args:
            sequence: that is to have blocks for all its tokens.
            donor: a sequence of the same request with a computed prompt, whose full prompt blocks
                it shares where it has none of its own.
        """
        manager, table = self.block_manager, sequence.block_table
        computed = sequence.num_computed_tokens
        num_needed = manager.num_blocks_for(_num_known(sequence)) - len(table)
        found: list[int] = []
        if computed == len(table) * manager.block_size:
            found = self._find_shared(sequence, donor) if donor else self._find_cached(sequence)
        shared = None
        partial, is_partial = divmod(computed, manager.block_size)
        if is_partial and manager.ref_counts[table[partial]] > 1:
            shared = table[partial]
        if found:
            manager.touch(found)
        return Claim(sequence, found, num_needed - len(found), shared)

    def withdraw(self, claims: Iterable[Claim]) -> None:
        """Undo claims that cannot be met."""
        for claim in claims:
            self.block_manager.release(reversed(claim.found))

    def grant(self, claim: Claim) -> BlockMoves:
        """Give a sequence what it claimed; as many blocks must be available.

        What was swapped out is copied back in, as far as it was not found in the pool.
        """
        manager, sequence = self.block_manager, claim.sequence
        sequence_id, size = sequence.sequence_id, manager.block_size
        copies: tuple[tuple[int, int], ...] = ()
        if claim.shared is not None:
            copy = manager.copy_on_write(sequence_id, sequence.num_computed_tokens // size)
            if copy is not None:  # None: the others were among the victims, or have copied
                copies = (copy,)
        num_held, num_found = len(sequence.block_table), len(claim.found)
        if not num_held:
            manager.allocate(sequence_id)
        if claim.found:
            manager.share(sequence_id, claim.found)
        table = sequence.block_table = tuple(manager.append(sequence_id, claim.num_fresh))
        sequence.capacity = len(table) * size
        if num_found:
            sequence.num_computed_tokens = (num_held + num_found) * size
            sequence.commit_at = sequence.num_computed_tokens + size
        swap_in: tuple[tuple[int, int], ...] = ()
        if sequence.swap_table:
            slots = sequence.swap_table
            blocks = table[num_held + num_found : num_held + len(slots)]
            swap_in = tuple(zip(slots[num_found:], blocks, strict=True))
            # They become findable after the step that copies them in, as computed ones do.
            sequence.num_computed_tokens = max(
                sequence.num_computed_tokens, sequence.num_swapped_tokens
            )
            self.drop_swapped(sequence)
        return BlockMoves((), copies, swap_in) if copies or swap_in else NO_MOVES

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child`` share the blocks of the parent's computed tokens, which it has, too."""
        manager = self.block_manager
        computed = parent.num_computed_tokens
        manager.fork(parent.sequence_id, child.sequence_id)
        manager.trim(child.sequence_id, manager.num_blocks_for(computed))
        child.block_table = tuple(manager.tables[child.sequence_id])
        child.num_computed_tokens = child.peak_computed_tokens = computed
        child.capacity = len(child.block_table) * manager.block_size
        child.commit_at = parent.commit_at
        if computed % manager.block_size:
            # Neither may write into the shared last block: both claim before their next token.
            parent.capacity = child.capacity = computed

    # ------------------------------------------------------------------ shrinking

    def cut(self, victim: Sequence, num_kept: int, mode: PreemptionMode) -> LostBlocks:
        """Cut a table to its first ``num_kept`` blocks, to be swapped or recomputed."""
        manager = self.block_manager
        num_blocks = len(victim.block_table) - num_kept
        computed = victim.num_computed_tokens
        num_kept_tokens = min(computed, num_kept * manager.block_size)
        victim.peak_computed_tokens = max(
            victim.peak_computed_tokens, computed, victim.num_swapped_tokens
        )
        swap_out = self._swap_out(victim, num_kept, mode) if num_kept_tokens < computed else ()
        if not swap_out:
            self.drop_swapped(victim)
        victim.num_computed_tokens = num_kept_tokens
        victim.quiet_until = 0
        victim.capacity = num_kept * manager.block_size
        victim.commit_at = min(victim.commit_at, victim.capacity + manager.block_size)
        victim.block_table = victim.block_table[:num_kept]
        if num_kept:
            manager.trim(victim.sequence_id, num_kept)
        else:
            manager.free(victim.sequence_id)
        lost = computed - num_kept_tokens
        return LostBlocks(num_blocks, lost, bool(swap_out), BlockMoves(swap_out))

    def free(self, sequence: Sequence) -> None:
        """Take everything from a sequence that has ended."""
        if sequence.block_table:
            self.block_manager.free(sequence.sequence_id)
            sequence.block_table = _NONE
        if sequence.swap_table:
            self.drop_swapped(sequence)

    def drop_swapped(self, sequence: Sequence) -> None:
        """Give up what a sequence has in the swap space."""
        self._read_swap_slots.extend(sequence.swap_table)
        sequence.swap_table = _NONE
        sequence.num_swapped_tokens = 0

    def _swap_out(
        self, victim: Sequence, num_kept: int, mode: PreemptionMode
    ) -> tuple[tuple[int, int], ...]:
        """Copy the computed blocks from ``num_kept`` on to the swap space, if that is the way.

        A victim whose tail is swapped out already has everything before it computed, so the
        slots together still cover a stretch without a hole.
        """
        manager = self.block_manager
        blocks = victim.block_table[num_kept : manager.num_blocks_for(victim.num_computed_tokens)]
        if mode not in (PreemptionMode.SWAP, PreemptionMode.AUTO):
            return ()
        if len(blocks) > len(self._free_swap_slots):
            return ()
        if mode is PreemptionMode.AUTO and not self._swap_is_cheaper(victim, num_kept, blocks):
            return ()
        slots = tuple(self._free_swap_slots.pop() for _ in blocks)
        if not victim.swap_table:
            victim.num_swapped_tokens = victim.num_computed_tokens
        victim.swap_table = slots + victim.swap_table
        return tuple(zip(blocks, slots, strict=True))

    def _swap_is_cheaper(self, victim: Sequence, num_kept: int, blocks: tuple[int, ...]) -> bool:
        start = num_kept * self.config.block_size
        end = max(victim.num_computed_tokens, victim.num_swapped_tokens)
        return self.cost_model.swap_ms(len(blocks)) < self.cost_model.recompute_ms(end - start)

    def recompute_cost(self, request: Request) -> float:
        """Tokens to recompute for each block gained, if a resident lost all its blocks."""
        manager = self.block_manager
        blocks = [block for sequence in request.live for block in sequence.block_table]
        gained = sum(manager.ref_counts[block] == 1 for block in blocks)
        tokens = sum(sequence.num_computed_tokens for sequence in request.live)
        return tokens / gained if gained else float("inf")

    # ------------------------------------------------------------------ the prefix cache

    def commit(self, sequence: Sequence) -> None:
        """Make the full computed blocks of a sequence findable, as far as they are not."""
        size = self.config.block_size
        end = sequence.num_computed_tokens // size
        start = sequence.commit_at // size - 1 if sequence.commit_at else 0
        sequence.commit_at = (end + 1) * size
        if self.config.enable_prefix_caching and end > start:
            self._hash_blocks(sequence, end)
            commit, table = self.block_manager.commit, sequence.block_table
            hashes = sequence.block_hashes
            for index in range(start, end):
                commit(table[index], hashes[index])

    def _find_shared(self, sequence: Sequence, donor: Sequence) -> list[int]:
        """The donor's full prompt blocks, as far as the sequence has none of its own."""
        num_full = sequence.num_prompt_tokens // self.config.block_size
        return list(donor.block_table[len(sequence.block_table) : num_full])

    def _find_cached(self, sequence: Sequence) -> list[int]:
        """Blocks that continue the sequence's table and are in the prefix cache.

        At least one token is left to compute, because something must be sampled from.
        """
        num_held = len(sequence.block_table)
        limit = (sequence.num_tokens - 1) // self.config.block_size
        asks = sequence.request.sampling_params.prompt_logprobs is not None
        if asks and not sequence.num_output_tokens:
            # They come from computing the prompt: only what it once computed itself may be found.
            limit = min(limit, sequence.peak_computed_tokens // self.config.block_size)
        if not self.config.enable_prefix_caching or limit <= num_held:
            return []
        self._hash_blocks(sequence, limit)
        return self.block_manager.find(sequence.block_hashes[num_held:limit])

    def _hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        """Extend ``block_hashes`` to the first ``num_blocks`` blocks of the sequence's tokens."""
        hashes, size = sequence.block_hashes, self.config.block_size
        for index in range(len(hashes), num_blocks):
            end = (index + 1) * size
            parent = hashes[-1] if hashes else sequence.request.cache_root
            hashes.append(hash_block(parent, sequence.token_ids[end - size : end]))


def _num_known(sequence: Sequence) -> int:
    """Tokens that are to have blocks: known ones and drafts."""
    return len(sequence.token_ids) + len(sequence.draft_token_ids)
