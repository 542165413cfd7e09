"""Targets of two classes: a loose one for batch work costs the urgent class nothing."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core.config import SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.request import Request
from headway.core.scheduler import PriorityScheduler
from headway.core.slo import HEADROOM, SLO, TTFT_SHARE
from headway.executor.simulated import SMALL_CPU_COST, SimulatedExecutor, VirtualClock

if TYPE_CHECKING:
    from tests.core.conftest import Lab

URGENT = SLO(0, ttft_ms=100.0)
BATCH = SLO(10, ttft_ms=60_000.0)
#: ms a step, a prefill token, a decoding sequence and a context token.
COSTS = (2.0, 0.5, 1.0, 0.01)


@pytest.mark.parametrize("max_step_ms", [None, 20.0])
def test_a_prompt_of_the_loose_class_stays_within_the_bound_of_the_tight_one(
    lab: type[Lab], max_step_ms: float | None
) -> None:
    """An urgent arrival would have to wait for that step."""
    promised = lab(
        cost_model=CostModel(COSTS),
        slos=(URGENT, BATCH),
        max_step_ms=max_step_ms,
        max_num_batched_tokens=2048,
        num_blocks=1000,
        max_num_seqs=8,
    )
    for i in range(6):
        promised.add(f"batch-{i}", 10, num_prompt=300, max_tokens=4)
    bound = min(TTFT_SHARE * 100.0, max_step_ms or 1e9)
    for step in promised.drain():
        assert step.output.predicted_ms <= bound + 1e-9
        assert step.counts


def test_the_urgent_class_may_use_half_of_its_own_target(lab: type[Lab]) -> None:
    promised = lab(
        cost_model=CostModel(COSTS),
        slos=(URGENT, BATCH),
        max_num_batched_tokens=2048,
        num_blocks=500,
    )
    promised.add("urgent", 0, num_prompt=90, max_tokens=2)
    step = promised.step()
    assert step.counts == {"urgent": 90}
    assert TTFT_SHARE * 100.0 < step.output.predicted_ms <= 50.0


def test_the_longest_step_holds_for_every_class(lab: type[Lab]) -> None:
    promised = lab(
        cost_model=CostModel(COSTS),
        slos=(URGENT, BATCH),
        max_step_ms=20.0,
        max_num_batched_tokens=2048,
        num_blocks=500,
    )
    promised.add("urgent", 0, num_prompt=90, max_tokens=2)
    for step in promised.drain():
        assert step.output.predicted_ms <= 20.0 + 1e-9


@settings(max_examples=60)
@given(
    load=st.lists(
        st.tuples(st.sampled_from([0, 5, 10, 20]), st.integers(1, 120), st.integers(1, 5)),
        min_size=1,
        max_size=9,
    ),
    ttfts=st.tuples(st.floats(50.0, 100.0), st.floats(50.0, 1e5), st.floats(50.0, 1e5)),
    max_step_ms=st.sampled_from([None, 15.0]),
)
def test_no_step_is_longer_than_its_most_urgent_class_allows(
    lab: type[Lab],
    load: list[tuple[int, int, int]],
    ttfts: tuple[float, float, float],
    max_step_ms: float | None,
) -> None:
    """Half of its own target; and its part of the targets of the classes above, present or not."""
    model = CostModel(COSTS)
    slos = tuple(SLO(10 * i, ttft_ms=ttft) for i, ttft in enumerate(ttfts))
    promised = lab(
        cost_model=model,
        slos=slos,
        max_step_ms=max_step_ms,
        max_num_seqs=6,
        max_num_batched_tokens=512,
        num_blocks=400,
    )
    asked = {}
    for i, (priority, num_prompt, max_tokens) in enumerate(load):
        asked[f"r{i}"] = priority
        promised.add(f"r{i}", priority, num_prompt, max_tokens)
    limit = min(TTFT_SHARE * min(ttfts), max_step_ms or 1e9)
    for step in promised.drain():
        most_urgent = -(-min(asked[name] for name in step.ids) // 10)
        above = min(ttfts[:most_urgent], default=1e9)
        allowed = max(limit, min(ttfts[most_urgent] / 2, TTFT_SHARE * above, max_step_ms or 1e9))
        assert step.output.predicted_ms <= allowed + 1e-6


def urgent_ttfts(slos: tuple[SLO, ...], max_num_batched_tokens: int) -> list[float]:
    """TTFTs (s) of 50 urgent requests, one every 0.4 s, over a flood of batch prompts."""
    clock = VirtualClock()
    executor = SimulatedExecutor(clock, num_blocks=2000, block_size=16, max_model_len=8192)
    config = SchedulerConfig(
        max_num_seqs=16,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=executor.num_blocks,
        block_size=executor.block_size,
        slos=slos,
    )
    scheduler = PriorityScheduler(config=config, cost_model=CostModel(SMALL_CPU_COST))
    arrivals = [0.2 + 0.4 * i for i in range(50)]
    urgent: list[Request] = []
    num_batch = 0
    while len(urgent) < len(arrivals) or not all(each.first_token_time for each in urgent):
        while len(urgent) < len(arrivals) and arrivals[len(urgent)] <= clock():
            number = len(urgent)
            prompt = [number + 1] * 24
            arrival_time = arrivals[number]
            request = Request(f"u{number}", 0, prompt, 16, arrival_time=arrival_time)
            urgent.append(request)
            scheduler.add_request(request, clock())
        while scheduler.table.num_queued < 4:
            num_batch += 1
            prompt = [10_000 + num_batch] * 1500
            scheduler.add_request(Request(f"b{num_batch}", 10, prompt, 40), clock())
        output = scheduler.schedule(clock())
        tokens = executor.execute(output).tokens
        scheduler.update_from_output(output, tokens, clock())
    return [each.first_token_time - each.arrival for each in urgent if each.first_token_time]


@pytest.mark.parametrize("max_num_batched_tokens", [256, 2048])
def test_a_loose_target_for_the_batch_class_does_not_delay_the_urgent_one(
    max_num_batched_tokens: int,
) -> None:
    with_one = urgent_ttfts((URGENT,), max_num_batched_tokens)
    with_two = urgent_ttfts((URGENT, BATCH), max_num_batched_tokens)
    assert len(with_one) == len(with_two) == 50
    for figure in (statistics.median, max):
        assert figure(with_two) == pytest.approx(figure(with_one), rel=0.1)
    assert max(with_two) <= 0.1  # the target itself


def test_time_per_token_of_the_batch_class_does_not_stretch_urgent_steps(lab: type[Lab]) -> None:
    promised = lab(
        cost_model=CostModel(COSTS),
        slos=(SLO(0, tpot_ms=6.0 / HEADROOM), SLO(10, tpot_ms=500.0)),
        max_num_seqs=20,
    )
    for i in range(12):
        promised.add(f"batch-{i}", 10, num_prompt=1, max_tokens=40)
    promised.steps(14)
    promised.add("urgent", 0, num_prompt=1, max_tokens=6)
    for step in promised.steps(6)[1:]:
        assert step.ids[0] == "urgent"
        assert step.output.predicted_ms <= 6.0 + 1e-6
