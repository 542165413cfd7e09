"""The bytes of the KV blocks: the pool that attention reads, and the swap space beside it.

Both are private anonymous memory maps, so that a page costs memory only once a block in it is
written: a large limit is free until it is used. Pages are huge ones where the kernel has them (it
has none for shared maps). A block is one row in each of the model's cache tensors (two a
layer), and a block operation is one indexed copy along the first axis of each of them; what a row
means (the precision, the order of heads and tokens) is the attention kernel's business.
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

_PAGE = mmap.PAGESIZE


class BlockStore:
    """Pool and swap space for ``num_blocks`` and ``num_swap_blocks`` blocks.

    Args:
        row_bytes: for each cache tensor, the bytes that a block takes in it.
        num_blocks: blocks in the pool.
        num_swap_blocks: blocks in the swap space; 0 for none.

    Raises:
        ConfigError: the system does not grant so much address space.
    """

    def __init__(self, row_bytes: Sequence[int], num_blocks: int, num_swap_blocks: int) -> None:
        #: Per cache tensor, its blocks as rows: ``[num_blocks, row_bytes]``. Never replaced, as
        #: the tensors that the executor hands to the model are views of them.
        self.pool = _rows(row_bytes, num_blocks)
        self._swap = _rows(row_bytes, num_swap_blocks)

    def swap_out(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy (pool block, swap slot) pairs out. O(bytes)."""
        if moves:
            blocks, slots = _columns(moves)
            for pool, swap in zip(self.pool, self._swap, strict=True):
                swap[slots] = pool[blocks]

    def swap_in(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy (swap slot, pool block) pairs in. O(bytes)."""
        if moves:
            slots, blocks = _columns(moves)
            for pool, swap in zip(self.pool, self._swap, strict=True):
                pool[blocks] = swap[slots]

    def copy(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) pairs within the pool, as if one after the other."""
        if not moves:
            return
        sources, destinations = _columns(moves)
        if np.isin(sources, destinations).any() or len(set(destinations.tolist())) < len(moves):
            # One pair's source is another pair's destination: the order counts.
            for source, destination in moves:
                for pool in self.pool:
                    pool[destination] = pool[source]
            return
        for pool in self.pool:
            pool[destinations] = pool[sources]

    def close(self) -> None:
        """Let go of the memory; it is freed when the last view of it is."""
        self.pool = []
        self._swap = []


def _columns(
    moves: Sequence[tuple[int, int]],
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    pairs = np.array(moves, dtype=np.intp)
    return pairs[:, 0], pairs[:, 1]


def _rows(row_bytes: Sequence[int], count: int) -> list[Bytes]:
    """One map for all tensors, each tensor beginning on a page of its own."""
    sizes = [-(-width * count // _PAGE) * _PAGE for width in row_bytes]
    total = sum(sizes)
    if not total:
        return [np.empty((count, width), dtype=np.uint8) for width in row_bytes]
    try:
        memory = _anonymous_memory(total)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{total:,} bytes for {count:,} KV blocks are not to be had: {error}"
        ) from error
    data = np.frombuffer(memory, dtype=np.uint8)
    rows, start = [], 0
    for width, size in zip(row_bytes, sizes, strict=True):
        rows.append(data[start : start + width * count].reshape(count, width))
        start += size
    return rows


def _anonymous_memory(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Attention walks the pool block by block; larger pages spare it most of the page walks.
        with contextlib.suppress(OSError):  # a kernel that was built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
