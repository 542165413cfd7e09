"""The plug-in and Headway's own engine decide alike: the same requests, budgets and rules.

Each story is told to both, step by step, until all requests have ended. A step must hold the same
requests with the same number of tokens, and the same requests must lose their blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from bare_model import MAX_MODEL_LEN
from scheduler_harness import BLOCK_SIZE, make_request
from story import Story

from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.policy import AgingPolicy
from headway.core.request import Request
from headway.core.scheduler import PriorityScheduler
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO

COSTS = (10, 1, 1)
#: The plug-in's defaults, as the core has them.
RULES: dict[str, Any] = {"victim": "cheapest", "max_preemptions": 3, "prefill_share": 0.25}


class Arrival(NamedTuple):
    """A request."""

    #: Before which step it arrives.
    step: int
    name: str
    prompt: int
    priority: int
    max_tokens: int = 6


class Tale(NamedTuple):
    """What arrives where."""

    arrivals: tuple[Arrival, ...]
    #: ``HeadwayConfig``'s rules for sharing.
    rules: Mapping[str, Any] = MappingProxyType({})
    slos: tuple[str, ...] = ()
    max_step_ms: float | None = None
    #: ``tau_s`` of the ageing policy; None = by priority.
    tau_s: float | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 128
    num_blocks: int = 500

    @property
    def is_timed(self) -> bool:
        """Whether steps are bounded in time."""
        is_shared = self.rules.get("share", "all") not in ("all", "none")
        return bool(self.slos) or self.max_step_ms is not None or is_shared


class CoreStory:
    """The tale as Headway's own scheduler tells it."""

    def __init__(self, tale: Tale) -> None:
        self.scheduler = PriorityScheduler(
            config=SchedulerConfig(
                max_num_seqs=tale.max_num_seqs,
                max_num_batched_tokens=tale.max_num_batched_tokens,
                num_blocks=tale.num_blocks,
                block_size=BLOCK_SIZE,
                max_model_len=MAX_MODEL_LEN,
                policy="priority" if tale.tau_s is None else AgingPolicy(tale.tau_s),
                preemption_mode=PreemptionMode.RECOMPUTE,  # as vLLM: a victim loses all blocks
                max_step_ms=tale.max_step_ms,
                slos=tuple(SLO.parse(text) for text in tale.slos),
                sharing=SharingRules(**{**RULES, **tale.rules}),
            ),
            cost_model=CostModel(COSTS),
        )

    def add(self, arrival: Arrival) -> None:
        self.scheduler.add_request(
            Request(
                arrival.name,
                arrival.priority,
                "",
                arrival.max_tokens,
                prompt_token_ids=make_request(arrival.name, arrival.prompt).prompt_token_ids,
                arrival_time=float(arrival.step),
            )
        )

    def next(self) -> tuple[dict[str, int], set[str]]:
        """Which requests compute how many tokens in the next step, and which lose their blocks."""
        output = self.scheduler.schedule()
        self.scheduler.update_from_output(output, [(7,) * len(row.seeds) for row in output])
        evicted = {
            preemption.request_id
            for preemption in output.preemptions
            if preemption.mode is PreemptionMode.RECOMPUTE
        }
        return {row.request_id: len(row.token_ids) for row in output}, evicted


def plug_in(tale: Tale, bare_model: Path) -> Story:
    """The tale as the plug-in tells it."""
    headway: dict[str, Any] = {**tale.rules, "slos": list(tale.slos)}
    if tale.max_step_ms is not None:
        headway["max_step_ms"] = tale.max_step_ms
    if tale.tau_s is not None:
        headway |= {"policy": "aging", "tau_s": tale.tau_s}
    return Story(
        bare_model,
        headway=headway,
        costs=COSTS if tale.is_timed else None,
        max_num_seqs=tale.max_num_seqs,
        max_num_batched_tokens=tale.max_num_batched_tokens,
        num_blocks=tale.num_blocks,
    )


def batch(number: int, step: int = 0, prompt: int = 10, **options: Any) -> tuple[Arrival, ...]:
    """Background requests that arrive at once."""
    return tuple(
        Arrival(step, f"b{index}", prompt, 5, **{"max_tokens": 12, **options})
        for index in range(number)
    )


URGENT = Arrival(3, "urgent", 20, 0)

TALES = {
    "a slot": Tale((*batch(2), URGENT), max_num_seqs=2),
    "three classes for three slots": Tale(
        (*batch(4), Arrival(2, "middle", 30, 3), URGENT, Arrival(4, "late", 10, 9)),
        max_num_seqs=3,
    ),
    "equals wait for each other": Tale((*batch(2), *batch(5, 2)[2:]), max_num_seqs=2),
    "tokens go to the urgent prompt": Tale(
        (Arrival(0, "long", 600, 5), Arrival(2, "urgent", 100, 0)), max_num_batched_tokens=64
    ),
    "a part of the tokens for other prompts": Tale(
        (*batch(2), URGENT, Arrival(5, "long", 300, 5)), max_num_batched_tokens=64
    ),
    "no bound for other prompts": Tale(
        (*batch(2), URGENT, Arrival(5, "long", 300, 5)),
        {"prefill_share": 1.0},
        max_num_batched_tokens=64,
    ),
    "nothing rides along": Tale((*batch(3), URGENT), {"share": "none"}),
    "riders take turns": Tale((*batch(6), URGENT), {"share": "13ms"}),
    "ageing": Tale(
        (*batch(2, max_tokens=30), *(Arrival(step, f"u{step}", 10, 0) for step in range(2, 12))),
        tau_s=1.0,
        max_num_seqs=2,
    ),
    "no step takes longer": Tale(
        (Arrival(0, "long", 200, 5), *batch(3, 2), URGENT), max_step_ms=30
    ),
    "equals take turns": Tale(batch(6), max_step_ms=13),
    "a tpot target": Tale(
        (Arrival(0, "urgent", 20, 0, 20), Arrival(2, "long", 200, 5)), slos=("0:tpot=30ms",)
    ),
    "a ttft target": Tale(
        (*batch(2), Arrival(1, "long", 200, 5), Arrival(3, "urgent", 60, 0)),
        slos=("0:ttft=100ms",),
    ),
    "two classes": Tale(
        (*batch(2), Arrival(1, "long", 200, 5), Arrival(3, "urgent", 60, 0)),
        slos=("0:ttft=100ms,tpot=25ms", "5:ttft=1s,tpot=60ms"),
    ),
    "the cheapest victim": Tale(
        (
            Arrival(0, "big", 100, 5, 12),
            Arrival(1, "small", 20, 5, 12),
            Arrival(3, "urgent", 40, 0),
        ),
        num_blocks=11,
    ),
    "the last-ranked victim": Tale(
        (
            Arrival(0, "small", 20, 5, 12),
            Arrival(1, "big", 100, 5, 12),
            Arrival(3, "urgent", 40, 0),
        ),
        {"victim": "last"},
        num_blocks=11,
    ),
    "bounded preemptions": Tale(
        (
            Arrival(0, "often", 40, 5, 8),
            *(Arrival(step, f"u{step}", 30, 0, 3) for step in (1, 6, 11)),
        ),
        {"max_preemptions": 1},
        num_blocks=4,
    ),
}


@pytest.mark.parametrize("name", list(TALES))
def test_a_step_holds_the_same_requests(name: str, bare_model: Path) -> None:
    tale = TALES[name]
    core, story = CoreStory(tale), plug_in(tale, bare_model)
    step = 0
    while step <= tale.arrivals[-1].step or core.scheduler.has_unfinished_requests:
        for arrival in tale.arrivals:
            if arrival.step == step:
                core.add(arrival)
                story.add(
                    arrival.name,
                    arrival.prompt,
                    priority=arrival.priority,
                    max_tokens=arrival.max_tokens,
                    arrival_time=float(arrival.step),
                )
        if core.scheduler.has_unfinished_requests:
            assert story.next() == core.next(), f"step {step}"
        step += 1
    story.end()
