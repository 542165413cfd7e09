"""Which kernels run: found by trying, remembered, and tried again if the memory is no good."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_runs import PATHS, assert_same_bits, native_model, packed_model, whole_logits

from headway.core.errors import KernelError
from headway.executor.kernel_choice import KernelChoice, choose_kernels
from headway.executor.native_model import NativeModel


class Maker:
    """Makes a tiny model with the kernels of a path, on two threads; keeps who was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.made: list[NativeModel] = []
        self.refused: tuple[str, ...] = ()
        self.limits: dict[str, int] = {}

    def __call__(self, path: str) -> NativeModel:
        self.asked.append(path)
        if path in self.refused:
            raise KernelError(f"the {path} kernels cannot be compiled")
        self.made.append(native_model(path, packed_model("llama").packed, **self.limits))
        return self.made[-1]


@pytest.fixture
def make() -> Iterator[Maker]:
    make = Maker()
    yield make
    for model in make.made:
        model.close()


def remembered(directory: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(directory.glob("choice-*.json"))]


def task_ids() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="threads are looked at as Linux shows them"
)


def test_each_is_tried_and_one_is_made(make: Maker, tmp_path: Path) -> None:
    choice, model = choose_kernels(PATHS, make, "facts", tmp_path / "new")
    assert make.asked == [*PATHS, choice.path]
    assert choice.path in PATHS
    assert model is make.made[-1]
    assert remembered(tmp_path / "new") == [choice._asdict()]
    # The model that is chosen is as good as new.
    other = native_model(choice.path, packed_model("llama").packed)
    assert_same_bits(whole_logits(model, range(40)), whole_logits(other, range(40)))
    other.close()


@needs_proc
def test_those_that_were_tried_are_closed(make: Maker, tmp_path: Path) -> None:
    before = task_ids()
    choose_kernels(PATHS, make, "facts", tmp_path)
    assert len(make.made) == len(PATHS) + 1
    assert len(task_ids() - before) == 1


def test_a_choice_is_remembered_for_its_facts_and_paths(make: Maker, tmp_path: Path) -> None:
    choice, _ = choose_kernels(PATHS, make, "facts", tmp_path)
    make.asked.clear()
    assert choose_kernels(PATHS, make, "facts", tmp_path)[0] == choice
    assert make.asked == [choice.path]
    choose_kernels(PATHS, make, "other facts", tmp_path)
    choose_kernels(PATHS[-1:], make, "facts", tmp_path)
    assert len(remembered(tmp_path)) == 3


@needs_proc
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_remembered_is_done(make: Maker, tmp_path: Path, path: str, pinned: bool) -> None:
    choose_kernels(PATHS, make, "facts", tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({"path": path, "pinned": pinned}))
    make.asked.clear()
    before = task_ids()
    choice, _ = choose_kernels(PATHS, make, "facts", tmp_path)
    assert choice == KernelChoice(path, pinned)
    assert make.asked == [path]
    (thread,) = task_ids() - before
    allowed = os.sched_getaffinity(0)
    assert len(os.sched_getaffinity(thread)) == (1 if pinned else len(allowed))


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b'{"path": "avx2"}',
        b'{"path": "unheard-of", "pinned": true}',
        b'{"path": ["portable"], "pinned": true}',
        b'{"path": "portable", "pinned": 1}',
        b'{"path": "portable", "pinned": true, "more": 1}',
    ],
    ids=repr,
)
def test_a_memory_that_is_no_good_is_replaced(make: Maker, tmp_path: Path, contents: bytes) -> None:
    choose_kernels(PATHS, make, "facts", tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(contents)
    make.asked.clear()
    choice, _ = choose_kernels(PATHS, make, "facts", tmp_path)
    assert make.asked == [*PATHS, choice.path]
    assert remembered(tmp_path) == [choice._asdict()]


def test_a_directory_that_cannot_be_written_is_done_without(make: Maker, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no directory")
    choice, _ = choose_kernels(PATHS, make, "facts", file)
    assert make.asked == [*PATHS, choice.path]
    assert file.read_text() == "no directory"


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(1, 1), (3, 2), (17, 512), (256, 33)])
def test_models_for_the_smallest_of_steps(
    make: Maker, tmp_path: Path, max_tokens: int, max_model_len: int
) -> None:
    make.limits = {"max_tokens": max_tokens, "max_model_len": max_model_len}
    choice, _ = choose_kernels(PATHS, make, "facts", tmp_path)
    assert choice.path in PATHS


def test_a_path_that_cannot_be_compiled_is_passed_over(make: Maker, tmp_path: Path) -> None:
    make.refused = ("too new",)
    paths = ["too new", *PATHS[-1:]]
    choice, _ = choose_kernels(paths, make, "facts", tmp_path)
    assert choice.path == PATHS[-1]
    assert make.asked == [*paths, choice.path]


def test_none_that_can_be_compiled(make: Maker, tmp_path: Path) -> None:
    make.refused = ("first", "second")
    with pytest.raises(KernelError, match="the first kernels cannot be compiled"):
        choose_kernels(make.refused, make, "facts", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_passed_over(tmp_path: Path) -> None:
    def fail(path: str) -> NativeModel:
        raise MemoryError

    make: Callable[[str], NativeModel] = fail
    with pytest.raises(MemoryError):
        choose_kernels(PATHS, make, "facts", tmp_path)
