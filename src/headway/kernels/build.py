"""Compiles the kernels for the machine at hand, once, and keeps the library.

Every ``.cpp`` file is compiled by a process of its own, all at the same time. A library is kept
under a key of all that it depends on: the sources, the compiler, its flags and the processor.
Layout of the cache::

    <path>-<key>.so            the library
    <path>-<key>.so.sha256     its checksum: without it, or with another, it is compiled again
    lock                       held by the process that compiles; others wait, and find the result
    zig/                       what ziglang keeps of its own C++ library, if it is used

A file appears under its name only when it is whole (a temporary neighbour is renamed).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from headway.core.errors import KernelError
from headway.kernels.compilers import (
    COMPILERS,
    Recipe,
    compilers,
    native_recipe,
    wheel_recipe,
    ziglang,
)
from headway.kernels.paths import PATHS, read_processor

__all__ = ["Progress", "build", "build_for_wheel", "is_whole"]

#: Called with the stage, ``compile``, and the fraction of it that is done, 0 … 1.
Progress = Callable[[str, float], None]

_SOURCES: Final = Path(__file__).parent
_INSTALL: Final = "pip install 'headway-llm[compiler]'"

#: What a library exports: nothing but our functions. Another C++ library may be in the process.
_EXPORTS: Final = "{ global: hw_*; local: *; };\n"

_POLL_SECONDS: Final = 0.02
_PARTIAL_PREFIX: Final = ".partial-"
#: What is still not whole after a day belongs to a process that was killed.
_STALE_PARTIAL_SECONDS: Final = 24 * 3600
#: A library that was not loaded for so long belongs to sources or a compiler that are gone.
_STALE_LIBRARY_SECONDS: Final = 30 * 24 * 3600
_ERROR: Final = re.compile(r"error:|undefined reference|cannot find")
_MAX_LINE: Final = 200


def build(
    name: str,
    home: Path,
    *,
    sanitize: bool = False,
    sources: Path = _SOURCES,
    progress: Progress | None = None,
) -> Path:
    """The library of a path, out of the cache, or compiled and put there.

    If a compiler fails, the next one is tried, unless ``$CXX`` names it.

    Args:
        name: of the path, a key of ``PATHS`` that the processor can run.
        home: directory of the cache; made if it is missing. If it cannot be written, the library is
            kept in a temporary directory for the life of the process.
        sanitize: have every access and every operation checked. The process must have been started
            with the sanitizer's library loaded (``LD_PRELOAD``).
        sources: directory whose ``.cpp`` and ``.h`` files make the library.
        progress: told of the stage ``compile``; not called on a cache hit.

    Raises:
        KernelError: there is no compiler, it fails, or there is no room for the result.
        ConfigError: ``CXX`` names no compiler.
    """
    processor = read_processor()
    contents = _contents(sources)
    failure: KernelError | None = None
    for compiler in compilers():
        if sanitize and compiler.is_zig:
            continue  # it has no AddressSanitizer
        recipe = native_recipe(name, compiler, processor, sanitize)
        key = hashlib.sha256(repr((contents, recipe, processor.identity)).encode())
        file_name = f"{name}-{key.hexdigest()[:32]}.so"
        if _is_found(home / file_name):
            return home / file_name
        try:
            return _build_once(recipe, sources, home, file_name, progress or _ignore)
        except KernelError as error:
            failure = failure or error
    raise failure or KernelError(
        f"the kernels must be compiled, and there is no C++ compiler ({', '.join(COMPILERS)}): "
        f"install one, name it in $CXX, or run `{_INSTALL}`"
    )


def build_for_wheel(directory: Path, *, sources: Path = _SOURCES) -> list[Path]:
    """Compile every path for any x86-64 Linux, with ziglang, and return the libraries.

    They are called ``<path>.so``, and each has its checksum beside it.

    Raises:
        KernelError: ziglang is not installed, or fails.
    """
    zig = ziglang()
    if zig is None:
        raise KernelError(f"a wheel's kernels are compiled by ziglang: run `{_INSTALL}`")
    directory.mkdir(parents=True, exist_ok=True)
    libraries = []
    for name in PATHS:
        libraries.append(directory / f"{name}.so")
        _compile(wheel_recipe(name, zig), sources, libraries[-1], _ignore)
    return libraries


def is_whole(library: Path) -> bool:
    """Whether a library is there, and is what its checksum was made of."""
    try:
        return _checksum_file(library).read_bytes() == _checksum(library)
    except OSError:
        return False


def _contents(sources: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        text = file.read_bytes()
        digest.update(f"{file.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _checksum(library: Path) -> bytes:
    return hashlib.sha256(library.read_bytes()).hexdigest().encode()


def _checksum_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _is_found(library: Path) -> bool:
    """Whether the cache has a whole library; it then counts as used today."""
    if not is_whole(library):
        return False
    with contextlib.suppress(OSError):
        library.touch()
    return True


def _build_once(
    recipe: Recipe, sources: Path, home: Path, file_name: str, report: Progress
) -> Path:
    """Compile into the cache, unless another process does so first."""
    try:
        directory = _writable(home)
        library = directory / file_name
        report("compile", 0.0)
        with _locked(directory):
            if not _is_found(library):
                _remove_stale(directory)
                _compile(recipe, sources, library, report)
        report("compile", 1.0)
    except OSError as error:
        raise KernelError(
            f"the {recipe.name} kernels cannot be compiled in {home}: {error.strerror or error} "
            "(HEADWAY_HOME names another directory)"
        ) from error
    return library


def _writable(home: Path) -> Path:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return home
    except OSError:
        return _temporary_home()


@functools.cache
def _temporary_home() -> Path:
    """A cache for the life of the process."""
    directory = Path(tempfile.mkdtemp(prefix="headway-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    # To be locked, a file need not be writable: it may be another user's.
    file = os.open(directory / "lock", os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        # On a file system without locks two processes may compile the same; either result is good.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _remove_stale(directory: Path) -> None:
    now = time.time()
    with contextlib.suppress(OSError):
        for scratch in directory.glob(f"{_PARTIAL_PREFIX}*"):
            if scratch.stat().st_mtime < now - _STALE_PARTIAL_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)
        for library in directory.glob("*.so"):
            if library.stat().st_mtime < now - _STALE_LIBRARY_SECONDS:
                library.unlink()
                _checksum_file(library).unlink(missing_ok=True)


def _compile(recipe: Recipe, sources: Path, library: Path, report: Progress) -> None:
    """Compile, link, and give the library and its checksum their names."""
    directory = library.parent.absolute()
    with tempfile.TemporaryDirectory(prefix=_PARTIAL_PREFIX, dir=directory) as name:
        scratch = Path(name)
        environment = {"ZIG_GLOBAL_CACHE_DIR": str(directory / "zig"), **os.environ}
        # What a compiler leaves behind when it is stopped goes with the rest.
        environment |= {"LC_ALL": "C", "TMPDIR": name}
        output = _make(recipe, sources, scratch, environment, report)
        checksum = scratch / "checksum"
        checksum.write_bytes(_checksum(output))
        # Should the process end between the two, the library counts as torn.
        output.replace(library)
        checksum.replace(_checksum_file(library))


def _make(
    recipe: Recipe, sources: Path, scratch: Path, environment: Mapping[str, str], report: Progress
) -> Path:
    """Compile every source into ``scratch``, and link the library there."""
    files = sorted(file.name for file in sources.glob("*.cpp"))
    assert files, f"{sources} has no .cpp file"
    compiler = recipe.compiler.command
    run = functools.partial(_run, recipe, environment, scratch)
    run(
        sources,
        [
            [*compiler, *recipe.compile_flags, "-c", file, "-o", str(scratch / f"{file}.o")]
            for file in files
        ],
        lambda done: report("compile", done / (len(files) + 1)),
    )
    (scratch / "exports").write_text(_EXPORTS)
    objects = [f"{file}.o" for file in files]
    *preferred, last = (
        [*compiler, "-shared", "-pthread", *flags, *objects, "-o", "library.so"]
        for flags in recipe.link_flags
    )
    for command in preferred:
        with contextlib.suppress(KernelError):
            run(scratch, [command])
            break
    else:
        run(scratch, [last])
    return scratch / "library.so"


def _run(
    recipe: Recipe,
    environment: Mapping[str, str],
    scratch: Path,
    directory: Path,
    commands: Sequence[Sequence[str]],
    count: Callable[[int], None] | None = None,
) -> None:
    """Run commands in ``directory``, all at the same time, and ``count`` those that are done.

    What they say goes into files in ``scratch``.

    Raises:
        KernelError: one has failed; the others are stopped.
    """
    logs = [scratch / f"{index}.log" for index in range(len(commands))]
    running: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as output:
                running[log] = subprocess.Popen(
                    command,
                    cwd=directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # A group of its own: a compiler is several processes, which end together.
                    start_new_session=True,
                )
        while running:
            for log, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[log]
                if status != 0:
                    raise KernelError(_failure(recipe, log, status))
                if count is not None:
                    count(len(commands) - len(running))
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _failure(recipe: Recipe, log: Path, status: int) -> str:
    """What to do, and up to three lines of what the compiler said, from its first error on."""
    compiler = shlex.join(recipe.compiler.command)
    if os.environ.get("CXX"):
        advice = "name another compiler in $CXX, or unset it"
    elif recipe.compiler.is_zig:
        advice = "install another compiler"
    else:
        advice = f"install a newer one, name another in $CXX, or run `{_INSTALL}`"
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    lines = lines or [f"(nothing; its exit status is {status})"]
    errors = (index for index, line in enumerate(lines) if _ERROR.search(line))
    first = next(errors, max(0, len(lines) - 3))
    said = "".join(f"\n  {line[:_MAX_LINE]}" for line in lines[first : first + 3])
    return (
        f"the {recipe.name} kernels cannot be compiled by {compiler} ({recipe.compiler.version}): "
        f"{advice}. It says:{said}"
    )


def _ignore(stage: str, fraction: float) -> None:
    """No progress is wanted."""
