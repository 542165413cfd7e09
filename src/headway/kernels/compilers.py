"""The C++ compilers of a machine, and the flags that they take for a path.

The compiler is the one that ``$CXX`` names; else the system's (``c++``, ``g++``, ``clang++``); else
the one that the package ``ziglang`` brings along, so that Python and pip are enough. A wheel's
libraries are always compiled by that one, which knows the symbols of old C libraries.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from headway.core.errors import ConfigError
from headway.kernels.paths import PATHS, Processor

__all__ = [
    "COMPILERS",
    "Compiler",
    "Recipe",
    "compilers",
    "native_recipe",
    "wheel_recipe",
    "ziglang",
]

#: The system's compilers, under the names by which they are looked for.
COMPILERS: Final = ("c++", "g++", "clang++")

# Results must not depend on the compiler: without -ffp-contract=off, each would choose where to
# round once instead of twice.
_FLAGS: Final = (
    "-std=c++17",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
_SANITIZE: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
# Another C++ library may be in the process, so ours is hidden; and what is missing is found now.
_HIDE: Final = ("-s", "-Wl,--version-script=exports", "-Wl,-z,defs")
#: Alternatives: each is tried if those before it fail. Not every system has the static form of its
#: C++ library.
_LINK: Final = ((*_HIDE, "-static-libgcc", "-static-libstdc++"), _HIDE)
#: Zig compiles its C++ library before it first links it, which takes a minute, and the kernels do
#: without.
_ZIG_LINK: Final = ((*_HIDE, "-nostdlib++"), _HIDE)
#: Gcc would move additions to behind all the products that they add, which do not fit in registers.
_GCC_FLAGS: Final = ("-fno-tree-ter",)
#: The linkers of other systems know none of that.
_PLAIN_LINK: Final = ((),)
#: Of the wheel: the C library of 2014, which every Linux distribution has by now.
_WHEEL_TARGET: Final = ("-target", "x86_64-linux-gnu.2.17")


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that can be run.

    Attributes:
        command: the words that run it.
        version: the first line of what it says about itself.
    """

    command: tuple[str, ...]
    version: str

    @property
    def is_zig(self) -> bool:
        """Whether it takes zig's names of processors in place of clang's flags."""
        return _is_zig(self.command)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a path is compiled and linked: all of it but the names of files.

    Attributes:
        name: of the path.
        compiler: that does it.
        compile_flags: for every source.
        link_flags: alternatives, in the order in which they are tried. They hide what a file
            ``exports`` in the working directory does not list.
    """

    name: str
    compiler: Compiler
    compile_flags: tuple[str, ...]
    link_flags: tuple[tuple[str, ...], ...]


def compilers() -> Iterator[Compiler]:
    """The compilers of this machine, in the order in which they are to be tried.

    Raises:
        ConfigError: ``CXX`` is set, and names none.
    """
    named = os.environ.get("CXX")
    if named:
        try:
            compiler = _identified(shlex.split(named))
        except ValueError:  # a quotation mark is missing
            compiler = None
        if compiler is None:
            raise ConfigError(
                f"CXX is {named!r}, must be a C++ compiler that can be run, or not be set"
            )
        yield compiler
        return
    seen = set()
    for name in COMPILERS:
        found = shutil.which(name)
        # One is often the other under a second name.
        if found is None or Path(found).resolve() in seen:
            continue
        seen.add(Path(found).resolve())
        if (compiler := _identified([found])) is not None:
            yield compiler
    if (compiler := ziglang()) is not None:
        yield compiler


def _identified(words: Sequence[str]) -> Compiler | None:
    """The compiler that these words run, or None if they do not."""
    found = shutil.which(words[0]) if words else None
    if found is None:
        return None
    command = (str(Path(found).absolute()), *words[1:])
    question = [*command[:-1], "version"] if _is_zig(command) else [*command, "--version"]
    try:
        answer = subprocess.run(
            question,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=60,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.decode(errors="replace").split("\n")
    return Compiler(command, lines[0].strip())


def _is_zig(command: Sequence[str]) -> bool:
    return command[-1] == "c++" and any(Path(word).stem in ("zig", "ziglang") for word in command)


def ziglang() -> Compiler | None:
    """The compiler of the package ``ziglang``, if that is installed."""
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        return None
    return _identified([str(Path(package.origin).with_name("zig")), "c++"])


def native_recipe(name: str, compiler: Compiler, processor: Processor, sanitize: bool) -> Recipe:
    """For the processor at hand; with ``sanitize``, every access and every operation is checked."""
    features = PATHS[name].features
    target: tuple[str, ...]
    if compiler.is_zig:
        target = (_zig_processor(name) if features else "-mcpu=native",)
    elif features:
        target = (*(_flag(feature) for feature in features), "-mtune=native")
    else:
        target = ("-march=native" if processor.is_x86_64 else "-mcpu=native",)
    if not (compiler.is_zig or "clang" in compiler.version):
        target += _GCC_FLAGS
    if sanitize:
        flags = ("-O1", *_SANITIZE, *_FLAGS, _definition(name), *target)
        return Recipe(name, compiler, flags, (_SANITIZE,))
    flags = ("-O3", *_FLAGS, _definition(name), *target)
    if sys.platform != "linux":
        return Recipe(name, compiler, flags, _PLAIN_LINK)
    return Recipe(name, compiler, flags, _ZIG_LINK if compiler.is_zig else _LINK)


def wheel_recipe(name: str, zig: Compiler) -> Recipe:
    """For any x86-64 Linux."""
    target = (*_WHEEL_TARGET, _zig_processor(name))
    flags = ("-O3", *_FLAGS, _definition(name), *target)
    return Recipe(name, zig, flags, tuple((*_WHEEL_TARGET, *link) for link in _ZIG_LINK))


def _definition(name: str) -> str:
    return f"-DHEADWAY_PATH_{name.upper()}"


def _flag(feature: str) -> str:
    return "-m" + feature.replace("_", "")


def _zig_processor(name: str) -> str:
    """Zig takes no flag per feature: it would drop all the others."""
    features = (feature.replace("_", "") for feature in PATHS[name].features)
    return "+".join(["-mcpu=x86_64", *features])
