"""What a machine can promise."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.config import SchedulerConfig
from headway.core.cost_model import Coefficients
from headway.core.slo import SLO
from headway.server.reach import TYPICAL_PROMPT, Reach

#: Of a small CPU: a step of 10 ms, and 0.5 ms for each token of a prompt.
COSTS = Coefficients(10.0, 0.5, 1.0, 0.001, 0.0, 0.0)

_costs = st.builds(
    Coefficients,
    st.floats(0.01, 100),
    st.floats(1e-4, 5),
    st.floats(0, 5),
    st.floats(0, 0.01),
    st.floats(0, 1e-3),
    st.floats(0, 1),
)


def test_an_arrival_waits_for_the_step_in_flight_and_computes_its_prompt() -> None:
    reach = Reach(COSTS, 256)
    # 100 tokens fit into one step of 60 ms, and into two of 40 ms.
    assert reach.ttft_ms(60) == pytest.approx(60 + 10 + 50)
    assert reach.ttft_ms(40) == pytest.approx(40 + 2 * 10 + 50)
    # Without a bound the longest step is one with as many prompt tokens as may be in one.
    assert reach.ttft_ms(math.inf) == pytest.approx(10 + 128 + 10 + 50)
    assert Reach(COSTS, 32).ttft_ms(math.inf) == pytest.approx(10 + 16 + 4 * 10 + 50)
    # Steps are never cut below 1.25 times what every step costs.
    assert reach.ttft_ms(1) == reach.ttft_ms(12.5)


def test_a_token_takes_a_step() -> None:
    assert Reach(COSTS, 256).tpot_ms() == pytest.approx(12.5)
    slow = Coefficients(10.0, 0.5, 5.0, 0.1, 0.0, 0.0)
    assert Reach(slow, 256).tpot_ms() == pytest.approx(10 + 5 + 0.1 * TYPICAL_PROMPT)


@given(_costs, st.integers(1, 4096), st.floats(1, 1000) | st.just(math.inf))
def test_the_shortest_target_is_kept_and_a_shorter_one_is_not(
    costs: Coefficients, max_num_batched_tokens: int, max_step_ms: float
) -> None:
    reach = Reach(costs, max_num_batched_tokens, max_step_ms)
    shortest = reach.shortest_ttft_ms()

    def kept(target: float) -> bool:
        bound = None if max_step_ms == math.inf else max_step_ms
        config = SchedulerConfig(max_step_ms=bound, slos=(SLO(0, target),))
        return reach.ttft_ms(config.step_limit_ms) <= target

    assert kept(shortest * 1.0001)
    assert not kept(shortest * 0.9999)


def test_targets_beyond_reach_are_named_with_what_is_within() -> None:
    reach = Reach(COSTS, 256)
    assert reach.beyond(SLO(0, 1000, 50)) == []
    ttft = reach.shortest_ttft_ms()
    lines = reach.beyond(SLO(-3, ttft / 2, 5))
    assert len(lines) == 2
    assert lines[0].startswith(f"-3:ttft={ttft / 2:g}ms is beyond reach, about {ttft:.0f} ms is")
    assert lines[1].startswith("-3:tpot=5ms is beyond reach, about 12 ms is within")
    assert reach.beyond(SLO(0, math.ceil(ttft))) == []
