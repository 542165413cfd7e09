"""How much memory a process can have: of what the system has left, and of what it is granted.

A container shows its host's memory in ``/proc/meminfo``. What ends the process is the limit of its
control group, or of one above that; so the KV pool must be sized by these limits, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["available_memory"]

#: Where the system says nothing about its memory.
_DEFAULT_BYTES: Final = 4 << 30


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can have before the system must push memory out.

    The smaller of what the system has available and of what each control group leaves that the
    process is in, directly or as a member of a group within. File pages that a group has not used
    lately count as available, since the kernel drops them first. A file that is missing, cannot
    be read or holds something unexpected limits nothing.

    Args:
        root: the directory that holds ``proc`` and ``sys``.
    """
    return min([_system_memory(root), *_group_memory(root)])


def _system_memory(root: Path) -> int:
    """Bytes that the system has available."""
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number = _number(value.removesuffix("kB"))
        if name == "MemAvailable" and number is not None:
            return number * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return _DEFAULT_BYTES


class _Version(NamedTuple):
    """What a version of control groups calls things."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    #: In ``memory.stat``, counting the groups within.
    inactive_file: str


_V1: Final = _Version(
    ("sys/fs/cgroup/memory",),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
#: The second mount is that of systems which have both versions.
_V2: Final = _Version(
    ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file"
)


def _group_memory(root: Path) -> Iterator[int]:
    """Bytes that each control group leaves which limits this process."""
    paths = {_V1: "/", _V2: "/"}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            paths[_V1] = path
        elif number == "0" and not controllers:
            paths[_V2] = path
    for version, path in paths.items():
        for mount in version.mounts:
            for group in _lineage(root / mount, path):
                yield from _left_in(group, version)
                if _read(group.parent / "memory.use_hierarchy").strip() == "0":
                    break  # the first version's groups need not count what is in groups within


def _lineage(mount: Path, path: str) -> list[Path]:
    """The directories of a group and of those above it, up to the mount.

    In a namespace of its own, a process may be told a path that does not exist below the mount;
    the mount itself is then the innermost group that can be seen.
    """
    parts = [part for part in path.split("/") if part]
    try:
        is_seen = ".." not in parts and mount.joinpath(*parts).is_dir()
    except OSError:
        is_seen = False
    if not is_seen:
        parts = []
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _left_in(group: Path, version: _Version) -> Iterator[int]:
    """Bytes that ``group`` leaves, if it has a limit."""
    stat = _statistics(group)
    limits = [_number(_read(group / version.limit))]
    # The first version's least limit of the group and all above it, seen or not.
    limits.append(stat.get("hierarchical_memory_limit"))
    known = [limit for limit in limits if limit is not None]
    if known:
        usage = _number(_read(group / version.usage)) or 0
        used = max(0, usage - stat.get(version.inactive_file, 0))
        yield max(0, min(known) - used)


def _statistics(group: Path) -> Mapping[str, int]:
    """The numbers in a group's ``memory.stat``."""
    found = {}
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        number = _number(value)
        if number is not None:
            found[name] = number
    return found


def _number(text: str) -> int | None:
    """A number of up to 64 bits; None for ``max`` and for what is no number."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def _read(path: Path) -> str:
    """What a file holds; nothing if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""
