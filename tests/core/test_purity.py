"""The core imports the standard library only, and reads no clock, environment or chance."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import headway.core

ALLOWED = {
    "__future__",
    "array",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "typing",
}
MODULES = sorted(Path(headway.core.__path__[0]).glob("*.py"))


def imported_names(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_nothing_but_the_core_and_pure_modules(path: Path) -> None:
    for name in imported_names(path.read_text(encoding="utf-8")):
        is_core = name.startswith("headway.core.")
        assert is_core or name.split(".")[0] in ALLOWED, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_keeps_no_global_state_and_does_no_io(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Global), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Name):
            assert node.id not in {"open", "print", "input", "exec", "eval", "__import__"}


def test_only_one_place_assigns_the_status() -> None:
    places = [
        (path.stem, node.lineno)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr == "status"
        and isinstance(node.ctx, ast.Store)
    ]
    # The constructor's WAITING, and Life.enter.
    assert [module for module, _ in places] == ["life", "life"]


def test_the_check_itself_sees_a_clock() -> None:
    source = "def f():\n    from time import time\n    import os.path\n"
    assert imported_names(source) == {"time", "os.path"}


def test_the_modules_are_found() -> None:
    assert {"scheduler", "request", "block_manager", "policy"} <= {path.stem for path in MODULES}
