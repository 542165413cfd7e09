"""The demo's load, served by a simulated executor on a clock of its own."""

from __future__ import annotations

import pytest

from headway.core.config import SchedulerConfig
from headway.core.scheduler import PriorityScheduler
from headway.demo.load import MAX_MODEL_LEN, NUM_SLOTS, Load, make_load
from headway.demo.run import Run, measure_speed, policy_engine
from headway.engine.engine import Engine
from headway.executor.simulated import SimulatedExecutor, VirtualClock

BLOCK_SIZE, NUM_BLOCKS, NUM_SWAP_BLOCKS = 32, 256, 500
#: ms a step, a prefill token, a decoding sequence, a context token: two good cores.
COST = (8.0, 0.4, 1.0, 0.002)


class Simulation:
    """An engine as the demo's command builds it, without a model."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        executor = SimulatedExecutor(
            self.clock,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_swap_blocks=NUM_SWAP_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            cost=COST,
        )
        config = SchedulerConfig(
            max_num_seqs=NUM_SLOTS,
            max_num_batched_tokens=256,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_swap_blocks=NUM_SWAP_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
        )
        self.engine = Engine(executor, PriorityScheduler(config=config), clock=self.clock)
        self.speed = measure_speed(self.engine, encode("What is a queue?"))
        self.load = self.make_load()

    def make_load(self, speed: float | None = None, seed: int = 0) -> Load:
        return make_load(encode, speed or self.speed, BLOCK_SIZE, NUM_BLOCKS, seed)

    def run(self, policy: str, load: Load | None = None, limit: float = 600.0) -> Run:
        """A run that has not begun."""
        load = load or self.load
        engine = policy_engine(self.engine, policy, load.num_blocks)
        return Run(engine, load, self.clock.advance, limit)


def encode(prompt: str) -> list[int]:
    """About as many tokens as a chat template would make of it."""
    return [1 + ord(character) for character in prompt[::5]] + [0] * 25


@pytest.fixture
def simulation() -> Simulation:
    return Simulation()


@pytest.fixture(scope="session")
def runs() -> list[Run]:
    """Both policies, served."""
    simulation = Simulation()
    both = [simulation.run(policy) for policy in ("priority", "fcfs")]
    for run in both:
        run.serve()
    return both
