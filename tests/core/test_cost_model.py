"""The cost model: it finds the true costs, forgets old ones, and never leaves the ground."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from headway.core.cost_model import CostModel, StepFeatures, TimeBudget

TRUE = (4.0, 0.3, 1.2, 0.002, 0.0004)


def true_ms(features: StepFeatures, coefficients: tuple[float, ...] = TRUE) -> float:
    return sum(c * f for c, f in zip(coefficients, (1, *features), strict=True))


def random_step(rng: random.Random) -> StepFeatures:
    decode_seqs = rng.randrange(0, 33)
    prefill_tokens = rng.choice([0, 0, rng.randrange(2, 512)])
    return StepFeatures(
        prefill_tokens,
        decode_seqs,
        decode_seqs * rng.randrange(16, 1024),
        prefill_tokens * (rng.randrange(0, 2048) + prefill_tokens / 2),
    )


@pytest.mark.parametrize("guess", [(5.0, 0.6, 0.8, 0.0005, 0.0002), ()])
def test_converges_to_the_true_costs_through_noise(guess: tuple[float, ...]) -> None:
    rng = random.Random(1)
    model = CostModel(guess)
    for _ in range(2000):
        features = random_step(rng)
        model.observe(features, true_ms(features) * rng.uniform(0.9, 1.1))
    for found, true in zip(model.coefficients, TRUE, strict=True):
        assert found == pytest.approx(true, rel=0.25)
    for _ in range(100):
        features = random_step(rng)
        assert model.predict_ms(features) == pytest.approx(true_ms(features), rel=0.1, abs=1.0)
    assert model.num_observations == 2000


def test_without_noise_it_is_exact_after_a_few_steps() -> None:
    rng = random.Random(2)
    model = CostModel()
    for _ in range(300):
        features = random_step(rng)
        model.observe(features, true_ms(features))
    assert model.coefficients == pytest.approx(TRUE, rel=0.1)


def test_follows_a_machine_that_becomes_slower() -> None:
    """And a load of one kind tells about the others."""
    rng = random.Random(3)
    model = CostModel()
    for _ in range(300):
        features = random_step(rng)
        model.observe(features, true_ms(features))
    model.calibrate()
    slower = tuple(3 * c for c in TRUE)
    for _ in range(30):
        decodes = StepFeatures(0, 16, 16 * rng.randrange(16, 512))
        model.observe(decodes, true_ms(decodes, slower))
    for _ in range(50):
        features = random_step(rng)
        assert model.predict_ms(features) == pytest.approx(true_ms(features, slower), rel=0.5)
    for _ in range(1000):
        features = random_step(rng)
        model.observe(features, true_ms(features, slower))
    for _ in range(50):
        features = random_step(rng)
        assert model.predict_ms(features) == pytest.approx(true_ms(features, slower), rel=0.05)


def test_remembers_what_a_monotonous_load_does_not_show() -> None:
    rng = random.Random(4)
    model = CostModel()
    for _ in range(300):
        features = random_step(rng)
        model.observe(features, true_ms(features))
    model.calibrate()
    same = StepFeatures(0, 8, 1024)
    for _ in range(20_000):
        model.observe(same, true_ms(same) * rng.uniform(0.8, 1.2))
    assert model.predict_ms(same) == pytest.approx(true_ms(same), rel=0.1)
    for _ in range(100):
        other = random_step(rng)
        assert model.predict_ms(other) == pytest.approx(true_ms(other), rel=0.3)


def test_without_calibration_a_monotonous_load_is_known_at_least() -> None:
    model = CostModel()
    features = StepFeatures(0, 8, 1024)
    for _ in range(20_000):
        model.observe(features, 170.0)
    assert model.predict_ms(features) == pytest.approx(170.0, rel=0.02)
    assert all(math.isfinite(c) and 0 <= c < 1e3 for c in model.coefficients)


@given(
    st.lists(
        st.tuples(
            st.builds(
                StepFeatures,
                st.integers(0, 4096),
                st.integers(0, 256),
                st.integers(0, 10**6),
                st.integers(0, 10**7),
            ),
            st.floats(0, 1e5),
        ),
        max_size=60,
    )
)
def test_no_measurements_make_costs_negative_or_infinite(
    steps: list[tuple[StepFeatures, float]],
) -> None:
    model = CostModel()
    for features, measured_ms in steps:
        model.observe(features, measured_ms)
        assert all(c >= 0 and math.isfinite(c) for c in model.coefficients)
        assert model.predict_ms(features) >= 0


def test_the_costs_of_coming_back() -> None:
    model = CostModel((9.0, 0.5, 2.0, 0.1), swap_ms_per_block=0.25)
    assert model.recompute_ms(num_prefill_tokens=10, num_replayed_tokens=3) == pytest.approx(38.0)
    assert model.swap_ms(4) == pytest.approx(2.0)  # out and in again


def test_learns_the_bandwidth_of_swapping() -> None:
    model = CostModel(swap_ms_per_block=1.0)
    model.observe_swap(0, 5.0)
    assert model.swap_ms_per_block == 1.0
    for _ in range(50):
        model.observe_swap(10, 3.0)
    assert model.swap_ms_per_block == pytest.approx(0.3, rel=0.01)


# ---------------------------------------------------------------------- the budget of a step


def budget(limit_ms: float) -> TimeBudget:
    return TimeBudget(CostModel((1.0, 0.5, 2.0, 0.01)), limit_ms)


def test_a_step_without_limit_allows_everything() -> None:
    assert budget(math.inf).allows(10**9)
    assert budget(math.inf).affordable(10**9, 10**9, is_first=False) == 10**9


def test_decoding_is_paid_by_sequence_and_context() -> None:
    time = budget(10.0)
    assert time.affordable(1, 100, is_first=False) == 1
    time.spend(1, 100)
    assert time.spent_ms == pytest.approx(4.0)
    time.spend(1, 100)
    time.spend(1, 100)
    assert time.spent_ms == pytest.approx(10.0)
    assert time.affordable(1, 0, is_first=False) == 0
    assert time.affordable(1, 0, is_first=True) == 1


def test_prefill_is_paid_by_token() -> None:
    time = budget(10.0)
    assert time.affordable(100, 0, is_first=False) == 18
    time.spend(18, 0)
    assert time.affordable(100, 0, is_first=False) == 0
    assert not time.allows(0)


def test_a_chunk_deep_in_its_context_costs_more() -> None:
    time = TimeBudget(CostModel((1.0, 0.5, 2.0, 0.01, 0.001)), 100.0)
    assert time.price(100, 0) == pytest.approx(100 * (0.5 + 0.05))
    assert time.price(100, 4000) == pytest.approx(100 * (0.5 + 4.05))
    count = time.affordable(100, 4000, is_first=False)
    assert 20 <= count <= 22
    time.spend(count, 4000)
    assert time.spent_ms <= time.limit_ms


def test_the_first_ranked_always_gets_a_chunk() -> None:
    time = TimeBudget(CostModel((0.0, 0.5, 2.0, 0.01)), 0.4, min_chunk=16)
    assert time.affordable(100, 0, is_first=True) == 16
    assert time.affordable(9, 0, is_first=True) == 9
    assert time.affordable(1, 0, is_first=True) == 1
    assert time.affordable(100, 0, is_first=False) == 0


def test_a_bound_that_leaves_no_room_for_work_is_not_kept() -> None:
    time = TimeBudget(CostModel((20.0, 0.5, 2.0)), 15.0)
    assert time.affordable(100, 0, is_first=False) == 10
    time.tighten(5.0)
    assert time.limit_ms == 25.0


def test_a_single_slow_step_is_not_believed() -> None:
    rng = random.Random(6)
    model = CostModel()
    for _ in range(300):
        features = random_step(rng)
        model.observe(features, true_ms(features))
    model.observe(StepFeatures(0, 8, 1024), 60_000.0)
    for _ in range(10):
        features = random_step(rng)
        assert model.predict_ms(features) < 2.5 * true_ms(features)
        model.observe(features, true_ms(features))


def test_it_is_believed_if_it_stays_slow() -> None:
    model = CostModel()
    features = StepFeatures(0, 8, 1024)
    for _ in range(40):
        model.observe(features, 300.0)
    assert model.predict_ms(features) == pytest.approx(300.0, rel=0.1)


def test_reset_is_the_first_guess() -> None:
    model = CostModel((1.0, 2.0, 3.0))
    model.observe(StepFeatures(0, 8, 1024), 99.0)
    model.observe_swap(1, 5.0)
    swap_ms = model.swap_ms_per_block
    model.reset()
    assert model.coefficients == pytest.approx((1.0, 2.0, 3.0, 0.0, 0.0))
    assert model.num_observations == 0
    assert model.swap_ms_per_block == swap_ms


@given(
    per_prefill=st.floats(1e-6, 1.0),
    spent=st.floats(0, 100),
    left=st.floats(0, 100),
    count=st.integers(2, 20),
)
def test_what_is_allowed_to_start_is_affordable(
    per_prefill: float, spent: float, left: float, count: int
) -> None:
    """Otherwise a request would be admitted and given nothing."""
    time = TimeBudget(CostModel((spent, per_prefill, 0.0, 0.0)), spent + left)
    if time.allows(0):
        assert time.affordable(count, 0, is_first=False) >= 1


def test_rounding_does_not_deny_what_was_allowed() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        model = CostModel((0.0, rng.uniform(1e-3, 1.0), 0.0, 0.0))
        time = TimeBudget(model, model.coefficients[1])
        assert time.allows(0)
        assert time.affordable(10, 0, is_first=False) == 1


def test_a_vanishing_cost_is_no_overflow() -> None:
    assert TimeBudget(CostModel((0.0, 5e-324, 0.0, 0.0)), 10.0).affordable(9, 0, False) == 9
