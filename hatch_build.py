"""What ``make wheel`` adds to the wheel: the kernels, compiled for any x86-64 Linux.

Without ``HEADWAY_WHEEL=x86_64`` nothing is compiled, and the wheel, which holds the sources, is for
all platforms.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Called by hatchling before it writes a wheel."""

    @property
    def _is_wanted(self) -> bool:
        wanted = os.environ.get("HEADWAY_WHEEL", "")
        if wanted not in ("", "x86_64"):
            raise ValueError(f"HEADWAY_WHEEL is {wanted!r}, must be 'x86_64', or not be set")
        return bool(wanted)

    def dependencies(self) -> list[str]:
        """What pip installs for the time of the build."""
        return self.metadata.core.optional_dependencies["compiler"] if self._is_wanted else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile every path, and have the libraries put where the loader looks for them."""
        if not self._is_wanted or version == "editable":
            return
        sys.path.insert(0, str(Path(self.root, "src")))
        from headway.kernels.build import build_for_wheel  # noqa: PLC0415

        for library in build_for_wheel(Path(self.root, "build", "kernels")):
            for file in library.parent.glob(f"{library.name}*"):
                build_data["force_include"][str(file)] = f"headway/kernels/prebuilt/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-manylinux2014_x86_64"
