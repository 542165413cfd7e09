"""Paged KV blocks: block tables, reference counts, copy-on-write, and the prefix cache.

Every block is in exactly one of three places:

- **free**: its contents mean nothing;
- **held**: in at least one block table (``ref_count`` tables);
- **cached**: in no table, but full, and findable by its contents until it is reused; kept in
  order of last use, and the least recently used is reused first.

Contents are found by a chained hash: a full block's hash covers its tokens and the hash of the
block before it, hence the whole prefix (as in vLLM's automatic prefix caching). BLAKE2b makes
a collision as unlikely as a broken disk, and equal on every run.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

from headway.core.errors import ConfigError, DuplicateRequest, InternalError, UnknownRequest

__all__ = ["BlockManager", "BlockStatistics", "TableId", "hash_block"]

_DIGEST_BYTES = 16

#: What a block table goes by.
TableId: TypeAlias = str | tuple[str, int]


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The chained hash of a full block: 16 bytes. O(block size).

    Args:
        parent: hash of the block before it, ``b""`` for the first.
        token_ids: the block's tokens.
    """
    content = parent + array("q", token_ids).tobytes()
    return blake2b(content, digest_size=_DIGEST_BYTES).digest()


class BlockStatistics(NamedTuple):
    """Where the blocks are: ``free + held + cached == num_blocks``."""

    num_blocks: int
    free: int
    held: int
    cached: int

    @property
    def usage(self) -> float:
        """Share of the pool that block tables hold, 0 … 1."""
        return self.held / self.num_blocks


class BlockManager:
    """Who holds which of ``num_blocks`` blocks of ``block_size`` tokens.

    Every operation is O(1) per block it names. A table belongs to the manager; callers read
    it and change it through the methods only.

    Raises:
        ConfigError: a count is below 1.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, must be at least 1")
        #: Blocks in the pool; their ids are 0 … num_blocks − 1.
        self.num_blocks = num_blocks
        #: Tokens in a block.
        self.block_size = block_size
        #: Whether full blocks stay findable.
        self.enable_prefix_caching = enable_prefix_caching
        #: request id → its block table: a block's tokens start at index · block_size.
        self.tables: dict[TableId, list[int]] = {}
        #: block → number of tables it is in; 0 for free and cached blocks.
        self.ref_counts: list[int] = [0] * num_blocks
        #: block → the hash it is findable by; None if it is not.
        self._hashes: list[bytes | None] = [None] * num_blocks
        #: hash → the one block findable by it; the inverse of ``_hashes``.
        self._by_hash: dict[bytes, int] = {}
        #: Blocks whose contents mean nothing, used from the end: the most recently freed
        #: first, whose memory is likeliest to be in the processor's cache.
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        #: Findable blocks in no table, least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    # ------------------------------------------------------------------ reading

    @property
    def num_available(self) -> int:
        """Blocks that can be had without taking any from a table: free and cached."""
        return len(self._free) + len(self._cached)

    def statistics(self) -> BlockStatistics:
        """How many blocks are where."""
        held = self.num_blocks - self.num_available
        return BlockStatistics(self.num_blocks, len(self._free), held, len(self._cached))

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def find(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest findable prefix of a chain of hashes; nothing changes."""
        found = []
        for block_hash in block_hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    # ------------------------------------------------------------------ tables

    def allocate(self, request_id: TableId, num_blocks: int = 0) -> list[int]:
        """Open a table with ``num_blocks`` fresh blocks.

        Raises:
            DuplicateRequest: the request has a table.
            InternalError: fewer than ``num_blocks`` are available; nothing has changed.
        """
        if request_id in self.tables:
            raise DuplicateRequest(f"request {request_id!r} has a block table already")
        self._require(num_blocks)
        table = self.tables[request_id] = [self._take() for _ in range(num_blocks)]
        return table

    def append(self, request_id: TableId, num_blocks: int = 1) -> list[int]:
        """Add fresh blocks to the end of a table; returns the table.

        Raises:
            UnknownRequest: the request has no table.
            InternalError: fewer than ``num_blocks`` are available; nothing has changed.
        """
        table = self._table(request_id)
        self._require(num_blocks)
        for _ in range(num_blocks):
            table.append(self._take())
        return table

    def append_one(self, request_id: TableId) -> int:
        """Add a fresh block to the end of a table; returns the block. One must be available."""
        if not self._free:
            self.evict()
        block = self._free.pop()
        self.ref_counts[block] = 1
        self.tables[request_id].append(block)
        return block

    def touch(self, blocks: Iterable[int]) -> None:
        """Reference found blocks, so that they cannot be reused; undone by ``release``."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._cached[block]
            self.ref_counts[block] += 1

    def share(self, request_id: TableId, blocks: Sequence[int]) -> None:
        """Add blocks that ``touch`` has referenced to the end of a table."""
        self._table(request_id).extend(blocks)

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block, in the order given.

        A block that no other table references becomes cached if it is findable, else free. Cached
        blocks are reused in the order they were released, so a table is released from its
        end: a prefix is of use without its continuation, not the other way round.
        """
        for block in blocks:
            count = self.ref_counts[block] = self.ref_counts[block] - 1
            assert count >= 0, f"block {block} was released more often than referenced"
            if count == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def trim(self, request_id: TableId, num_kept: int) -> list[int]:
        """Cut a table to its first ``num_kept`` blocks; returns the blocks cut off.

        Raises:
            UnknownRequest: the request has no table.
        """
        table = self._table(request_id)
        cut = table[num_kept:]
        del table[num_kept:]
        self.release(reversed(cut))
        return cut

    def free(self, request_id: TableId) -> None:
        """Close a table. Its full blocks stay findable until they are reused.

        Raises:
            UnknownRequest: the request has no table.
        """
        self.trim(request_id, 0)
        del self.tables[request_id]

    # ------------------------------------------------------------------ copy-on-write

    def fork(self, parent_id: TableId, child_id: TableId) -> list[int]:
        """Open a table for ``child_id`` that shares every block of the parent's.

        Before either writes into a shared block, it calls ``copy_on_write``.

        Raises:
            UnknownRequest: the parent has no table.
            DuplicateRequest: the child has one.
        """
        parent = self._table(parent_id)
        child = self.allocate(child_id)
        self.touch(parent)
        child.extend(parent)
        return child

    def copy_on_write(self, request_id: TableId, index: int) -> tuple[int, int] | None:
        """Make the block at ``index`` of a table safe to write.

        Returns:
            None if no other table has the block; else ``(source, destination)``: the table
            now has the fresh block ``destination``, into which the caller copies ``source``.

        Raises:
            InternalError: a copy is needed and no block is available.
        """
        table = self._table(request_id)
        source = table[index]
        if self.ref_counts[source] == 1:
            return None
        self._require(1)
        table[index] = self._take()
        self.release((source,))
        return source, table[index]

    # ------------------------------------------------------------------ prefix cache

    def commit(self, block: int, block_hash: bytes) -> None:
        """Make a full, held block findable. The first block with a hash keeps it."""
        if self.enable_prefix_caching and block_hash not in self._by_hash:
            old = self._hashes[block]
            if old is not None:
                del self._by_hash[old]
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block

    def evict(self) -> int:
        """Make the least recently used cached block free; returns it.

        Raises:
            InternalError: no block is cached.
        """
        if not self._cached:
            raise InternalError("no cached block to evict")
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block] = None
        self._free.append(block)
        return block

    def reset_prefix_cache(self) -> int:
        """Forget all cached blocks (held ones stay findable); returns how many."""
        count = len(self._cached)
        for _ in range(count):
            self.evict()
        return count

    def check(self) -> None:
        """Check that every block is in exactly one place. O(blocks); for tests."""
        free, cached = set(self._free), set(self._cached)
        held = {block for block in range(self.num_blocks) if self.ref_counts[block]}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached and not free & held and not cached & held
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is lost"
        hashed = {block: h for block, h in enumerate(self._hashes) if h is not None}
        assert {h: block for block, h in hashed.items()} == self._by_hash
        assert cached <= hashed.keys() and not free & hashed.keys()

    # ------------------------------------------------------------------ internals

    def _table(self, request_id: TableId) -> list[int]:
        try:
            return self.tables[request_id]
        except KeyError:
            raise UnknownRequest(f"request {request_id!r} has no block table") from None

    def _require(self, num_blocks: int) -> None:
        if num_blocks > self.num_available:
            raise InternalError(
                f"{num_blocks} blocks asked for, {self.num_available} of {self.num_blocks} "
                "are available"
            )

    def _take(self) -> int:
        if not self._free:
            self.evict()
        block = self._free.pop()
        self.ref_counts[block] = 1
        return block
