"""Quantisation, and the panels: every weight where the layout says it is."""

from __future__ import annotations

import gguf
import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.models.packing import (
    INT4,
    INT8,
    PackedMatrix,
    dequantize,
    pack_int4,
    pack_int8,
    packed_bytes,
    quantize_int8,
    read_q4_0,
    read_q4_1,
    read_q8_0,
    unpack_int4,
    unpack_int8,
)

KIND = gguf.GGMLQuantizationType


def random_scales(random: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.float16]:
    return random.standard_normal(shape).astype(np.float16)


def half_at(data: npt.NDArray[np.uint8], place: int) -> np.float16:
    return np.frombuffer(data[place : place + 2].tobytes(), "<f2")[0]


def test_int4_layout() -> None:
    random = np.random.default_rng(0)
    outputs, inputs = 64, 96
    q = random.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    d, m = (random_scales(random, (outputs, 3)) for _ in range(2))
    data = pack_int4(q, d, m)
    assert data.dtype == np.uint8
    assert data.shape == (2 * 3 * 640,)
    for output in range(outputs):
        panel, c = divmod(output, 32)
        for k in range(inputs):
            group, within = divmod(k, 32)
            begin = (panel * 3 + group) * 640
            step, rest = divmod(within, 8)
            j, h = divmod(rest, 2)
            half, row = divmod(c, 16)
            chunk = begin + (2 * step + half) * 64
            element = chunk + (row * 2 + h) * 2
            number = int(data[element]) | int(data[element + 1]) << 8
            assert number >> 4 * j & 15 == q[output, k], (output, k)
            if within == 0:
                assert half_at(data, begin + 512 + 2 * c) == d[output, group]
                assert half_at(data, begin + 576 + 2 * c) == m[output, group]


def test_int8_layout() -> None:
    random = np.random.default_rng(1)
    outputs, inputs = 64, 96
    q = random.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    d = random_scales(random, (outputs, 3))
    data = pack_int8(q, d)
    assert data.shape == (2 * 3 * 1088,)
    for output in range(outputs):
        panel, c = divmod(output, 32)
        half, row = divmod(c, 16)
        for group in range(3):
            begin = (panel * 3 + group) * 1088
            assert half_at(data, begin + 1024 + 2 * c) == d[output, group]
            for t in range(8):
                four = (2, 6, 3, 7) if t % 2 else (0, 4, 1, 5)
                for place, k in enumerate(four):
                    stored = data[begin + (2 * t + half) * 64 + row * 4 + place]
                    assert int(stored) - 128 == q[output, 32 * group + 8 * (t // 2) + k]


def test_the_words_of_both_formats_have_the_same_inputs() -> None:
    """Low nibbles are the even words of INT8, high ones the odd."""
    random = np.random.default_rng(2)
    q = random.integers(0, 16, (32, 32)).astype(np.uint8)
    d = random_scales(random, (32, 1))
    nibbles = pack_int4(q, d, d)[:512].reshape(4, 2, 64)
    stored = (pack_int8(q.view(np.int8), d)[:1024] - 128).reshape(4, 2, 2, 64)
    np.testing.assert_array_equal(nibbles & 15, stored[:, 0])
    np.testing.assert_array_equal(nibbles >> 4, stored[:, 1])


@settings(deadline=None, max_examples=40)
@given(
    outputs=st.integers(1, 100),
    groups=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(outputs: int, groups: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs, padded = 32 * groups, -(-outputs // 32) * 32
    q = random.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    d, m = (random_scales(random, (outputs, groups)) for _ in range(2))
    data = pack_int4(q, d, m)
    assert data.size == packed_bytes(padded, inputs, INT4)
    for back, given_ in zip(unpack_int4(data, padded, inputs), (q, d, m), strict=True):
        assert back.dtype == given_.dtype
        np.testing.assert_array_equal(back[:outputs], given_)
        assert not back[outputs:].any()
    q8 = random.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    data = pack_int8(q8, d)
    assert data.size == packed_bytes(padded, inputs, INT8)
    for back, given_ in zip(unpack_int8(data, padded, inputs), (q8, d), strict=True):
        assert back.dtype == given_.dtype
        np.testing.assert_array_equal(back[:outputs], given_)
        assert not back[outputs:].any()


def test_rows_that_are_added_are_zero() -> None:
    data = pack_int8(np.ones((3, 32), np.int8), np.ones((3, 1), np.float16))
    values = dequantize(PackedMatrix(data, 32, 32, INT8))
    assert (values[:3] == 1).all()
    assert (values[3:] == 0).all()
    assert (data[:1024].reshape(16, 16, 4)[0::2, 3:] == 128).all()
    data = pack_int4(np.ones((3, 32), np.uint8), *2 * [np.ones((3, 1), np.float16)])
    values = dequantize(PackedMatrix(data, 32, 32, INT4))
    assert (values[:3] == 2).all()
    assert (values[3:] == 0).all()


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(
        np.float32,
        (3, 64),
        elements=st.floats(-1e6, 1e6, width=32) | st.floats(-(2.0**-17), 2.0**-17, width=32),
    )
)
def test_quantize_int8_rounds_to_half_a_step(values: npt.NDArray[np.float32]) -> None:
    q, d = quantize_int8(values)
    assert q.min() >= -127
    assert (d > 0).all()
    scale = d.astype(np.float64)[..., None]
    groups = values.reshape(3, 2, 32).astype(np.float64)
    error = np.abs(q.reshape(3, 2, 32) * scale - groups)
    # A scale that was rounded down to float16 does not reach the largest of its group by as much.
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    short = np.maximum(largest - 127 * scale, 0)
    assert (short <= np.maximum(largest * 2.0**-11, 127 * 2.0**-25)).all()
    assert (error <= np.maximum(scale * 0.5, short) * (1 + 1e-4)).all()
    assert (q.reshape(3, 2, 32)[groups == 0] == 0).all()


def test_a_scale_beyond_float16_is_infinite() -> None:
    values = np.zeros((1, 64), np.float32)
    values[0, 40] = 1e7
    _, d = quantize_int8(values)
    assert d.tolist() == [[2.0**-24, np.inf]]


def test_quantize_int8_leaves_its_argument() -> None:
    values = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    before = values.copy()
    quantize_int8(values)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(
    ("kind", "read"),
    [(KIND.Q4_0, read_q4_0), (KIND.Q4_1, read_q4_1)],
    ids=["q4_0", "q4_1"],
)
def test_a_files_4_bit_groups_keep_their_values(kind: gguf.GGMLQuantizationType, read) -> None:  # type: ignore[no-untyped-def]
    values = np.random.default_rng(0).standard_normal((32, 96)).astype(np.float32)
    packed = gguf.quantize(values, kind)
    matrix = PackedMatrix(pack_int4(*read(packed)), 32, 96, INT4)
    np.testing.assert_array_equal(dequantize(matrix), gguf.dequantize(packed, kind))


def test_a_files_8_bit_groups_keep_their_values() -> None:
    values = np.random.default_rng(0).standard_normal((32, 96)).astype(np.float32)
    packed = gguf.quantize(values, KIND.Q8_0)
    packed[3, 2:5] = 128  # −128, which no quantiser writes, and which a file may have
    q, d = read_q8_0(packed)
    assert q[3, :3].tolist() == [-128] * 3
    matrix = PackedMatrix(pack_int8(q, d), 32, 96, INT8)
    np.testing.assert_array_equal(dequantize(matrix), gguf.dequantize(packed, KIND.Q8_0))
