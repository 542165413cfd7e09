"""The cost model: it finds the true costs, forgets old ones, and never leaves the ground."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from headway.core.cost_model import SMALL_CPU_COSTS, Coefficients, CostModel, StepFeatures

TRUE = (4.0, 0.3, 1.2, 0.002, 0.0004, 0.25)
#: Costs as of a large model on a GPU: a step's fixed cost is most of it.
GPU = (5.0, 0.005, 0.01, 1e-6, 1e-9, 0.002)


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
        rng.choice([0, rng.randrange(0, decode_seqs + 1)]),
    )


def random_decodes(rng: random.Random) -> StepFeatures:
    decode_seqs = rng.randrange(1, 65)
    return StepFeatures(0, decode_seqs, decode_seqs * rng.randrange(16, 4096))


def chunk(num_tokens: int, num_context_tokens: int = 0) -> StepFeatures:
    return StepFeatures(num_tokens, 0, 0, num_tokens * (num_context_tokens + num_tokens / 2))


@pytest.mark.parametrize("guess", [SMALL_CPU_COSTS, SMALL_CPU_COSTS[:4], ()])
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
                st.integers(0, 4096),
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
    assert model.recompute_ms(10) == pytest.approx(5.0)
    assert model.swap_ms(4) == pytest.approx(2.0)  # out and in again


def test_learns_the_bandwidth_of_swapping() -> None:
    model = CostModel(swap_ms_per_block=1.0)
    model.observe_swap(0, 5.0)
    assert model.swap_ms_per_block == 1.0
    for _ in range(50):
        model.observe_swap(10, 3.0)
    assert model.swap_ms_per_block == pytest.approx(0.3, rel=0.01)


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
    assert model.coefficients == pytest.approx((1.0, 2.0, 3.0, 0.0, 0.0, 0.0))
    assert model.num_observations == 0
    assert model.swap_ms_per_block == swap_ms


# ------------------------------------------------------------- machines of every speed


@pytest.mark.parametrize("is_given", [True, False])
def test_a_fast_machine_s_prefill_is_remembered_while_it_only_decodes(is_given: bool) -> None:
    rng = random.Random(7)
    model = CostModel(GPU) if is_given else CostModel()
    for _ in range(0 if is_given else 500):
        features = random_step(rng)
        model.observe(features, true_ms(features, GPU) * rng.uniform(0.95, 1.05))
    for _ in range(2500):
        features = random_decodes(rng)
        model.observe(features, true_ms(features, GPU) * rng.uniform(0.95, 1.05))
    for features in (chunk(16), chunk(512, 4000), chunk(2048)):
        assert model.predict_ms(features) == pytest.approx(true_ms(features, GPU), rel=0.15)


def test_what_a_load_never_shows_does_not_drift() -> None:
    rng = random.Random(8)
    model = CostModel(GPU)
    for _ in range(40_000):
        features = random_decodes(rng)
        model.observe(features, true_ms(features, GPU) * rng.uniform(0.8, 1.2))
    assert model.predict_ms(chunk(2048)) == pytest.approx(true_ms(chunk(2048), GPU), rel=0.15)


def test_decoding_that_is_cheap_makes_an_unchecked_guess_of_prefill_cheap() -> None:
    rng = random.Random(9)
    model = CostModel(SMALL_CPU_COSTS)
    for _ in range(2500):
        features = random_decodes(rng)
        model.observe(features, true_ms(features, GPU))
    assert model.coefficients.prefill_token < SMALL_CPU_COSTS.prefill_token / 5


@pytest.mark.parametrize("pace", [1e-3, 0.1, 10.0, 100.0])
def test_a_guess_for_another_machine_is_soon_replaced(pace: float) -> None:
    rng = random.Random(10)
    model = CostModel()
    machine = tuple(pace * c for c in TRUE)
    for _ in range(200):
        features = random_step(rng)
        model.observe(features, true_ms(features, machine) * rng.uniform(0.9, 1.1))
    for _ in range(100):
        features = random_step(rng)
        assert model.predict_ms(features) == pytest.approx(true_ms(features, machine), rel=0.25)


@given(pace=st.floats(1e-2, 1e4), seed=st.integers(0, 1000))
def test_no_machine_s_times_are_built_in(pace: float, seed: int) -> None:
    """A machine that is ``pace`` times slower is learnt step by step like the faster one."""
    rng = random.Random(seed)
    models = CostModel(GPU), CostModel(tuple(pace * c for c in GPU))
    for _ in range(40):
        features = random_step(rng)
        measured_ms = true_ms(features) * rng.uniform(0.5, 1.5)
        for model, factor in zip(models, (1.0, pace), strict=True):
            model.observe(features, factor * measured_ms)
    expected = [pace * c for c in models[0].coefficients]
    assert models[1].coefficients == pytest.approx(Coefficients(*expected), rel=1e-6)


def test_a_cost_that_was_nothing_is_learnt_when_it_shows() -> None:
    rng = random.Random(11)
    model = CostModel()
    free = (*TRUE[:5], 0.0)
    for costs, num_steps in ((free, 1000), (TRUE, 300)):
        for _ in range(num_steps):
            features = random_step(rng)
            model.observe(features, true_ms(features, costs) * rng.uniform(0.9, 1.1))
    assert model.coefficients.logit_row == pytest.approx(TRUE[5], rel=0.4)


def test_steps_that_take_no_time_cost_nothing_and_are_not_the_last_word() -> None:
    rng = random.Random(12)
    model = CostModel()
    for _ in range(1000):
        model.observe(random_step(rng), 0.0)
    assert model.predict_ms(random_step(rng)) < 0.1
    for _ in range(1000):
        features = random_step(rng)
        model.observe(features, true_ms(features))
    for _ in range(50):
        features = random_step(rng)
        assert model.predict_ms(features) == pytest.approx(true_ms(features), rel=0.3)
