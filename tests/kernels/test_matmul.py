"""Products of packed matrices against numpy, and each row's against its own when it is alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import PATHS, assert_same_bits, native_model, packed_model

from headway.executor.native_model import NativeModel
from headway.executor.precision import Precision
from headway.models.packing import INT4, INT8, PackedMatrix, pack_int4, pack_int8

FORMATS = (INT4, INT8)
#: (outputs, inputs): a panel and a group alone; odd numbers of both; many groups.
SHAPES = ((32, 32), (96, 64), (160, 352), (32, 1536))
NUM_THREADS = (1, 2, 3)

FloatArray = reference.FloatArray


def random_matrix(outputs: int, inputs: int, weight_format: int, seed: int = 0) -> PackedMatrix:
    """All numbers that the format has, and scales of either sign, some of them denormal."""
    random = np.random.default_rng((seed, outputs, inputs))
    groups = (outputs, inputs // 32)
    d = (random.standard_normal(groups) * 0.01).astype(np.float16)
    d[random.random(groups) < 0.05] = 2.0**-24
    if weight_format == INT4:
        q = random.integers(0, 16, (outputs, inputs)).astype(np.uint8)
        m = (random.standard_normal(groups) * 0.05).astype(np.float16)
        return PackedMatrix(pack_int4(q, d, m), outputs, inputs, INT4)
    q8 = random.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    return PackedMatrix(pack_int8(q8, d), outputs, inputs, INT8)


def random_rows(rows: int, inputs: int, seed: int = 0) -> FloatArray:
    """Groups of very different sizes, some of them zero."""
    random = np.random.default_rng((seed, rows, inputs))
    x = random.standard_normal((rows, inputs // 32, 32))
    x *= 10.0 ** random.integers(-3, 4, (rows, inputs // 32, 1))
    x[random.random((rows, inputs // 32)) < 0.05] = 0
    return x.reshape(rows, inputs).astype(np.float32)


MATRICES = {
    f"{weight_format} {outputs} {inputs}": random_matrix(outputs, inputs, weight_format)
    for weight_format in FORMATS
    for outputs, inputs in SHAPES
}
PACKED = replace(
    packed_model("llama").packed, matrices={**packed_model("llama").packed.matrices, **MATRICES}
)


@pytest.fixture(scope="module")
def teams(path: str, precision: Precision) -> Iterator[list[NativeModel]]:
    """The model on 1, 2 and 3 threads."""
    models = [native_model(path, PACKED, precision, count) for count in NUM_THREADS]
    yield models
    for model in models:
        model.close()


def expected(
    path: str, precision: Precision, weights: reference.Weights, x: FloatArray
) -> reference.DoubleArray:
    if precision == "int8":
        return reference.matmul_int8(weights, x)
    if path == "avx512bf16":
        return reference.matmul_bf16(weights, x)
    # No instruction multiplies bfloat16s, so nothing is rounded to them.
    return x.astype(np.float64) @ weights.values().astype(np.float64).T


@pytest.mark.parametrize("name", MATRICES)
def test_products_are_the_reference_s(
    path: str, precision: Precision, teams: Sequence[NativeModel], name: str
) -> None:
    matrix = MATRICES[name]
    weights = reference.unpack(*matrix)
    for rows in range(1, 14):
        x = random_rows(rows, matrix.inputs)
        got = teams[1].matmul(name, x)
        assert got.shape == (rows, matrix.outputs)
        error = np.abs(got - expected(path, precision, weights, x))
        assert (error <= reference.matmul_error(weights, x)).all()


@pytest.mark.parametrize("name", MATRICES)
def test_a_row_s_bits_depend_on_neither_the_others_nor_the_threads(
    teams: Sequence[NativeModel], name: str
) -> None:
    x = random_rows(13, MATRICES[name].inputs, seed=1)
    alone = np.concatenate([teams[0].matmul(name, row[None]) for row in x])
    for model in teams:
        for rows in range(1, 14):
            assert_same_bits(model.matmul(name, x[:rows]), alone[:rows])
            assert_same_bits(model.matmul(name, x[-rows:]), alone[-rows:])


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(sorted(MATRICES)),
    rows=st.integers(1, 70),
    exponents=st.lists(st.integers(-45, 30), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_rows_of_any_size(
    path: str,
    precision: Precision,
    teams: Sequence[NativeModel],
    name: str,
    rows: int,
    exponents: list[int],
    seed: int,
) -> None:
    """Denormal ones as well, and as many as no kernel takes at once."""
    matrix = MATRICES[name]
    weights = reference.unpack(*matrix)
    scales = 10.0 ** np.array([exponents[row % len(exponents)] for row in range(rows)])
    x = (random_rows(rows, matrix.inputs, seed) * scales[:, None]).astype(np.float32)
    want = expected(path, precision, weights, x)
    got = teams[1].matmul(name, x)
    # What is denormal has no 24 bits, and some processors take it for zero: each of the inputs may
    # be wrong by the smallest normal number, times a weight.
    smallest = matrix.inputs * 2.0**-126 * np.abs(weights.values()).max()
    error = np.abs(got - want)
    assert (error <= reference.matmul_error(weights, x) + smallest).all()
    for row in (0, rows - 1):
        assert_same_bits(teams[2].matmul(name, x[row : row + 1])[0], got[row])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_activations_are_rounded_to_the_bit_as_documented(
    path: str, precision: Precision, teams: Sequence[NativeModel], weight_format: int
) -> None:
    """The product with a unit matrix is what activations became."""
    unit = np.eye(32)
    ones, zeros = np.ones((32, 1), np.float16), np.zeros((32, 1), np.float16)
    if weight_format == INT4:
        data = pack_int4(unit.astype(np.uint8), ones, zeros)
    else:
        data = pack_int8(unit.astype(np.int8), ones)
    packed = replace(
        PACKED, matrices={**PACKED.matrices, "unit": PackedMatrix(data, 32, 32, weight_format)}
    )
    x = np.concatenate([random_rows(40, 32, seed) for seed in range(5)])
    # Halves of a step, which are rounded to even.
    x[0] = np.arange(32) + 0.5
    x[0, 0] = 127
    with closing(native_model(path, packed, precision)) as model:
        got = model.matmul("unit", x)
    if precision == "int8":
        q, scale = reference.quantize_activations(x)
        want = q.astype(np.float32) * scale
    else:
        want = reference.round_bf16(x) if path == "avx512bf16" else x
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_number_spoils_no_other(
    teams: Sequence[NativeModel], name: str, value: float
) -> None:
    x = random_rows(9, MATRICES[name].inputs, seed=2)
    sound = teams[1].matmul(name, x)
    x[4, 5] = value
    got = teams[1].matmul(name, x)
    assert not np.isfinite(got[4]).any()
    if np.isnan(value):
        assert np.isnan(got[4]).all()
    rest = np.arange(9) != 4
    assert_same_bits(got[rest], sound[rest])


@pytest.mark.skipif(
    not {"avx2", "portable"} <= set(PATHS), reason="only one of the two can be run here"
)
@pytest.mark.parametrize("name", MATRICES)
def test_avx2_and_portable_give_the_same_bits(precision: Precision, name: str) -> None:
    x = random_rows(7, MATRICES[name].inputs, seed=3)
    products = []
    for path in ("avx2", "portable"):
        with closing(native_model(path, PACKED, precision)) as model:
            products.append(model.matmul(name, x))
    assert_same_bits(*products)
