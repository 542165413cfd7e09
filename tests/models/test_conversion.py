"""The conversion and its cache: right, repeatable, and rebuilt when damaged."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyModel

from headway.core.errors import DamagedModel, ModelError
from headway.models.conversion import ConvertedWeights, WeightFormat, load_converted, quantize_u8


def load(path: Path, home: Path, weight_format: WeightFormat = "f32") -> ConvertedWeights:
    return load_converted(path, weight_format, home)[1]


def test_quantize_u8_rounds_to_half_a_step() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((7, 96)).astype(np.float32)
    values[2] = 0.0
    quantized, scales = quantize_u8(values)
    assert quantized.shape == (7, 3, 32)
    assert scales.shape == (7, 3, 1)
    back = (quantized.astype(np.float32) - 128) * scales.astype(np.float32)
    error = np.abs(back.reshape(values.shape) - values)
    # The scale is rounded to float16, which can cost the largest of a group a little more.
    limit = np.repeat(scales.astype(np.float32), 32, axis=1).reshape(values.shape) * 0.57
    assert (error <= limit).all()
    assert (back[2] == 0).all()


def test_quantize_u8_takes_smaller_groups_for_odd_widths() -> None:
    quantized, scales = quantize_u8(np.ones((2, 40), np.float32))
    assert quantized.shape == (2, 5, 8)
    assert scales.shape == (2, 5, 1)


@pytest.mark.parametrize("weight_format", ["f32", "u8"])
def test_second_load_comes_from_the_cache(tmp_path: Path, weight_format: WeightFormat) -> None:
    path = TinyModel("qwen2", tied=False).write(tmp_path / "m.gguf")
    stages: list[tuple[str, float]] = []
    _, first = load_converted(
        path, weight_format, tmp_path / "home", progress=lambda *one: stages.append(one)
    )
    assert {stage for stage, _ in stages} == {"checksum", "convert"}
    assert stages[-1] == ("convert", 1.0)
    fractions = [fraction for stage, fraction in stages if stage == "convert"]
    assert fractions == sorted(fractions)
    stages.clear()
    _, second = load_converted(
        path, weight_format, tmp_path / "home", progress=lambda *one: stages.append(one)
    )
    assert not stages
    assert second.directory == first.directory
    assert list(second) == list(first)
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)
        assert second[name].dtype == values.dtype
        assert second[name].flags.aligned


@pytest.mark.parametrize("damage", ["truncate", "flip", "index", "no index", "empty"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    path = TinyModel("llama").write(tmp_path / "m.gguf")
    entry = load(path, tmp_path / "home").directory
    good = (entry / "weights.bin").read_bytes()
    match damage:
        case "truncate":
            (entry / "weights.bin").write_bytes(good[:-64])
        case "flip":
            (entry / "weights.bin").write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        case "index":
            (entry / "index.json").write_text('{"size": 1')
        case "no index":
            (entry / "index.json").unlink()
        case "empty":
            (entry / "index.json").write_text("{}")
    again = load(path, tmp_path / "home")
    assert again.directory == entry
    assert (entry / "weights.bin").read_bytes() == good
    assert [one.name for one in entry.parent.iterdir() if one.name.startswith(".")] == []


def test_the_key_follows_the_contents(tmp_path: Path) -> None:
    path = TinyModel("llama", seed=1).write(tmp_path / "m.gguf")
    first = load(path, tmp_path / "home")
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert load(copy, tmp_path / "home").directory == first.directory
    assert load(path, tmp_path / "home", "u8").directory != first.directory
    TinyModel("llama", seed=2).write(path)
    assert load(path, tmp_path / "home").directory != first.directory


def test_a_home_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    path = TinyModel("llama").write(tmp_path / "m.gguf")
    (tmp_path / "home").write_text("a file, not a directory")
    converted = load(path, tmp_path / "home")
    assert converted["output_norm"].shape == (64,)


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path: Path) -> None:
    model = TinyModel("llama")
    del model.tensors["blk.1.ffn_down.weight"]
    path = model.write(tmp_path / "m.gguf")
    with pytest.raises(DamagedModel, match="missing"):
        load(path, tmp_path / "home")
    assert [one.name for one in (tmp_path / "home").iterdir()] == ["checksums"]


def test_an_entry_of_another_version_is_replaced(tmp_path: Path) -> None:
    path = TinyModel("llama").write(tmp_path / "m.gguf")
    home = tmp_path / "home"
    _, old = load_converted(path, "f32", home, "1")
    other_format = load(path, home, "u8").directory
    _, new = load_converted(path, "f32", home, "2")
    assert not old.directory.exists()
    assert new.directory.is_dir()
    assert other_format.is_dir()
    # What a running process has mapped does not go away under it.
    np.testing.assert_array_equal(old["0.qkv"], new["0.qkv"])


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("headway.models.conversion._write", full)
    path = TinyModel("llama").write(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"m\.gguf: .*No space left"):
        load(path, tmp_path / "home")
