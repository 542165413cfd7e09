"""The time budget: what fits into a step of bounded time."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from headway.core.cost_model import CostModel, StepFeatures
from headway.core.time_budget import TimeBudget


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


# ------------------------------------------------------------------------- rows of logits

LOGITS = (1.0, 0.5, 2.0, 0.01, 0.0, 3.0)


def test_a_row_of_logits_is_paid_beside_its_token() -> None:
    time = TimeBudget(CostModel(LOGITS), 20.0)
    assert time.price(1, 100, logit_rows=1) == pytest.approx(3.0 + 3.0)
    assert time.price(10, 0, logit_rows=1) == pytest.approx(5.0 + 3.0)
    time.spend(1, 100, logit_rows=1)
    assert time.spent_ms == pytest.approx(7.0)


def test_a_request_that_samples_needs_the_time_of_its_row_to_start() -> None:
    time = TimeBudget(CostModel(LOGITS), 1.0 + 4.0)
    assert time.allows(0)
    assert not time.allows(0, logit_rows=1)
    assert time.allows(0, limit_ms=6.0, logit_rows=1)
    assert time.affordable(1, 0, is_first=False) == 1
    assert time.affordable(1, 0, is_first=False, logit_rows=1) == 0
    assert time.affordable(1, 0, is_first=True, logit_rows=1) == 1


def test_rating_a_prompt_makes_its_chunk_shorter() -> None:
    time = TimeBudget(CostModel(LOGITS), 36.0)
    assert time.affordable(100, 0, is_first=False) == 70
    assert time.affordable(100, 0, is_first=False, logit_rows=100) == 10


@given(
    costs=st.lists(st.floats(0.0, 10.0), min_size=6, max_size=6),
    left=st.floats(0, 1000),
    count=st.integers(1, 600),
    context=st.integers(0, 4096),
    is_rated=st.booleans(),
)
def test_what_is_afforded_fits_and_nothing_allowed_is_denied(
    costs: list[float], left: float, count: int, context: int, is_rated: bool
) -> None:
    model = CostModel(costs)
    time = TimeBudget(model, model.coefficients.step + left)
    rows = count if is_rated else 1
    fitting = time.affordable(count, context, is_first=False, logit_rows=rows)
    assert 0 <= fitting <= count
    if time.allows(context, logit_rows=1):
        assert fitting >= 1
    if fitting > 1:
        time.spend(fitting, context, fitting if is_rated else fitting == count)
        assert time.spent_ms <= time.limit_ms * (1 + 1e-9)


# ------------------------------------------------------- a fast machine, a small CPU's guess


def test_a_fast_machine_s_prompts_are_not_cut_for_long() -> None:
    """The guess is a small CPU's, and no step has shown a prompt for thousands of steps."""
    costs = (5.0, 0.02, 0.01, 1e-6, 1e-9)
    rng = random.Random(3)
    model = CostModel()

    def observe(features: StepFeatures) -> None:
        taken = zip(costs, (1, *features[:4]), strict=True)
        model.observe(features, sum(cost * count for cost, count in taken))

    for _ in range(2500):
        decode_seqs = rng.randrange(1, 65)
        observe(StepFeatures(0, decode_seqs, decode_seqs * rng.randrange(16, 4096)))
    chunks = []
    for _ in range(3):
        time = TimeBudget(model, 40.0, min_chunk=16)
        chunks.append(time.affordable(512, 0, is_first=True))
        observe(StepFeatures(chunks[-1], 0, 0, chunks[-1] ** 2 / 2))
    assert chunks[-1] == 512, chunks
