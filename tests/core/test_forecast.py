"""Forecasts: what the cost model, the slots and the pool say about waits."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.cost_model import Coefficients
from headway.core.forecast import Forecast, Work

#: A step takes 10 ms, a prefill token one more.
COSTS = Coefficients(10.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def forecast(
    costs: Coefficients = COSTS,
    max_num_seqs: int = 2,
    num_pool_tokens: int = 100_000,
    step_limit_ms: float = math.inf,
    output_fraction: float = 1.0,
) -> Forecast:
    return Forecast(costs, step_limit_ms, max_num_seqs, num_pool_tokens, output_fraction)


costs = st.builds(Coefficients, *[st.floats(0.0, 10.0) for _ in range(6)])
works = st.builds(
    Work, st.integers(0, 300), st.integers(1, 300), st.integers(1, 300), st.integers(1, 4)
)
forecasts = st.builds(
    Forecast,
    costs,
    st.just(math.inf) | st.floats(1.0, 100.0),
    st.integers(1, 64),
    st.integers(1, 10_000),
    st.floats(0.01, 1.0),
)


# --- waits ----------------------------------------------------------------------------------------


def test_nothing_ahead_means_no_wait() -> None:
    assert forecast().waits_ms([]) == []
    assert forecast().waits_ms([Work(100, 100, 100)]) == [0.0]
    assert forecast().wait_ms([]) == 0.0


def test_requests_with_a_slot_do_not_wait_and_the_next_waits_for_its_share_of_the_work() -> None:
    decoding = [Work(0, 20, 30), Work(0, 10, 30)]
    waits = forecast(max_num_seqs=2).waits_ms([*decoding, Work(0, 4, 4), Work(0, 4, 4)])
    # 300 ms of decoding on two slots, and then 40 ms more of it.
    assert waits == pytest.approx([0, 0, 150, 170])


def test_prefills_ahead_are_waited_for_one_after_another() -> None:
    ranked = [Work(100, 1, 100)] * 4
    assert forecast(max_num_seqs=8).waits_ms(ranked) == pytest.approx([0, 100, 200, 300])


def test_a_pool_for_two_serves_two_at_a_time() -> None:
    ranked = [Work(4, 20, 0)] * 4  # 24 tokens each
    roomy = forecast(max_num_seqs=8, num_pool_tokens=96).waits_ms(ranked)
    tight = forecast(max_num_seqs=8, num_pool_tokens=50).waits_ms(ranked)
    assert roomy == pytest.approx([0, 4, 8, 12])
    assert tight == pytest.approx([0, 4, 204, 306])


def test_choices_take_a_slot_each() -> None:
    single, group = Work(0, 10, 30), Work(0, 10, 30, 2)
    assert forecast(max_num_seqs=4).waits_ms([single] * 5)[4] == pytest.approx(100)
    assert forecast(max_num_seqs=4).waits_ms([group] * 3)[2] == pytest.approx(100)


def test_what_requests_generate_of_what_they_may_counts() -> None:
    ahead = [Work(0, 40, 10), Work(0, 40, 10)]
    whole, half = (
        forecast(max_num_seqs=1, output_fraction=part).wait_ms(ahead) for part in (1.0, 0.5)
    )
    assert (whole, half) == pytest.approx((800, 400))


def test_requests_that_take_turns_take_longer() -> None:
    """Four decode, and a bounded step has time for two."""
    busy = [Work(0, 11, 1)] * 4
    unbounded = forecast(Coefficients(10, 0, 10, 0, 0, 0), max_num_seqs=4)
    bounded = unbounded._replace(step_limit_ms=30.0)
    assert unbounded.wait_ms(busy) == pytest.approx(11 * 50)
    assert bounded.wait_ms(busy) == pytest.approx(11 * 2 * 30)


@given(forecasts, st.lists(works, max_size=20))
def test_waits_grow_with_the_rank(forecast: Forecast, ranked: list[Work]) -> None:
    waits = forecast.waits_ms(ranked)
    assert len(waits) == len(ranked)
    assert waits[:1] in ([], [0.0])
    assert all(earlier <= later for earlier, later in pairwise(waits))
    prefill_ms = forecast.coefficients.prefill_token
    for rank, wait in enumerate(waits):
        tokens = sum(work.prefill_tokens for work in ranked[:rank])
        assert wait >= tokens * prefill_ms * (1 - 1e-9), "the prompts ahead are computed first"


@given(forecasts, st.lists(works, min_size=1, max_size=20), st.integers(2, 8))
def test_more_slots_never_make_a_wait_longer(
    forecast: Forecast, ranked: list[Work], factor: int
) -> None:
    free = Coefficients(*forecast.coefficients[:2], 0.0, 0.0, 0.0, 0.0)  # no cost of company
    few = forecast._replace(coefficients=free, step_limit_ms=math.inf)
    many = few._replace(max_num_seqs=few.max_num_seqs * factor)
    for before, after in zip(few.waits_ms(ranked), many.waits_ms(ranked), strict=True):
        assert after <= before * (1 + 1e-9)


# --- slots ----------------------------------------------------------------------------------------


def test_residents_make_room_one_after_another_and_then_again() -> None:
    residents = [Work(0, 20, 30), Work(0, 10, 30)]
    slots_ms = list(islice(forecast().slots_ms(residents), 5))
    assert slots_ms == pytest.approx([100, 200, 300, 400, 500])


def test_without_residents_there_is_room_at_once() -> None:
    assert list(islice(forecast().slots_ms([]), 3)) == [0.0, 0.0, 0.0]


@given(forecasts, st.lists(works, max_size=12))
def test_slots_become_free_in_order_for_ever(forecast: Forecast, residents: list[Work]) -> None:
    slots_ms = list(islice(forecast.slots_ms(residents), 3 * len(residents) + 3))
    assert len(slots_ms) == 3 * len(residents) + 3
    assert slots_ms[0] >= 0
    assert all(earlier <= later for earlier, later in pairwise(slots_ms))
