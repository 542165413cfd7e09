"""Where the kernels' library comes from: out of the wheel, out of the cache, or compiled now.

A wheel for one platform (``make wheel``) holds a library for every path, beside this file in
``prebuilt``; a wheel for all platforms, and a source tree, hold the sources alone, and what is
compiled from them is kept in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from headway.kernels.build import Progress, build, is_whole
from headway.kernels.paths import available_paths

__all__ = ["Progress", "available_paths", "load"]

_PREBUILT: Final = Path(__file__).parent / "prebuilt"


def load(
    name: str, home: Path, progress: Progress | None = None, prebuilt: Path = _PREBUILT
) -> Path:
    """The file of a path's library; its contents have been verified.

    Args:
        name: of the path, one of ``available_paths()``.
        home: directory of the cache.
        progress: told of the stage ``compile``; not called if nothing is compiled.
        prebuilt: directory of the libraries that came with the package.

    Raises:
        KernelError: it must be compiled, and cannot be.
        ConfigError: ``CXX`` names no compiler.
    """
    library = prebuilt / f"{name}.so"
    return library if is_whole(library) else build(name, home, progress=progress)
