"""Large memory on huge pages, where the kernel has them.

A step reads all weights once. On pages of 4 KiB that is tens of thousands of address translations,
more than the processor remembers, and takes 3 to 7 % of a small step.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Final

__all__ = ["use_huge_pages"]

_HUGE_PAGE: Final = 2 << 20
#: Linux 6.1: replace the pages of a range by a huge one now. Older kernels refuse it.
_MADV_COLLAPSE: Final = 25
#: Smaller mappings are not worth the calls.
_MIN_BYTES: Final = 8 << 20


def use_huge_pages() -> None:
    """Move the process's large anonymous memory to huge pages; what cannot be moved stays.

    A huge page takes the place of small pages where at least half of them exist, so no memory
    doubles, and memory that has not been touched takes none: neither the KV pool nor the stacks of
    threads. O(address space of the large mappings), a few µs for 2 MiB.
    """
    if sys.platform != "linux":
        return
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        libc = ctypes.CDLL(None)
        madvise, mincore = libc.madvise, libc.mincore
    except (OSError, AttributeError):
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    exists = (ctypes.c_ubyte * (_HUGE_PAGE // mmap.PAGESIZE))()
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, type(exists))
    for line in lines:
        bounds, permissions, _, device, *_ = line.split()
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if permissions != "rw-p" or device != "00:00" or end - start < _MIN_BYTES:
            continue
        # Range by range: the kernel gives up a call at the first range that has no page at all.
        for address in range(
            -(-start // _HUGE_PAGE) * _HUGE_PAGE, end - _HUGE_PAGE + 1, _HUGE_PAGE
        ):
            if mincore(address, _HUGE_PAGE, exists) == 0:
                num_pages = sum(page & 1 for page in exists)
                if num_pages >= len(exists) / 2:
                    madvise(address, _HUGE_PAGE, _MADV_COLLAPSE)
