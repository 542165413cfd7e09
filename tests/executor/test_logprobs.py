"""Log-probabilities against the definition, computed from all logits in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.errors import InternalError
from headway.executor.logprobs import LogprobReader
from headway.executor.sampler import likeliest

RELAXED = settings(deadline=None)


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    return wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())


#: Few values, so that ties are frequent; and rows longer than the blocks that are searched.
rows = st.one_of(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, -np.inf]), min_size=1, max_size=40),
    st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 9_000)).map(
        lambda pair: np.random.default_rng(pair[0]).normal(scale=4, size=pair[1]).round(1).tolist()
    ),
).filter(lambda values: max(values) > -np.inf)


@RELAXED
@given(values=rows, num_top=st.integers(0, 20), data=st.data())
def test_they_are_the_definition_s(values: list[float], num_top: int, data: st.DataObject) -> None:
    row = np.array(values, dtype=np.float32)
    token_id = data.draw(st.integers(0, row.size - 1))
    rated = LogprobReader(row.size).read(row, token_id, num_top)
    exact = log_softmax(row)
    assert rated.token_id == token_id
    assert rated.logprob == pytest.approx(exact[token_id], abs=1e-5)
    ranked = sorted(range(row.size), key=lambda token: (-row[token], token))[:num_top]
    assert [token for token, _ in rated.top] == ranked
    assert [logprob for _, logprob in rated.top] == pytest.approx(exact[ranked], abs=1e-5)


@RELAXED
@given(values=rows, num_top=st.integers(1, 20))
def test_they_are_those_of_a_distribution(values: list[float], num_top: int) -> None:
    row = np.array(values, dtype=np.float32)
    greedy = likeliest(row)
    rated = LogprobReader(row.size).read(row, greedy, num_top)
    assert rated.top[0] == (greedy, rated.logprob)
    logprobs = [logprob for _, logprob in rated.top]
    assert logprobs == sorted(logprobs, reverse=True)
    assert len({token for token, _ in rated.top}) == len(rated.top) == min(num_top, row.size)
    assert sum(map(math.exp, logprobs)) <= 1 + 1e-6
    if num_top >= row.size:
        assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=1e-6)


def test_what_was_read_before_makes_no_difference() -> None:
    random = np.random.default_rng(1)
    table = random.normal(size=(30, 1_000)).astype(np.float32)
    reader = LogprobReader(1_000)
    together = [reader.read(row, 5, 3) for row in table]
    assert [LogprobReader(1_000).read(row, 5, 3) for row in table[::-1]] == together[::-1]


def test_extreme_logits() -> None:
    row = np.array([-np.inf, -3e38, 3e38], dtype=np.float32)
    assert LogprobReader(3).read(row, 2, 3).logprob == 0.0
    assert LogprobReader(3).read(row, 0, 0).logprob == -math.inf
    assert [token for token, _ in LogprobReader(3).read(row, 2, 5).top] == [2, 1, 0]
    for broken in ([np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0], [-np.inf] * 3):
        with pytest.raises(InternalError, match="the largest of 3 logits is"):
            LogprobReader(3).read(np.array(broken, np.float32), 1, 1)
