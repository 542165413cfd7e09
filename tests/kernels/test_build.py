"""Compiling the kernels: once, whole, and in one line if it cannot be done.

The sources are a small library of two files; the compilers are real ones, but for a script that
fails where a compiler must.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headway.core.errors import ConfigError, KernelError
from headway.kernels.build import build, build_for_wheel, is_whole
from headway.kernels.compilers import Compiler, compilers
from headway.kernels.loader import load
from headway.kernels.paths import PATHS

_HAS_ZIGLANG = importlib.util.find_spec("ziglang") is not None
needs_ziglang = pytest.mark.skipif(not _HAS_ZIGLANG, reason="the extra `compiler` is missing")

_SOURCE = Path(__file__).parents[2] / "src"

_HEADER = """\
#define EXPORT extern "C" __attribute__((visibility("default")))
#define ANSWER 42
EXPORT int hw_answer(void);
"""
_ANSWER = """\
#include "small.h"
int hw_answer(void) { return ANSWER; }
EXPORT int not_ours(void) { return 0; }
"""
_TWICE = """\
#include <stdlib.h>
#include "small.h"
EXPORT int hw_twice(void) { return 2 * hw_answer(); }
EXPORT int hw_read(int index) {
  int* values = (int*)calloc(4, sizeof(int));
  volatile int value = values[index];
  free(values);
  return value;
}
"""
_FAILS = """\
#!/bin/sh
case "$1" in --version) echo "old-c++ 1.0"; exit 0;; esac
echo "In file included from somewhere:"
echo "c++: error: unrecognized command-line option '-std=c++17'" >&2
echo "c++: note: line two" >&2
echo "c++: note: line three" >&2
echo "c++: note: line four" >&2
exit 1
"""


@pytest.fixture(autouse=True)
def zig_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What zig makes of its own libraries, once for all tests."""
    directory = tmp_path_factory.getbasetemp() / "zig"
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(directory))


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    """One that works."""
    found = next(compilers(), None)
    if found is None:
        pytest.skip("there is no C++ compiler, and the extra `compiler` is missing")
    return found


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "small.h").write_text(_HEADER)
    (directory / "answer.cpp").write_text(_ANSWER)
    (directory / "twice.cpp").write_text(_TWICE)
    return directory


def write_script(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@pytest.fixture
def count_compiled(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int]:
    """How many files have been compiled: ``$CXX`` is a script that counts, and compiles."""
    log = tmp_path / "compiled"
    program, *rest = compiler.command
    script = write_script(
        tmp_path / "counting" / Path(program).name,  # by its name, zig is known
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo >>{log};; esac\nexec {program} "$@"\n',
    )
    monkeypatch.setenv("CXX", shlex.join([str(script), *rest]))
    return lambda: len(log.read_text()) if log.exists() else 0


def entries(home: Path) -> list[str]:
    """What is in a cache, but for the lock."""
    return sorted(file.name for file in home.iterdir() if file.name not in ("lock", "zig"))


def test_a_library_is_compiled_and_computes(
    tmp_path: Path, sources: Path, compiler: Compiler
) -> None:
    told: list[tuple[str, float]] = []
    library = build(
        "portable", tmp_path / "home", sources=sources, progress=lambda *step: told.append(step)
    )
    loaded = ctypes.CDLL(str(library))
    assert loaded.hw_twice() == 84
    assert not hasattr(loaded, "not_ours")
    assert {stage for stage, _ in told} == {"compile"}
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert entries(tmp_path / "home") == [library.name, f"{library.name}.sha256"]
    assert sorted(file.name for file in sources.iterdir()) == ["answer.cpp", "small.h", "twice.cpp"]


@pytest.mark.parametrize("name", [name for name in PATHS if name != "portable"])
def test_every_path_is_compiled_with_its_own_flags(
    tmp_path: Path, sources: Path, compiler: Compiler, name: str
) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the vector paths are x86-64's")
    macros = ["__AVX2__", "__FMA__", "__F16C__"]
    if name != "avx2":
        macros += [f"__AVX512{part}__" for part in ("F", "BW", "VL", "DQ", "VNNI")]
    if name == "avx512bf16":
        macros += ["__AVX512BF16__"]
    checks = "".join(f"#ifndef {macro}\n#error no {macro}\n#endif\n" for macro in macros)
    definition = f"#ifndef HEADWAY_PATH_{name.upper()}\n#error the path has no name\n#endif\n"
    none_too_many = "#ifdef __AVX512F__\n#error too much\n#endif\n" if name == "avx2" else ""
    (sources / "checks.cpp").write_text(checks + definition + none_too_many)
    assert is_whole(build(name, tmp_path / "home", sources=sources))


def test_the_second_time_comes_from_the_cache(
    tmp_path: Path, sources: Path, count_compiled: Callable[[], int]
) -> None:
    first = build("portable", tmp_path / "home", sources=sources)
    assert count_compiled() == 2
    told: list[tuple[str, float]] = []
    second = build(
        "portable", tmp_path / "home", sources=sources, progress=lambda *step: told.append(step)
    )
    assert second == first
    assert count_compiled() == 2
    assert not told


def test_the_key_follows_sources_flags_and_compiler(
    tmp_path: Path, sources: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build("portable", tmp_path / "home", sources=sources)
    (sources / "small.h").write_text(_HEADER.replace("42", "43"))
    second = build("portable", tmp_path / "home", sources=sources)
    assert second != first
    assert ctypes.CDLL(str(second)).hw_twice() == 86
    (sources / "small.h").write_text(_HEADER)
    assert build("portable", tmp_path / "home", sources=sources) == first
    program, *rest = compiler.command
    again = write_script(tmp_path / "again" / Path(program).name, f'#!/bin/sh\n{program} "$@"\n')
    monkeypatch.setenv("CXX", shlex.join([str(again), *rest]))
    assert build("portable", tmp_path / "home", sources=sources) not in (first, second)


@pytest.mark.parametrize("damage", ["truncate", "flip", "no checksum", "other checksum"])
def test_a_torn_library_is_compiled_again(
    tmp_path: Path, sources: Path, count_compiled: Callable[[], int], damage: str
) -> None:
    library = build("portable", tmp_path / "home", sources=sources)
    good = library.read_bytes()
    checksum = library.with_name(f"{library.name}.sha256")
    match damage:
        case "truncate":
            library.write_bytes(good[:1000])
        case "flip":
            library.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        case "no checksum":
            checksum.unlink()
        case "other checksum":
            checksum.write_bytes(b"\xff")
    assert not is_whole(library)
    assert build("portable", tmp_path / "home", sources=sources) == library
    assert count_compiled() == 4
    assert is_whole(library)
    assert ctypes.CDLL(str(library)).hw_twice() == 84
    assert entries(tmp_path / "home") == [library.name, checksum.name]


def test_an_error_in_the_sources_is_three_lines(
    tmp_path: Path, sources: Path, count_compiled: Callable[[], int]
) -> None:
    (sources / "answer.cpp").write_text("int wrong(void) {\n  return nothing;\n}\n" * 5)
    with pytest.raises(KernelError) as caught:
        build("portable", tmp_path / "home", sources=sources)
    headline, *said = str(caught.value).splitlines()
    assert headline.startswith(f"the portable kernels cannot be compiled by {os.environ['CXX']} (")
    assert headline.endswith("): name another compiler in $CXX, or unset it. It says:")
    assert len(said) == 3
    assert re.search(r"answer\.cpp:2:\d+: error: .*nothing", said[0])
    assert entries(tmp_path / "home") == []


def test_a_function_that_is_missing_is_found_by_the_linker(
    tmp_path: Path, sources: Path, compiler: Compiler
) -> None:
    if compiler.is_zig:
        pytest.skip("zig would first compile its C++ library, which takes a minute")
    (sources / "answer.cpp").write_text('#include "small.h"\n')
    with pytest.raises(KernelError, match="hw_answer"):
        build("portable", tmp_path / "home", sources=sources)


def test_three_lines_of_a_compiler_that_fails(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = write_script(tmp_path / "bin" / "c++", _FAILS)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(KernelError) as caught:
        build("portable", tmp_path / "home", sources=sources)
    assert str(caught.value) == (
        f"the portable kernels cannot be compiled by {script} (old-c++ 1.0): "
        "name another compiler in $CXX, or unset it. It says:\n"
        "  c++: error: unrecognized command-line option '-std=c++17'\n"
        "  c++: note: line two\n"
        "  c++: note: line three"
    )
    assert entries(tmp_path / "home") == []


def test_the_next_compiler_is_tried(
    tmp_path: Path, sources: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler.is_zig:
        pytest.skip("there is no system compiler")
    program = write_script(tmp_path / "bin" / "c++", _FAILS).with_name("g++")
    write_script(program, f'#!/bin/sh\nexec {compiler.command[0]} "$@"\n')
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    assert [found.command for found in compilers()][:2] == [
        (str(program.with_name("c++")),),
        (str(program),),
    ]
    library = build("portable", tmp_path / "home", sources=sources)
    assert ctypes.CDLL(str(library)).hw_twice() == 84
    assert build("portable", tmp_path / "home", sources=sources) == library


@pytest.mark.parametrize("named", ["no-such-compiler", "'unbalanced", " ", "false"])
def test_cxx_must_name_a_compiler(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(ConfigError) as caught:
        build("portable", tmp_path / "home", sources=sources)
    assert str(caught.value) == (
        f"CXX is {named!r}, must be a C++ compiler that can be run, or not be set"
    )


_BUILD = """\
import ctypes, sys
from pathlib import Path
from headway.core.errors import HeadwayError
from headway.kernels.build import build

home, sources = map(Path, sys.argv[1:3])
try:
    library = build("portable", home, sources=sources, sanitize=len(sys.argv) > 3)
except HeadwayError as error:
    sys.exit(str(error))
print(library)
if len(sys.argv) > 3:
    print(ctypes.CDLL(str(library)).hw_read(int(sys.argv[3])))
"""


def start(
    home: Path,
    sources: Path,
    *arguments: str,
    flags: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """A process that builds a library and prints its path."""
    return subprocess.Popen(
        [sys.executable, *flags, "-c", _BUILD, str(home), str(sources), *arguments],
        env={**os.environ, "PYTHONPATH": str(_SOURCE), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_compiler_it_says_what_to_do(tmp_path: Path, sources: Path) -> None:
    (tmp_path / "empty").mkdir()
    # -S: no package that is installed, so no ziglang.
    process = start(tmp_path / "home", sources, flags=("-S",), PATH=str(tmp_path / "empty"), CXX="")
    _, said = process.communicate()
    assert process.returncode == 1
    assert said == (
        "the kernels must be compiled, and there is no C++ compiler (c++, g++, clang++): install "
        "one, name it in $CXX, or run `pip install 'headway-llm[compiler]'`\n"
    )


@needs_ziglang
def test_without_a_compiler_ziglang_is_used(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX", raising=False)
    assert [found.is_zig for found in compilers()] == [True]
    library = build("portable", tmp_path / "home", sources=sources)
    assert ctypes.CDLL(str(library)).hw_twice() == 84


@needs_ziglang
def test_a_wheel_has_every_path_for_old_systems(tmp_path: Path, sources: Path) -> None:
    libraries = build_for_wheel(tmp_path / "wheel", sources=sources)
    assert [library.name for library in libraries] == [f"{name}.so" for name in PATHS]
    for library in libraries:
        assert is_whole(library)
        versions = re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())
        assert all(int(version) <= 17 for version in versions)
    assert ctypes.CDLL(str(tmp_path / "wheel" / "portable.so")).hw_twice() == 84


def test_a_library_that_came_along_is_not_compiled(
    tmp_path: Path, sources: Path, compiler: Compiler
) -> None:
    compiled = build("portable", tmp_path / "home", sources=sources)
    prebuilt = tmp_path / "prebuilt"
    prebuilt.mkdir()
    compiled.rename(prebuilt / "portable.so")
    compiled.with_name(f"{compiled.name}.sha256").rename(prebuilt / "portable.so.sha256")
    assert load("portable", tmp_path / "none", prebuilt=prebuilt) == prebuilt / "portable.so"
    assert not (tmp_path / "none").exists()


def test_two_processes_compile_once(
    tmp_path: Path, sources: Path, count_compiled: Callable[[], int]
) -> None:
    processes = [start(tmp_path / "home", sources) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs[0] == outputs[1]
    assert is_whole(Path(outputs[0].strip()))
    assert count_compiled() == 2


def test_a_home_that_cannot_be_written_is_done_without(
    tmp_path: Path, sources: Path, count_compiled: Callable[[], int]
) -> None:
    home = tmp_path / "home"
    home.write_text("a file, not a directory")
    library = build("portable", home, sources=sources)
    assert ctypes.CDLL(str(library)).hw_twice() == 84
    assert build("portable", home, sources=sources) == library
    assert count_compiled() == 2
    process = start(home, sources)
    other = Path(process.communicate()[0].strip())
    assert process.returncode == 0
    assert other.is_absolute()
    assert not other.parent.exists()


def test_nothing_is_left_of_a_build_that_was_stopped(
    tmp_path: Path, sources: Path, compiler: Compiler
) -> None:
    def stop(stage: str, fraction: float) -> None:
        if fraction > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("portable", tmp_path / "home", sources=sources, progress=stop)
    assert entries(tmp_path / "home") == []
    assert is_whole(build("portable", tmp_path / "home", sources=sources))


def test_what_is_no_longer_used_is_removed(
    tmp_path: Path, sources: Path, compiler: Compiler
) -> None:
    home = tmp_path / "home"
    old = build("portable", home, sources=sources)
    (home / ".partial-killed").mkdir()
    for file in home.iterdir():
        os.utime(file, (0, 0))
    # Loading it counts as use.
    assert build("portable", home, sources=sources) == old
    (sources / "small.h").write_text(_HEADER.replace("42", "43"))
    new = build("portable", home, sources=sources)
    assert entries(home) == sorted([old.name, f"{old.name}.sha256", new.name, f"{new.name}.sha256"])
    os.utime(old, (0, 0))
    (sources / "small.h").write_text(_HEADER.replace("42", "44"))
    build("portable", home, sources=sources)
    assert old.name not in entries(home)
    assert f"{old.name}.sha256" not in entries(home)
    assert new.name in entries(home)


def test_sanitizers_find_what_is_outside_an_array(
    tmp_path: Path, sources: Path, compiler: Compiler
) -> None:
    question = [*compiler.command, "-print-file-name=libasan.so"]
    runtime = subprocess.run(question, capture_output=True, text=True, check=False).stdout.strip()
    if compiler.is_zig or not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer of its own")
    plain = build("portable", tmp_path / "home", sources=sources)
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    process = start(tmp_path / "home", sources, "3", **options)
    library, value = process.communicate()[0].split()
    assert process.returncode == 0
    assert Path(library) != plain
    assert value == "0"
    process = start(tmp_path / "home", sources, "4", **options)
    assert re.search("heap-buffer-overflow|insufficient space", process.communicate()[1])
    assert process.returncode != 0
