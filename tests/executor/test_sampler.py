"""The sampler against a reference written from the definitions, and its statistics."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headway.core.errors import InternalError
from headway.core.sampling_params import SamplingParams
from headway.executor.sampler import Sampler, uniform

RELAXED = settings(deadline=None)

LOGITS = np.array([2.0, -1.0, 0.5, 2.0, 0.0, -3.0, 1.0, 0.5, -np.inf, -0.5], dtype=np.float32)


def sample(
    logits: np.ndarray,
    params: SamplingParams,
    position: int,
    num_prompt_tokens: int = 0,
    tokens: Any = (),
    banned: Collection[int] = (),
) -> int:
    """The choice of a sampler that has made no other, with the seed of ``params``."""
    return Sampler(logits.size).sample(
        logits, params, position, params.seed, num_prompt_tokens, tokens, banned
    )


def adjusted_logits(
    logits: np.ndarray,
    params: SamplingParams,
    num_prompt_tokens: int,
    tokens: Sequence[int],
    banned: Collection[int],
) -> list[float]:
    """Bans, biases and penalties, token by token, in float64."""
    adjusted = [float(logit) for logit in logits]
    for token in banned:
        adjusted[token] = -math.inf
    for token, bias in params.logit_bias.items():
        adjusted[token] += bias
    for token in set(tokens):
        if adjusted[token] > 0:
            adjusted[token] /= params.repetition_penalty
        else:
            adjusted[token] *= params.repetition_penalty
    generated = list(tokens)[num_prompt_tokens:]
    for token in set(generated):
        adjusted[token] -= params.frequency_penalty * generated.count(token)
        adjusted[token] -= params.presence_penalty
    return adjusted


def distribution(logits: Sequence[float] | np.ndarray, params: SamplingParams) -> np.ndarray:
    """The exact probabilities: temperature, min-p, top-k, top-p, by sorting everything."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    scaled = np.array([float(logits[token]) for token in ranked]) / params.temperature
    weights = np.exp(scaled - scaled[0])
    possible = weights >= params.min_p
    if params.top_k > 0:
        possible[params.top_k :] = False
    weights[~possible] = 0.0
    weights /= weights.sum()
    if params.top_p < 1.0:
        kept = int(np.searchsorted(np.cumsum(weights), params.top_p - 1e-9)) + 1
        weights[kept:] = 0.0
        weights /= weights.sum()
    result = np.zeros(len(logits))
    result[ranked] = weights
    return result


def random_number(seed: int, position: int) -> float:
    """That of a position, from numpy's generator, which counts up before it generates."""
    generator = np.random.Philox(key=seed, counter=(position - 1) % 2**256)
    return float(np.random.Generator(generator).random())


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
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 3.0, "min_p": 0.4, "top_p": 0.8},
        {"min_p": 0.1, "top_k": 4, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(changes: dict[str, float]) -> None:
    params = SamplingParams(seed=20_240_607, **changes)  # type: ignore[arg-type]
    sampler = Sampler(len(LOGITS))
    draws = [sampler.sample(LOGITS, params, position, params.seed) for position in range(6_000)]
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
    draws = np.array([sampler.sample(logits, params, n, params.seed) for n in range(4_000)])
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
    # The token that is chosen ranks inside the top k, and less than top_p of the weight is before
    # it.
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


def test_zeros_of_either_sign_are_equals() -> None:
    signed = np.array([-1.0, -0.0, 0.0], dtype=np.float32)
    half = SamplingParams(top_p=0.5, seed=1)
    assert {sample(signed, half, n) for n in range(200)} == {1, 2}


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

#: Few values, so that ties are frequent; and rows longer than the blocks in which sums are taken.
rows = st.one_of(
    st.lists(st.one_of(quarters, st.just(-math.inf)), min_size=3, max_size=12),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(3, 1_500)).map(
        lambda pair: np.random.default_rng(pair[0]).normal(scale=150, size=pair[1]) // 1 / 64
    ),
).map(lambda values: np.array(values, dtype=np.float32))


@settings(deadline=None, max_examples=400)
@given(
    logits=rows,
    tokens=st.lists(st.integers(0, 2), max_size=8),
    num_prompt_tokens=st.integers(0, 8),
    banned=st.sets(st.integers(0, 2)),
    presence=st.one_of(st.just(0.0), quarters),
    frequency=st.one_of(st.just(0.0), quarters),
    repetition=st.one_of(st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.1, 3.0)),
    logit_bias=st.dictionaries(st.integers(0, 2), quarters, max_size=3),
    temperature=st.one_of(st.just(0.0), st.floats(0.2, 3.0)),
    top_k=st.integers(-1, 12),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 1.0)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 1_000),
)
def test_every_choice_is_the_definition_s(
    logits: np.ndarray,
    tokens: list[int],
    num_prompt_tokens: int,
    banned: set[int],
    presence: float,
    frequency: float,
    repetition: float,
    logit_bias: dict[int, float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=logit_bias,
    )
    num_prompt_tokens = min(num_prompt_tokens, len(tokens))
    adjusted = adjusted_logits(logits, params, num_prompt_tokens, tokens, banned)
    assume(np.isfinite(logits).any() and np.isfinite(adjusted).any())
    # What a float32 cannot tell apart is left out: adjusted logits that nearly tie, ...
    distances = np.array(adjusted) - max(adjusted)
    gaps = -np.diff(np.sort(distances[np.isfinite(distances)]))
    assume(not ((gaps != 0.0) & (abs(gaps) < 1e-4)).any())
    wanted = adjusted.index(max(adjusted))
    if temperature > 0.0:
        # ... a weight at the edge of min-p, a sum at the edge of top-p, ...
        weights = np.exp(distances / temperature)
        assume(not ((weights != min_p) & (abs(weights - min_p) < 1e-5)).any())
        if top_p < 1.0:
            nucleus = np.cumsum(np.sort(distribution(adjusted, replace(params, top_p=1.0)))[::-1])
            assume((abs(nucleus - top_p) > 1e-5).all())
        # ... and a draw at the edge of two tokens.
        reached = np.cumsum(distribution(adjusted, params))
        point = random_number(seed, position)
        assume((abs(reached - point) > 1e-5).all())
        wanted = int(np.searchsorted(reached, point))
    before = logits.copy()
    sampler = Sampler(logits.size)
    chosen = sampler.sample(logits, params, position, seed, num_prompt_tokens, tokens, banned)
    assert chosen == wanted
    np.testing.assert_array_equal(logits, before)


def test_repetition_counts_in_the_prompt_and_the_other_penalties_in_the_output() -> None:
    logits = np.array([1.0, 0.75, -1.0], dtype=np.float32)
    greedy = SamplingParams(temperature=0)
    assert sample(logits, greedy, 2, 2, [0, 0]) == 0
    assert sample(logits, replace(greedy, repetition_penalty=2), 2, 2, [0, 0]) == 1
    assert sample(logits, replace(greedy, presence_penalty=2), 2, 2, [0, 0]) == 0
    assert sample(logits, replace(greedy, presence_penalty=2), 2, 1, [0, 0]) == 1
    assert sample(logits, replace(greedy, frequency_penalty=0.2), 2, 1, [0, 0]) == 0
    assert sample(logits, replace(greedy, frequency_penalty=0.2), 2, 0, [0, 0]) == 1
    # A logit below 0 is multiplied, so that its token becomes less likely, too.
    assert sample(-logits[::-1], replace(greedy, repetition_penalty=2), 1, 1, [0]) == 0
    assert sample(np.array([-1.0, -1.5]), replace(greedy, repetition_penalty=2), 1, 1, [0]) == 1


def test_tokens_may_be_a_list_an_array_or_of_numpy() -> None:
    params = SamplingParams(
        seed=3, temperature=3, repetition_penalty=1.7, presence_penalty=1, frequency_penalty=-0.5
    )
    tokens = [0, 3, 3, 9, 6, 0]
    for position in range(30):
        chosen = sample(LOGITS, params, position, 2, tokens)
        assert sample(LOGITS, params, position, 2, array("q", tokens)) == chosen
        assert sample(LOGITS, params, position, 2, np.array(tokens)) == chosen


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
def test_an_extreme_repetition_penalty_forbids_nothing_and_allows_nothing(penalty: float) -> None:
    logits = np.array([-np.inf, -3e38, -2.0, 0.0, 2.0, 3e38], dtype=np.float32)
    tokens = range(6)
    for changes in ({"temperature": 0.0}, {}, {"top_p": 0.5}, {"presence_penalty": -2.0}):
        params = SamplingParams(seed=1, repetition_penalty=penalty, **changes)  # type: ignore[arg-type]
        drawn = {sample(logits, params, position, 6, tokens) for position in range(20)}
        # Logits beyond what a float32 holds are equals, and so are those below.
        assert drawn <= ({4, 5} if penalty < 1 else {3, 4, 5})
    only = np.array([-np.inf, -2.0], dtype=np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    assert sample(only, params, 2, 2, [0, 1]) == 1


def test_what_is_banned_is_not_chosen_whatever_attracts_it() -> None:
    attracted = SamplingParams(seed=1, logit_bias={3: 100.0}, presence_penalty=-2.0)
    assert sample(LOGITS, attracted, 1, 0, [3]) == 3
    drawn = {sample(LOGITS, attracted, n, 0, [3], frozenset({3, 0})) for n in range(300)}
    assert drawn == {1, 2, 4, 5, 6, 7, 9}
    greedy = SamplingParams(temperature=0)
    assert sample(LOGITS, greedy, 0, banned=[0]) == 3
    assert sample(LOGITS, greedy, 0, banned=[0, 3]) == 6
    # An id outside of the vocabulary is never chosen anyway.
    assert sample(LOGITS, greedy, 0, banned=[10, 2**40]) == 0


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
    generated: list[int] = []  # there is no prompt
    for position, row in enumerate(table):
        generated.append(sample(row, params, position, 0, generated))
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
        drawn = sampler.sample(logits[position], requests[seed], position, seed)
        assert drawn == alone[seed, position]
    # Seeds and positions do make a difference.
    assert len({tuple(alone[seed, n] for n in range(20)) for seed in range(5)}) == 5
    level = np.zeros(1_000, dtype=np.float32)
    assert len({sample(level, requests[0], position) for position in range(50)}) > 40


@RELAXED
@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**64 - 2))
def test_the_random_numbers_are_philox(seed: int, position: int) -> None:
    assert uniform(seed, position) == random_number(seed, position)


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
        Sampler(4).sample(np.zeros(5, np.float32), params, 0, 1)
    with pytest.raises(InternalError, match="has no seed"):
        sample(LOGITS, SamplingParams(), 0)
    with pytest.raises(InternalError, match="vocab_size is 0"):
        Sampler(0)
    with pytest.raises(InternalError, match="the largest of 10 logits is -inf"):
        sample(LOGITS, params, 0, banned=range(10))
