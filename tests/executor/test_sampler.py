"""The sampler against a reference written from the definitions, and its statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headway.core.errors import InternalError
from headway.core.request import SamplingParams
from headway.executor.sampler import Sampler, sample, uniform

RELAXED = settings(deadline=None)

LOGITS = np.array([2.0, -1.0, 0.5, 2.0, 0.0, -3.0, 1.0, 0.5, -np.inf, -0.5], dtype=np.float32)


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The exact probabilities: temperature, then top-k, then top-p, by sorting everything."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    scaled = np.array([float(logits[token]) for token in ranked]) / params.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if params.top_p < 1.0:
        kept = int(np.searchsorted(np.cumsum(weights), params.top_p - 1e-9)) + 1
        weights[kept:] = 0.0
        weights /= weights.sum()
    result = np.zeros(len(logits))
    result[ranked] = weights
    return result


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * counts.sum()
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    return statistic, int(possible.sum()) - 1


def quantile(freedom: int, z: float) -> float:
    """Of the chi-square distribution, z standard deviations up (Wilson and Hilferty)."""
    spread = 2.0 / (9.0 * freedom)
    return freedom * (1.0 - spread + z * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_k": -1},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 0.3},
        {"top_k": 5, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.7},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(changes: dict[str, float]) -> None:
    params = SamplingParams(seed=20_240_607, **changes)  # type: ignore[arg-type]
    sampler = Sampler(len(LOGITS))
    draws = [sampler.sample(LOGITS, params, position) for position in range(6_000)]
    counts = np.bincount(draws, minlength=len(LOGITS))
    statistic, freedom = chi_square(counts, distribution(LOGITS, params))
    if freedom:
        # The seed is fixed, so this passes always or never; z = 3.7 is 1 in 10,000.
        assert statistic < quantile(freedom, 3.7)


def test_draws_over_a_large_vocabulary_follow_the_exact_distribution() -> None:
    # Larger than the blocks in which sums are taken, and no multiple of them.
    rng = np.random.default_rng(7)
    logits = rng.normal(scale=2.0, size=5_003).astype(np.float32)
    params = SamplingParams(seed=11, top_p=0.97)
    sampler = Sampler(logits.size)
    draws = np.array([sampler.sample(logits, params, position) for position in range(4_000)])
    exact = distribution(logits, params)
    # Tokens with few expected draws are pooled, so that the statistic has its distribution.
    groups = (np.cumsum(exact) * 40).astype(int).clip(max=39)
    counts = np.bincount(groups[draws], minlength=40)
    statistic, freedom = chi_square(counts, np.bincount(groups, weights=exact, minlength=40))
    assert statistic < quantile(freedom, 3.7)
    assert (exact[draws] > 0).all()


@RELAXED
@given(
    values=st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, -1.0, -np.inf]), st.floats(-30, 30, width=32)),
        min_size=1,
        max_size=40,
    ).filter(lambda values: max(values) > -np.inf),
    temperature=st.floats(0.05, 10),
    top_k=st.integers(-1, 45),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10_000),
)
def test_a_choice_is_possible_whatever_the_parameters(
    values: list[float], temperature: float, top_k: int, top_p: float, seed: int, position: int
) -> None:
    logits = np.array(values, dtype=np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    chosen = sample(logits, params, position)
    assert np.isfinite(logits[chosen])
    # Whoever is chosen ranks inside the top k, and fewer than top_p of the weight is before it.
    # Logits that a float32 cannot tell apart, seen from the largest, are equals.
    distance = logits.max() - logits
    ranked = sorted(range(len(logits)), key=lambda token: (distance[token], token))
    if top_k > 0:
        ranked = ranked[:top_k]
    assert chosen in ranked
    distance /= np.float32(temperature)
    ranked.sort(key=lambda token: (distance[token], token))
    weights = np.exp(-distance[ranked].astype(np.float64))
    assert weights[: ranked.index(chosen)].sum() / weights.sum() < top_p + 1e-5


def test_greedy_ties_and_top_k_ties_go_to_the_smaller_id() -> None:
    tied = np.array([0.0, 5.0, 1.0, 5.0, 1.0, 1.0], dtype=np.float32)
    assert sample(tied, SamplingParams(temperature=0), 0) == 1
    assert sample(tied, SamplingParams(top_k=1, seed=1), 0) == 1
    draws = {sample(tied, SamplingParams(top_k=4, temperature=9, seed=1), n) for n in range(400)}
    assert draws == {1, 2, 3, 4}
    nucleus = SamplingParams(top_p=0.9999, top_k=3, temperature=9, seed=1)
    assert {sample(tied, nucleus, n) for n in range(400)} == {1, 2, 3}
    # Six equal tokens: four of them are needed for more than half of the weight.
    level = np.zeros(6, dtype=np.float32)
    half = SamplingParams(top_p=0.55, seed=1)
    assert {sample(level, half, n) for n in range(400)} == {0, 1, 2, 3}


#: Numbers whose sums a float32 holds exactly.
quarters = st.integers(-8, 8).map(lambda number: number / 4)


@RELAXED
@given(
    values=st.lists(quarters, min_size=3, max_size=12),
    generated=st.lists(st.integers(0, 2), max_size=8),
    presence=quarters,
    frequency=quarters,
    logit_bias=st.dictionaries(st.integers(0, 2), quarters, max_size=3),
    position=st.integers(0, 100),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_penalties_and_biases_are_the_definition_s(
    values: list[float],
    generated: list[int],
    presence: float,
    frequency: float,
    logit_bias: dict[int, float],
    position: int,
    temperature: float,
) -> None:
    adjusted = list(values)
    for token, bias in logit_bias.items():
        adjusted[token] += bias
    for token in set(generated):
        adjusted[token] -= presence + frequency * generated.count(token)
    plain = SamplingParams(temperature=temperature, seed=5, top_p=0.9)
    params = replace(
        plain, presence_penalty=presence, frequency_penalty=frequency, logit_bias=logit_bias
    )
    wanted = sample(np.array(adjusted, dtype=np.float32), plain, position)
    logits = np.array(values, dtype=np.float32)
    assert sample(logits, params, position, generated) == wanted
    assert sample(logits, params, position, generated[::-1]) == wanted
    assert logits.tolist() == values


@RELAXED
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 12),
    presence=st.floats(0, 2),
    frequency=st.floats(0, 2),
)
def test_penalties_do_not_change_a_greedy_sequence_without_repeats(
    seed: int, length: int, presence: float, frequency: float
) -> None:
    table = np.random.default_rng(seed).normal(size=(length, 200)).astype(np.float32)
    plain = table.argmax(1).tolist()
    assume(len(set(plain)) == length)
    params = SamplingParams(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
    generated: list[int] = []
    for position, row in enumerate(table):
        generated.append(sample(row, params, position, generated))
    assert generated == plain


def test_a_bias_can_force_and_forbid() -> None:
    params = SamplingParams(seed=1, logit_bias={5: 100, 0: -100, 3: -100})
    assert {sample(LOGITS, params, position) for position in range(100)} == {5}
    params = SamplingParams(seed=1, temperature=5, logit_bias={5: -100, 0: -100})
    drawn = {sample(LOGITS, params, position) for position in range(500)}
    assert drawn == {1, 2, 3, 4, 6, 7, 9}


def test_the_draw_depends_on_seed_and_position_only() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(20, 1_000)).astype(np.float32)
    requests = [SamplingParams(seed=seed, top_p=0.9) for seed in range(5)]
    alone = {
        (seed, position): sample(logits[position], requests[seed], position)
        for seed in range(5)
        for position in range(20)
    }
    # The same draws in another order, from one sampler that has served others in between.
    sampler = Sampler(1_000)
    order = list(alone)
    rng.shuffle(order)
    for seed, position in order:
        assert sampler.sample(logits[position], requests[seed], position) == alone[seed, position]
    # Seeds and positions do make a difference.
    assert len({tuple(alone[seed, n] for n in range(20)) for seed in range(5)}) == 5
    level = np.zeros(1_000, dtype=np.float32)
    assert len({sample(level, requests[0], position) for position in range(50)}) > 40


@RELAXED
@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**64 - 2))
def test_the_random_numbers_are_philox(seed: int, position: int) -> None:
    # numpy counts up before it generates.
    generator = np.random.Philox(key=seed, counter=(position - 1) % 2**64)
    if position == 0:
        generator = np.random.Philox(key=seed, counter=2**256 - 1)
    assert uniform(seed, position) == np.random.Generator(generator).random()


def test_neighbouring_seeds_and_positions_are_not_correlated() -> None:
    table = np.array([[uniform(seed, position) for position in range(60)] for seed in range(60)])
    assert abs(table.mean() - 0.5) < 4 * math.sqrt(1 / 12 / table.size)
    for left, right in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1])):
        correlation = np.corrcoef(left.ravel(), right.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(left.size)


def test_the_logits_are_not_modified_and_may_be_of_another_type() -> None:
    logits = LOGITS.copy()
    logits.flags.writeable = False
    for params in (SamplingParams(seed=1, top_k=4, top_p=0.9), SamplingParams(temperature=0)):
        expected = sample(logits, params, 5)
        assert sample(logits.astype(np.float64), params, 5) == expected
        assert sample(np.repeat(logits, 2)[::2], params, 5) == expected
    np.testing.assert_array_equal(logits, LOGITS)


def test_a_single_token_and_extreme_values() -> None:
    assert sample(np.zeros(1, np.float32), SamplingParams(seed=1, top_p=0.5), 0) == 0
    only = np.array([-np.inf, -3e38, 3e38], dtype=np.float32)
    for changes in ({}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 1e-4}):
        params = SamplingParams(seed=1, **changes)  # type: ignore[arg-type]
        assert {sample(only, params, n) for n in range(50)} == {2}


def test_broken_logits_are_our_own_error() -> None:
    params = SamplingParams(seed=1)
    for row in ([np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 1.0]):
        with pytest.raises(InternalError, match="the largest of 2 logits is"):
            sample(np.array(row, dtype=np.float32), params, 0)
    with pytest.raises(InternalError, match="shape"):
        Sampler(4).sample(np.zeros(5, np.float32), params, 0)
    with pytest.raises(InternalError, match="has no seed"):
        sample(LOGITS, SamplingParams(), 0)
    with pytest.raises(InternalError, match="vocab_size is 0"):
        Sampler(0)
