"""The instruction sets ("paths") that the kernels are compiled for, and which of them run here.

All paths come from the same sources and compute the same; which of them is the fastest on a machine
is found by trying, so what is given here is only an order. ``portable`` runs everywhere.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from headway.core.errors import ConfigError

__all__ = ["PATHS", "KernelPath", "Processor", "available_paths", "read_processor"]

_AVX2: Final = ("avx2", "fma", "f16c")
_AVX512: Final = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")


@dataclass(frozen=True, slots=True)
class KernelPath:
    """What a path needs.

    Attributes:
        name: what ``HEADWAY_KERNELS`` says.
        features: of the processor, as Linux names them; all of x86-64. None: any processor.
    """

    name: str
    features: tuple[str, ...] = ()


#: The paths by name, best guess first.
PATHS: Final[Mapping[str, KernelPath]] = {
    path.name: path
    for path in (
        KernelPath("avx512bf16", (*_AVX512, "avx512_bf16")),
        KernelPath("avx512", _AVX512),
        KernelPath("avx2", _AVX2),
        KernelPath("portable"),
    )
}

#: Lines of /proc/cpuinfo that tell apart what a compiler does for "native"; not the clock rate.
_TELLING: Final = (
    "vendor_id",
    "cpu family",
    "model",
    "flags",
    "Features",
    "CPU implementer",
    "CPU part",
    "isa",
)


@dataclass(frozen=True, slots=True)
class Processor:
    """The machine's processor.

    Attributes:
        machine: its architecture, such as ``x86_64``.
        features: that it has and the operating system lets it use, as Linux names them; empty
            where that is not known.
        identity: a text that differs between processors for which a compiler generates different
            code.
    """

    machine: str
    features: frozenset[str]
    identity: str

    @property
    def is_x86_64(self) -> bool:
        """Whether it is an x86 of 64 bits."""
        return self.machine in ("x86_64", "AMD64")


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str = "") -> Processor:
    """The processor at hand.

    Args:
        cpuinfo: Linux's description of it. If it cannot be read, no features are known.
        machine: the architecture, instead of what the operating system says.
    """
    machine = machine or platform.machine()
    try:
        # The first of all processors: they are alike, or the operating system shows none of the
        # features that only some of them have.
        text = cpuinfo.read_text(errors="replace").strip().split("\n\n")[0]
    except OSError:
        return Processor(machine, frozenset(), f"{machine} {platform.processor()}")
    pairs = (line.partition(":")[::2] for line in text.splitlines())
    lines = {name.strip(): value.strip() for name, value in pairs}
    told = [f"{name}: {lines[name]}" for name in _TELLING if name in lines]
    return Processor(
        machine, frozenset(lines.get("flags", "").split()), "\n".join([machine, *told])
    )


def available_paths(processor: Processor | None = None) -> list[str]:
    """The names of the paths to choose from: all that the processor can run, best guess first.

    Only one if ``HEADWAY_KERNELS`` names it. ``processor`` is the one at hand unless it is given.

    Raises:
        ConfigError: ``HEADWAY_KERNELS`` names no path, or one that the processor cannot run.
    """
    processor = processor or read_processor()
    features = processor.features if processor.is_x86_64 else frozenset()
    found = [path.name for path in PATHS.values() if features.issuperset(path.features)]
    forced = os.environ.get("HEADWAY_KERNELS")
    if not forced:
        return found
    if forced not in PATHS:
        raise ConfigError(f"HEADWAY_KERNELS is {forced!r}, must be one of {', '.join(found)}")
    if forced not in found:
        missing = [name for name in PATHS[forced].features if name not in features]
        raise ConfigError(
            f"HEADWAY_KERNELS is {forced!r}, but this processor has no {', '.join(missing)}; "
            f"it can run {', '.join(found)}"
        )
    return [forced]
