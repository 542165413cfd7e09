"""A scheduler under test: every step, and every call in between, is followed by the invariants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

from headway.core import invariants
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.request import Request
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.executor.base import accept_drafts

# The machines that run this are shared: what an example takes says nothing.
settings.register_profile("headway", deadline=None)
settings.load_profile("headway")


class Step(NamedTuple):
    """What one step decided, as it was before its tokens were taken in."""

    output: SchedulerOutput
    #: request id → tokens computed, of all its rows, most urgent first.
    counts: dict[str, int]
    #: Ids of the requests that the step finished.
    finished: list[str]

    @property
    def ids(self) -> list[str]:
        return list(self.counts)

    @property
    def yields(self) -> list[tuple[str, PreemptionMode]]:
        """Who yielded, and how, in order of the decisions."""
        return [(each.request_id, each.mode) for each in self.output.preemptions]


class Lab:
    """A scheduler, its clock, and shorthands for requests in and steps out."""

    def __init__(self, cost_model: CostModel | None = None, **settings: Any) -> None:
        defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "block_size": 4}
        config = SchedulerConfig(**(defaults | settings))
        self.scheduler = PriorityScheduler(config=config, cost_model=cost_model)
        self.now = 0.0
        self.num_steps = 0
        self._num_added = 0
        #: Request id, index of the choice and position → the token there; None: the step's token.
        self.token_at: Callable[[str, int, int], int] | None = None

    def add(
        self,
        request_id: str,
        priority: int = 0,
        num_prompt: int = 4,
        max_tokens: int = 4,
        *,
        prompt: Sequence[int] | None = None,
        **arguments: Any,
    ) -> Request:
        """Add a request; without ``prompt`` its tokens are like nobody else's."""
        self._num_added += 1
        tokens = [1000 * self._num_added + i for i in range(num_prompt)]
        request = Request(request_id, priority, prompt or tokens, max_tokens, **arguments)
        self.scheduler.add_request(request, self.now)
        invariants.check(self.scheduler)
        return request

    def step(self, token: int = 1) -> Step:
        """Schedule, compute, take in; every sequence that is due a token gets ``token``.

        With ``token_at`` it gets the token of its place.
        """
        output = self.scheduler.schedule(self.now)
        invariants.check_output(self.scheduler, output)
        counts: dict[str, int] = {}
        for row in output:
            num_tokens = len(row.token_ids) + len(row.drafts)
            counts[row.request_id] = counts.get(row.request_id, 0) + num_tokens
        sampled = [self.sample(row, token) for row in output]
        finished = self.scheduler.update_from_output(output, sampled, self.now)
        invariants.check(self.scheduler)
        self.num_steps += 1
        return Step(output, counts, [request.request_id for request in finished])

    def sample(self, row: StepRow, token: int = 1) -> tuple[int, ...]:
        """What an executor says of a row: accepted drafts and a new token, or first tokens."""
        position = row.start + len(row.token_ids)

        def draw(index: int, position: int) -> int:
            return (
                token if self.token_at is None else self.token_at(row.request_id, index, position)
            )

        if len(row.seeds) != 1:
            return tuple(draw(index, position) for index in range(len(row.seeds)))
        drawn = (draw(row.index, place) for place in count(position))
        return accept_drafts(drawn, row.drafts)

    def steps(self, number: int) -> list[Step]:
        return [self.step() for _ in range(number)]

    def drain(self, at_most: int = 2000) -> list[Step]:
        """Step until nobody is left, which must be soon, and the pool must be idle then."""
        steps = []
        while self.scheduler.has_unfinished_requests:
            assert len(steps) < at_most, f"unfinished: {self.scheduler.requests}"
            steps.append(self.step())
        self.assert_idle()
        return steps

    def assert_idle(self) -> None:
        statistics = self.scheduler.statistics()
        assert not self.scheduler.requests
        assert not self.scheduler.resident
        assert not self.scheduler.waiting_heap
        assert statistics.blocks.held == 0
        assert statistics.num_swap_blocks_used == 0


@pytest.fixture(scope="session")
def lab() -> type[Lab]:
    """``lab(**settings)`` makes a scheduler under test; stateless, so Hypothesis may share it."""
    return Lab
