"""Huge pages, by what the kernel says of the process's mappings."""

from __future__ import annotations

import mmap
import platform
import re
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from headway.executor.huge_pages import use_huge_pages
from headway.executor.swap import BlockStore

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MB = 1 << 20


def kernel_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


if sys.platform != "linux" or not SETTING.exists():
    pytest.skip("this system has no transparent huge pages", allow_module_level=True)

needs_advice = pytest.mark.skipif(
    "[never]" in SETTING.read_text(), reason="transparent huge pages are switched off"
)
needs_collapse = pytest.mark.skipif(
    kernel_version() < (6, 1), reason="the kernel collapses pages on request since Linux 6.1"
)


def mapping(data: npt.NDArray[np.uint8]) -> dict[str, int]:
    """Bytes by kind of the mapping that holds ``data``, as of /proc/self/smaps."""
    address, is_it, sizes = data.ctypes.data, False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_it = int(found[1], 16) <= address < int(found[2], 16)
        elif is_it and (found := re.match(r"(\w+): +(\d+) kB", line)):
            sizes[found[1]] = int(found[2]) * 1024
    return sizes


def anonymous_memory(size: int) -> mmap.mmap:
    """A mapping of its own, whose pages are small until ``madvise`` allows huge ones."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory.madvise(mmap.MADV_DONTDUMP)  # the kernel joins neighbours of equal flags
    return memory


@needs_advice
def test_the_pool_is_on_huge_pages_as_it_is_written() -> None:
    store = BlockStore([MB], num_blocks=128, num_swap_blocks=64)
    store.pool[0][:64] = 1
    assert mapping(store.pool[0])["AnonHugePages"] >= 32 * MB
    store.swap_out([(block, block) for block in range(64)])
    assert mapping(store._swap[0])["AnonHugePages"] >= 32 * MB


@needs_collapse
def test_the_untouched_pool_takes_no_memory() -> None:
    store = BlockStore([MB], num_blocks=512, num_swap_blocks=512)
    store.pool[0][5:8] = 1
    before = mapping(store.pool[0])["Rss"]
    use_huge_pages()
    assert mapping(store.pool[0])["Rss"] <= before + 4 * MB


@needs_collapse
def test_memory_behind_an_untouched_range_is_moved() -> None:
    memory = anonymous_memory(32 * MB)
    data = np.frombuffer(memory, dtype=np.uint8)
    data[: 8 * MB] = data[16 * MB :] = 1
    memory.madvise(mmap.MADV_HUGEPAGE)
    assert mapping(data)["AnonHugePages"] == 0
    use_huge_pages()
    assert mapping(data)["AnonHugePages"] >= 18 * MB  # 24 less an unaligned end of each piece
    assert mapping(data)["Rss"] <= 28 * MB
    assert data[: 8 * MB].all() and not data[8 * MB : 16 * MB].any() and data[16 * MB :].all()


@needs_collapse
def test_memory_that_is_hardly_touched_is_left_alone() -> None:
    memory = anonymous_memory(32 * MB)
    data = np.frombuffer(memory, dtype=np.uint8)
    data[::MB] = 1
    memory.madvise(mmap.MADV_HUGEPAGE)
    before = mapping(data)["Rss"]
    use_huge_pages()
    assert mapping(data)["Rss"] == before
