"""The bytes of the KV blocks: the pool that attention reads, and the swap space beside it.

Both are private anonymous memory maps, so that a page costs memory only once a block in it is
written: a large limit is free until it is used. Pages are huge ones where the kernel has them (it
has none for shared maps). A block is one row of bytes, and a block operation is one indexed copy;
what the bytes mean (the precision, the order of layers, heads and tokens) is the kernels' business.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headway.core.errors import ConfigError

__all__ = ["BlockStore"]

Bytes = npt.NDArray[np.uint8]


class BlockStore:
    """Pool and swap space for ``num_blocks`` and ``num_swap_blocks`` blocks.

    Args:
        block_bytes: that a block takes.
        num_blocks: blocks in the pool.
        num_swap_blocks: blocks in the swap space; 0 for none.

    Raises:
        ConfigError: the system does not grant so much address space.
    """

    def __init__(self, block_bytes: int, num_blocks: int, num_swap_blocks: int) -> None:
        #: ``[num_blocks, block_bytes]``. Never replaced: the kernels have its address.
        self.pool = _rows(block_bytes, num_blocks)
        self._swap = _rows(block_bytes, num_swap_blocks)

    def swap_out(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy (pool block, swap slot) pairs out. O(bytes)."""
        for block, slot in moves:
            self._swap[slot] = self.pool[block]

    def swap_in(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy (swap slot, pool block) pairs in. O(bytes)."""
        for slot, block in moves:
            self.pool[block] = self._swap[slot]

    def copy(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) pairs within the pool, one after the other. O(bytes)."""
        for source, destination in moves:
            self.pool[destination] = self.pool[source]

    def close(self) -> None:
        """Let go of the memory; it is freed when the last view of it is."""
        self.pool = self._swap = _rows(0, 0)


def _rows(block_bytes: int, count: int) -> Bytes:
    if not block_bytes * count:
        return np.empty((count, block_bytes), dtype=np.uint8)
    try:
        memory = _anonymous_memory(block_bytes * count)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{block_bytes * count:,} bytes for {count:,} KV blocks are not to be had: {error}"
        ) from error
    return np.frombuffer(memory, dtype=np.uint8).reshape(count, block_bytes)


def _anonymous_memory(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Attention walks the pool block by block; larger pages spare it most of the page walks.
        with contextlib.suppress(OSError):  # a kernel that was built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
