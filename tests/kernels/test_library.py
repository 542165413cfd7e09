"""The bindings against the header: sizes, places, numbers; and libraries that are none of ours."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
from tiny_runs import PATHS, library

import headway.kernels
from headway.core.errors import KernelError
from headway.executor.precision import PRECISIONS
from headway.kernels.compilers import Compiler, compilers
from headway.kernels.library import (
    VERSION,
    Cache,
    Layer,
    Matrix,
    Shape,
    Step,
    Weights,
    open_library,
)
from headway.models.packing import INT4, INT8

_SOURCES = Path(headway.kernels.__file__).parent

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "hw_matrix": Matrix,
    "hw_shape": Shape,
    "hw_layer": Layer,
    "hw_weights": Weights,
    "hw_cache": Cache,
    "hw_step": Step,
}


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    found = next(compilers(), None)
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def run_program(compiler: Compiler, directory: Path, body: str) -> list[str]:
    """The lines that a program prints which knows the header."""
    source = directory / "print.cpp"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "headway.h"\nint main() {{\n{body}}}\n'
    )
    program = directory / "print"
    flags = ["-nostdlib++"] if compiler.is_zig else []
    subprocess.run(
        [*compiler.command, f"-I{_SOURCES}", *flags, str(source), "-o", str(program)], check=True
    )
    return subprocess.run(
        [str(program)], check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_structures_are_the_header_s(compiler: Compiler, tmp_path: Path) -> None:
    body, want = "", []
    for name, structure in STRUCTURES.items():
        body += f'  printf("{name} %zu\\n", sizeof({name}));\n'
        want.append(f"{name} {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            body += (
                f'  printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), '
                f"sizeof((({name}*)0)->{field}));\n"
            )
            want.append(f"{name}.{field} {place.offset} {place.size}")
    assert run_program(compiler, tmp_path, body) == want


def test_no_structure_is_left_out() -> None:
    header = (_SOURCES / "headway.h").read_text()
    assert set(re.findall(r"^\} (hw_\w+);", header, re.MULTILINE)) == set(STRUCTURES)


def test_numbers_are_the_header_s(compiler: Compiler, tmp_path: Path) -> None:
    names = ("HW_VERSION", "HW_INT4", "HW_INT8", "HW_PRECISION_INT8", "HW_PRECISION_BF16")
    body = "".join(f'  printf("%d\\n", {name});\n' for name in names)
    numbers = [VERSION, INT4, INT8, PRECISIONS.index("int8"), PRECISIONS.index("bf16")]
    assert [int(line) for line in run_program(compiler, tmp_path, body)] == numbers


@pytest.mark.parametrize("path", PATHS)
def test_a_library_says_what_it_is(path: str) -> None:
    assert library(path).hw_version() == VERSION
    assert library(path).hw_path().decode() == path


@pytest.mark.parametrize("path", PATHS)
def test_every_function_of_the_header_has_its_types(path: str) -> None:
    header = (_SOURCES / "headway.h").read_text()
    declared = re.findall(r"^[\w ]+[\w*] \*?(hw_\w+)\(([^)]*)\);", header, re.MULTILINE)
    assert len(declared) == header.count(");\n")
    for name, arguments in declared:
        number = 0 if arguments == "void" else arguments.count(",") + 1
        assert len(getattr(library(path), name).argtypes) == number


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_error_is_called_so(path: str) -> None:
    words = {library(path).hw_error(code).decode() for code in (0, 1, -1000)}
    assert words == {"unknown"}


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    file = tmp_path / "kernels.so"
    for contents in (None, b"", b"\x7fELF and nothing else"):
        if contents is not None:
            file.write_bytes(contents)
        with pytest.raises(KernelError, match=r"kernels\.so cannot be loaded"):
            open_library(file)


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "cannot be loaded"), (VERSION + 1, f"have version {VERSION + 1}, must be {VERSION}")],
)
def test_a_library_that_is_none_of_ours(
    compiler: Compiler, tmp_path: Path, version: int | None, words: str
) -> None:
    header = (_SOURCES / "headway.h").read_text()
    names = re.findall(r"\*?(hw_\w+)\([^)]*\);", header)
    if version is None:
        names.remove("hw_run")
    source = tmp_path / "other.c"
    source.write_text("".join(f"int {name}(void) {{ return {version or 0}; }}\n" for name in names))
    file = tmp_path / "other.so"
    command = [*compiler.command, "-x", "c", "-shared", "-fPIC", str(source), "-o", str(file)]
    subprocess.run([*command, *(["-nostdlib++"] if compiler.is_zig else [])], check=True)
    with pytest.raises(KernelError, match=words):
        open_library(file)
