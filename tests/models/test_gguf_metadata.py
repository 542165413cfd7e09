"""The header parser against files written by the ``gguf`` package, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.core.errors import DamagedModel
from headway.models.gguf_metadata import MetadataValue, read_metadata

FUZZING = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

#: One value of every type of the format: what the writer is told, and what must come back.
VALUES: dict[str, tuple[gguf.GGUFValueType, MetadataValue]] = {
    "a.u8": (gguf.GGUFValueType.UINT8, 255),
    "a.i8": (gguf.GGUFValueType.INT8, -128),
    "a.u16": (gguf.GGUFValueType.UINT16, 65535),
    "a.i16": (gguf.GGUFValueType.INT16, -32768),
    "a.u32": (gguf.GGUFValueType.UINT32, 2**32 - 1),
    "a.i32": (gguf.GGUFValueType.INT32, -(2**31)),
    "a.u64": (gguf.GGUFValueType.UINT64, 2**64 - 1),
    "a.i64": (gguf.GGUFValueType.INT64, -(2**63)),
    "a.f32": (gguf.GGUFValueType.FLOAT32, 0.5),
    "a.f64": (gguf.GGUFValueType.FLOAT64, 1e300),
    "a.bool": (gguf.GGUFValueType.BOOL, True),
    "a.string": (gguf.GGUFValueType.STRING, "Grüße 🎉"),
    "a.strings": (gguf.GGUFValueType.ARRAY, ["", "x", "日本"]),
    "a.numbers": (gguf.GGUFValueType.ARRAY, [1, 2, 3]),
    "a.floats": (gguf.GGUFValueType.ARRAY, [0.5, -2.0]),
}


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        writer.add_key_value(key, value, kind)
    writer.add_tensor("w", np.arange(96, dtype=np.float32).reshape(2, 48))
    writer.add_tensor("v", np.arange(7, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole.gguf")


def header(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def test_reads_every_type_as_it_was_written(whole: Path) -> None:
    metadata = read_metadata(whole)
    assert metadata.version == 3
    assert metadata.file_size == whole.stat().st_size
    assert metadata.values == {"general.architecture": "llama"} | {
        key: value for key, (_, value) in VALUES.items()
    }
    assert type(metadata.values["a.bool"]) is bool
    assert type(metadata.values["a.u8"]) is int


def test_the_tensor_table_agrees_with_the_gguf_package(whole: Path) -> None:
    metadata = read_metadata(whole)
    reader = gguf.GGUFReader(whole)
    assert [(t.name, t.shape, t.ggml_type) for t in metadata.tensors] == [
        (t.name, tuple(int(n) for n in t.shape), int(t.tensor_type)) for t in reader.tensors
    ]
    assert [metadata.data_offset + t.offset for t in metadata.tensors] == [
        int(t.data_offset) for t in reader.tensors
    ]


def test_typed_getters_refuse_what_is_missing_or_of_another_type(whole: Path) -> None:
    metadata = read_metadata(whole)
    assert metadata.string("a.string") == "Grüße 🎉"
    assert metadata.integer("none", 7) == 7
    assert metadata.boolean("a.bool") is True
    assert metadata.strings("a.strings") == ["", "x", "日本"]
    assert metadata.integers("a.numbers") == [1, 2, 3]
    assert metadata.floats("a.floats") == [0.5, -2.0]
    with pytest.raises(DamagedModel, match="has no 'none'"):
        metadata.string("none")
    for getter, key in (
        (metadata.string, "a.u8"),
        (metadata.integer, "a.bool"),
        (metadata.boolean, "a.u8"),
        (metadata.strings, "a.numbers"),
        (metadata.integers, "a.floats"),
        (metadata.floats, "a.string"),
    ):
        with pytest.raises(DamagedModel, match=f"metadata '{key}' is not"):
            getter(key)


def test_a_file_cut_off_anywhere_is_damaged(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    metadata = read_metadata(whole)
    # The last tensor's 14 bytes end the file but for the padding after them.
    end = metadata.data_offset + metadata.tensors[-1].offset + 14
    cut = tmp_path / "cut.gguf"
    for length in range(end):
        cut.write_bytes(data[:length])
        with pytest.raises(DamagedModel):
            read_metadata(cut)
    cut.write_bytes(data[:end])
    assert read_metadata(cut).values == metadata.values


@FUZZING
@given(data=st.data())
def test_flipped_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "flipped.gguf"
    content = bytearray(write(path).read_bytes())
    places = st.integers(0, len(content) - 1)
    for place, value in data.draw(st.dictionaries(places, st.integers(0, 255), max_size=6)).items():
        content[place] = value
    path.write_bytes(content)
    try:
        read_metadata(path)
    except DamagedModel as error:
        assert "\n" not in str(error)


@FUZZING
@given(tail=st.binary(max_size=400), entries=st.integers(0, 9), tensors=st.integers(0, 9))
def test_noise_behind_a_sound_start_is_read_or_refused(
    tmp_path: Path, tail: bytes, entries: int, tensors: int
) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(header(tensors=tensors, entries=entries) + tail)
    try:
        read_metadata(path)
    except DamagedModel as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (header(version=1), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648"),
        (header(tensors=2**63), "tensors are announced"),
        (header(entries=2**63), "metadata entries are announced"),
        (header(entries=1) + struct.pack("<Q", 2**62), "the file ends"),
        (header(entries=1) + text("k") + struct.pack("<I", 99), "unknown metadata type 99"),
        (
            header(entries=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**60),
            "array elements are announced",
        ),
        (header(entries=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**22), "the file ends"),
        (header(entries=1) + text("k") + struct.pack("<IIQ", 9, 10, 2**22), "the file ends"),
        (header(entries=1) + text("k") + struct.pack("<IIQ", 9, 77, 1), "unknown metadata type 77"),
        (
            header(entries=1) + text("k") + struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 9, 0),
            "nested too deeply",
        ),
        (header(entries=1) + struct.pack("<Q", 1) + b"\xff", "not UTF-8"),
        (header(entries=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2, "'k' occurs twice"),
        (
            header(entries=1) + text("general.alignment") + struct.pack("<II", 4, 0),
            "the alignment is 0",
        ),
        (header(tensors=1) + text("t") + struct.pack("<I", 2**31), "2147483648 dimensions"),
        (
            header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 2**62, 0, 0),
            "tensor 't' ends at byte",
        ),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 0, 0, 0), "has the shape"),
        (
            header(tensors=2) + (text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2 + bytes(64),
            "tensor name occurs twice",
        ),
    ],
)
def test_damage_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(DamagedModel, match=message) as caught:
        read_metadata(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_opened_is_damaged(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(DamagedModel, match="cannot be read"):
            read_metadata(path)
