"""The packed model and its cache: right, repeatable, and rebuilt when damaged."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import TinyModel

from headway.core.errors import DamagedModel, ModelError, UnsupportedModel
from headway.models.gguf import GGUFWeights
from headway.models.packed_model import PackedModel, load_packed
from headway.models.packing import INT4, INT8, dequantize, packed_bytes, unpack_int8

KIND = gguf.GGMLQuantizationType
FloatArray = npt.NDArray[np.float32]


def tiny(architecture: str = "llama", **options: object) -> TinyModel:
    """A tiny model whose sizes the kernels can do."""
    return TinyModel(architecture, **({"head_dim": 32} | options))  # type: ignore[arg-type]


def half_split(rows: FloatArray, head_dim: int) -> FloatArray:
    """Row by row: what was interleaved becomes two halves."""
    result = np.empty_like(rows)
    for row in range(len(rows)):
        head, place = divmod(row, head_dim)
        pair, second = divmod(place, 2)
        result[head * head_dim + pair + second * head_dim // 2] = rows[row]
    return result


def expected_matrices(model: TinyModel) -> dict[str, FloatArray]:
    """The matrices as the packed model should have them, from the file's tensors."""
    tensors = model.tensors
    matrices = {"embedding": tensors["token_embd.weight"]}
    if not model.tied:
        matrices["lm_head"] = tensors["output.weight"]
    for layer in range(model.num_layers):
        part = {
            name: tensors[f"blk.{layer}.{name}.weight"]
            for name in (
                *("attn_q", "attn_k", "attn_v", "attn_output"),
                *("ffn_gate", "ffn_up", "ffn_down"),
            )
        }
        query, key = part["attn_q"], part["attn_k"]
        if model.architecture == "llama":
            query, key = half_split(query, model.head_dim), half_split(key, model.head_dim)
        matrices[f"{layer}.qkv"] = np.concatenate([query, key, part["attn_v"]])
        matrices[f"{layer}.attn_output"] = part["attn_output"]
        rows = []
        for first in range(0, model.intermediate_size, 16):
            rows += [part["ffn_gate"][first : first + 16], part["ffn_up"][first : first + 16]]
        matrices[f"{layer}.gate_up"] = np.concatenate(rows)
        matrices[f"{layer}.down"] = part["ffn_down"]
    return matrices


def check_matrices(packed: PackedModel, model: TinyModel, exact: bool) -> None:
    """Equal to the file's values, or within the rounding to 8 bits."""
    expected = expected_matrices(model)
    assert list(packed.matrices) == list(expected)
    for name, values in expected.items():
        matrix = packed.matrices[name]
        rows, columns = values.shape
        assert (matrix.outputs, matrix.inputs) == (-(-rows // 32) * 32, columns)
        assert matrix.data.size == packed_bytes(matrix.outputs, matrix.inputs, matrix.format)
        decoded = dequantize(matrix)
        assert not decoded[rows:].any()
        if exact:
            np.testing.assert_array_equal(decoded[:rows], values, name)
        else:
            # Half a step, and what the largest of a group loses to the rounding of its scale.
            _, d = unpack_int8(matrix.data, matrix.outputs, matrix.inputs)
            limit = np.repeat(d.astype(np.float32), 32, axis=1)[:rows] * 0.57 + 127 * 2.0**-25
            assert (np.abs(decoded[:rows] - values) <= limit).all(), name


MODELS = {
    "llama": lambda: tiny("llama"),
    "llama, untied, odd vocabulary": lambda: tiny("llama", tied=False, vocab_size=258),
    "llama, head size 64": lambda: tiny("llama", head_dim=64, num_heads=6),
    "qwen2": lambda: tiny("qwen2", num_kv_heads=1, vocab_size=37),
    "qwen3": lambda: tiny("qwen3", tied=False),
}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"], ids=str.lower)
@pytest.mark.parametrize("name", MODELS)
def test_a_files_own_groups_are_kept(tmp_path: Path, name: str, kind: str) -> None:
    model = MODELS[name]()
    packed = load_packed(model.write(tmp_path / "m.gguf", KIND[kind]), tmp_path / "home")
    wanted = INT8 if kind == "Q8_0" else INT4
    assert {matrix.format for matrix in packed.matrices.values()} == {wanted}
    check_matrices(packed, model, exact=True)


@pytest.mark.parametrize(
    "kind",
    ["F32", "F16", "BF16", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"],
    ids=str.lower,
)
def test_everything_else_is_rounded_to_8_bits(tmp_path: Path, kind: str) -> None:
    model = tiny("llama", hidden_size=256, num_heads=8, intermediate_size=256, vocab_size=70)
    packed = load_packed(model.write(tmp_path / "m.gguf", KIND[kind]), tmp_path / "home")
    assert {matrix.format for matrix in packed.matrices.values()} == {INT8}
    check_matrices(packed, model, exact=False)


def test_a_matrix_whose_parts_differ_is_8_bits(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=256, num_heads=8, intermediate_size=256)
    kinds = {"attn_v": KIND.Q6_K, "0.ffn_up": KIND.Q8_0, "token_embd": KIND.F16}
    path = model.write(tmp_path / "m.gguf", KIND.Q4_1, kinds | {"1.ffn_up": KIND.Q4_0})
    packed = load_packed(path, tmp_path / "home")
    wide = {name for name, matrix in packed.matrices.items() if matrix.format == INT8}
    assert wide == {"embedding", "0.qkv", "1.qkv", "0.gate_up"}
    for name, values in expected_matrices(model).items():
        error = np.abs(dequantize(packed.matrices[name])[: len(values)] - values).max()
        assert error == 0 if name not in wide else error < 0.02
    # The 8-bit half of a mixed matrix is exact all the same.
    both = dequantize(packed.matrices["0.gate_up"]).reshape(-1, 2, 16, 256)
    up = model.tensors["blk.0.ffn_up.weight"].reshape(-1, 16, 256)
    np.testing.assert_array_equal(both[:, 1], up)


def test_slabs_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama", head_dim=64, vocab_size=258).write(tmp_path / "m.gguf", KIND.Q4_0)
    whole = load_packed(path, tmp_path / "home")
    monkeypatch.setattr("headway.models.conversion._SLAB_WEIGHTS", 64 * 64)
    pieces = load_packed(path, tmp_path / "other")
    assert (whole.directory / "weights.bin").read_bytes() == (
        pieces.directory / "weights.bin"
    ).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_arrays(tmp_path: Path, name: str) -> None:
    model = MODELS[name]()
    path = model.write(tmp_path / "m.gguf")
    packed, weights = load_packed(path, tmp_path / "home"), GGUFWeights(path)
    assert packed.config == weights.config
    wanted = {"output_norm": weights.output_norm(), "rope_frequencies": weights.rope_frequencies()}
    for layer in range(2):
        wanted[f"{layer}.attn_norm"] = weights.norm(layer, "attn_norm")
        wanted[f"{layer}.ffn_norm"] = weights.norm(layer, "ffn_norm")
        if model.architecture == "qwen2":
            wanted[f"{layer}.qkv_bias"] = weights.qkv_bias(layer)
        if model.architecture == "qwen3":
            wanted[f"{layer}.q_norm"] = weights.qk_norm(layer, "attn_q_norm")
            wanted[f"{layer}.k_norm"] = weights.qk_norm(layer, "attn_k_norm")
    assert packed.arrays.keys() == wanted.keys()
    for array, values in wanted.items():
        assert packed.arrays[array].dtype == values.dtype
        np.testing.assert_array_equal(packed.arrays[array], values)
    assert packed.arrays["rope_frequencies"].dtype == np.float64
    assert packed.arrays["0.attn_norm"].dtype == np.float32


def test_what_is_mapped_is_aligned_and_read_only(tmp_path: Path) -> None:
    packed = load_packed(tiny("qwen2", vocab_size=37).write(tmp_path / "m.gguf"), tmp_path / "home")
    for values in packed.arrays.values():
        assert values.ctypes.data % 64 == 0
        assert not values.flags.writeable
    for matrix in packed.matrices.values():
        assert matrix.data.ctypes.data % 4096 == 0
        assert not matrix.data.flags.writeable


def test_second_load_comes_from_the_cache(tmp_path: Path) -> None:
    path = tiny("qwen2", tied=False).write(tmp_path / "m.gguf")
    stages: list[tuple[str, float]] = []

    def progress(stage: str, fraction: float) -> None:
        stages.append((stage, fraction))

    first = load_packed(path, tmp_path / "home", progress)
    assert {stage for stage, _ in stages} == {"checksum", "convert"}
    assert stages[-1] == ("convert", 1.0)
    fractions = [fraction for stage, fraction in stages if stage == "convert"]
    assert fractions == sorted(fractions)
    stages.clear()
    second = load_packed(path, tmp_path / "home", progress)
    assert not stages
    assert second.directory == first.directory
    assert list(second.arrays) == list(first.arrays)
    assert list(second.matrices) == list(first.matrices)
    for name, matrix in first.matrices.items():
        np.testing.assert_array_equal(second.matrices[name].data, matrix.data)


def test_a_start_from_the_cache_does_not_import_gguf(tmp_path: Path) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    load_packed(path, tmp_path / "home")
    program = (
        "import sys; from pathlib import Path\n"
        "from headway.models.packed_model import load_packed\n"
        "load_packed(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert 'gguf' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / "home")], check=True, timeout=60
    )


@pytest.mark.parametrize("damage", ["truncate", "flip", "index", "no index", "empty", "offset"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    entry = load_packed(path, tmp_path / "home").directory
    good = (entry / "weights.bin").read_bytes()
    index = (entry / "index.json").read_text()
    match damage:
        case "truncate":
            (entry / "weights.bin").write_bytes(good[:-64])
        case "flip":
            (entry / "weights.bin").write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        case "index":
            (entry / "index.json").write_text(index[:-10])
        case "no index":
            (entry / "index.json").unlink()
        case "empty":
            (entry / "index.json").write_text("{}")
        case "offset":
            (entry / "index.json").write_text(
                index.replace('"offset": 4096,', '"offset": 9999999,')
            )
    again = load_packed(path, tmp_path / "home")
    assert again.directory == entry
    assert (entry / "weights.bin").read_bytes() == good
    assert (entry / "index.json").read_text() == index
    assert [other.name for other in entry.parent.iterdir() if other.name.startswith(".")] == []


def test_the_key_follows_the_contents(tmp_path: Path) -> None:
    path = tiny(seed=1).write(tmp_path / "m.gguf")
    first = load_packed(path, tmp_path / "home")
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert load_packed(copy, tmp_path / "home").directory == first.directory
    tiny(seed=2).write(path)
    assert load_packed(path, tmp_path / "home").directory != first.directory
    assert first.directory.is_dir()


def test_a_home_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    model = tiny()
    path = model.write(tmp_path / "m.gguf")
    (tmp_path / "home").write_text("a file, not a directory")
    packed = load_packed(path, tmp_path / "home")
    assert not packed.directory.exists()
    check_matrices(packed, model, exact=False)


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path: Path) -> None:
    model = tiny()
    del model.tensors["blk.1.ffn_down.weight"]
    path = model.write(tmp_path / "m.gguf")
    with pytest.raises(DamagedModel, match="missing"):
        load_packed(path, tmp_path / "home")
    assert [entry.name for entry in (tmp_path / "home").iterdir()] == ["checksums"]


def test_an_entry_of_another_version_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    path = tiny().write(tmp_path / "m.gguf")
    other = load_packed(tiny(seed=5).write(tmp_path / "other.gguf"), home)
    old = load_packed(path, home)
    monkeypatch.setattr("headway.models.packed_model._LAYOUT_VERSION", 0)
    new = load_packed(path, home)
    assert not old.directory.exists()
    assert new.directory.is_dir()
    assert other.directory.is_dir()
    # What a running process has mapped does not go away under it.
    np.testing.assert_array_equal(old.matrices["0.qkv"].data, new.matrices["0.qkv"].data)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("headway.models.packed_model._write", full)
    path = tiny().write(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"m\.gguf: .*home: No space left"):
        load_packed(path, tmp_path / "home")
    assert [entry.name for entry in (tmp_path / "home").iterdir()] == ["checksums"]


def test_no_place_to_write_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    (tmp_path / "home").write_text("a file, not a directory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"m\.gguf: .*nowhere: No such file"):
        load_packed(path, tmp_path / "home")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 48}, "head size is 48"),
        ({"hidden_size": 80}, "hidden size is 80"),
        ({"intermediate_size": 120}, "intermediate size is 120"),
    ],
    ids=["head", "hidden", "intermediate"],
)
def test_refuses_sizes_that_groups_do_not_divide(
    tmp_path: Path, options: dict[str, int], words: str
) -> None:
    path = tiny(**options).write(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModel, match=f"{words}, must be a multiple of 32") as raised:
        load_packed(path, tmp_path / "home")
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q4_1", "Q8_0", "F16", "Q6_K"], ids=str.lower)
def test_refuses_values_that_are_not_finite(tmp_path: Path, kind: str) -> None:
    model = tiny("qwen2", hidden_size=256, num_heads=8, intermediate_size=256)
    path = model.write(tmp_path / "m.gguf", KIND[kind])
    # The scale of the matrix's first block, or its first value.
    info = next(
        tensor
        for tensor in GGUFWeights(path).metadata.tensors
        if tensor.name == "blk.1.ffn_down.weight"
    )
    place = GGUFWeights(path).metadata.data_offset + info.offset
    place += {"F32": 2, "Q6_K": 208}.get(kind, 0)
    data = bytearray(path.read_bytes())
    data[place : place + 2] = b"\xff\xff"  # a NaN, as float16 and as the upper half of float32
    path.write_bytes(data)
    with pytest.raises(DamagedModel, match=r"'blk\.1\.ffn_down\.weight' holds .* not finite"):
        load_packed(path, tmp_path / "home")


@pytest.mark.parametrize(("kind", "value"), [("Q4_0", 9000.0), ("F32", 1e7)], ids=["q4_0", "f32"])
def test_refuses_values_beyond_a_float16_scale(tmp_path: Path, kind: str, value: float) -> None:
    model = tiny()
    model.tensors["blk.0.ffn_down.weight"][3, 5] = value * (8 if kind == "Q4_0" else 1)
    path = model.write(tmp_path / "m.gguf", KIND[kind])
    with pytest.raises(DamagedModel, match="too large"):
        load_packed(path, tmp_path / "home")
