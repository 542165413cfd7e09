"""What warming up leaves behind, and what it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headway.core.policy import Key, PriorityPolicy, Rankable
from headway.engine.engine import Engine
from headway.engine.warm_up import warm_up

MakeEngine = Callable[..., Engine]


class WatchfulPolicy(PriorityPolicy):
    """A policy that keeps what it has ranked."""

    def __init__(self) -> None:
        self.ranked: list[Rankable] = []

    def key(self, request: Rankable) -> Key:
        self.ranked.append(request)
        return super().key(request)


def test_the_policy_sees_nothing_of_it(make_engine: MakeEngine) -> None:
    policy = WatchfulPolicy()
    engine = make_engine(policy=policy, num_blocks=1000, block_size=16)
    done: list[float] = []
    warm_up(engine, done.append)
    assert not policy.ranked
    assert done == sorted(done) and done[-1] == 1.0
    assert engine.scheduler.cost_model.num_observations > 20
    # The simulated machine: 8 ms a step, 0.4 ms a prefill token and a sequence.
    costs = engine.scheduler.cost_model.coefficients
    assert engine.statistics.coefficients == costs, "it is told what was learnt"
    assert costs.step == pytest.approx(8, rel=0.2)
    assert costs.prefill_token == pytest.approx(0.4, rel=0.2)
