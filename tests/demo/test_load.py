"""What the demo serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from headway.demo.load import (
    BATCH_PRIORITY,
    NUM_BATCH,
    NUM_SLOTS,
    URGENT_PRIORITY,
    read_prompts,
)

if TYPE_CHECKING:
    from conftest import Simulation


def test_there_are_enough_prompts_and_all_differ() -> None:
    prompts = read_prompts()
    assert len(prompts["batch"]) >= NUM_BATCH
    everything = prompts["batch"] + prompts["urgent"]
    assert len(set(everything)) == len(everything) >= 30
    assert all(prompt == prompt.strip() and len(prompt) > 10 for prompt in everything)


def test_the_same_seed_gives_the_same_load(simulation: Simulation) -> None:
    assert simulation.make_load(300.0) == simulation.make_load(300.0)
    assert simulation.make_load(300.0) != simulation.make_load(300.0, seed=1)


@pytest.mark.parametrize("speed", [5.0, 50.0, 400.0, 3000.0])
def test_it_can_be_served_at_any_speed(simulation: Simulation, speed: float) -> None:
    load = simulation.make_load(speed)
    times = [arrival.time for arrival in load.arrivals]
    assert times == sorted(times)
    batch = [arrival for arrival in load.arrivals if arrival.priority == BATCH_PRIORITY]
    urgent = [arrival for arrival in load.arrivals if arrival.priority == URGENT_PRIORITY]
    assert len(batch) == NUM_BATCH
    assert urgent
    assert max(arrival.time for arrival in urgent) < load.seconds
    blocks = [-(-(len(arrival.token_ids) + arrival.max_tokens) // 32) for arrival in batch]
    assert max(blocks) <= load.num_blocks <= 256
    assert load.num_blocks < sum(sorted(blocks)[-NUM_SLOTS:]), "no request would ever have to yield"


def test_a_faster_machine_gets_longer_work(simulation: Simulation) -> None:
    lengths = [
        sum(arrival.max_tokens for arrival in simulation.make_load(speed).arrivals)
        for speed in (60.0, 200.0, 400.0)
    ]
    assert lengths == sorted(set(lengths))
