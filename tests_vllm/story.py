"""A short story of a few requests, told step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_loop import EngineLoop
from scheduler_harness import make_scheduler
from step_checks import StepCheck
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from headway.vllm import HeadwaySyncScheduler

BACKGROUND, URGENT = 5, 0


class Story(EngineLoop):
    """A loop that remembers what it has scheduled; every step is checked."""

    def __init__(
        self,
        model: Path,
        cls: type[Scheduler] = HeadwaySyncScheduler,
        *,
        costs: Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(make_scheduler(cls, model, **settings), costs=costs)
        self.computed: Counter[str] = Counter()

    def background(self, *names: str, prompt: int = 10, **options: Any) -> None:
        """Requests that are not urgent arrive, and get their first token."""
        for name in names:
            self.add(name, prompt, priority=BACKGROUND, **{"max_tokens": 50, **options})
        while not all(self.answers[name].turns[0] for name in names):
            self.step()

    def urgent(self, name: str = "urgent", prompt: int = 10, **options: Any) -> None:
        """One that is arrives."""
        self.add(name, prompt, **{"priority": URGENT, "max_tokens": 5, **options})

    def schedule(self) -> SchedulerOutput:
        check = StepCheck(self.scheduler)
        output = super().schedule()
        check(output)
        self.computed.update(output.num_scheduled_tokens)
        return output

    def next(self) -> tuple[dict[str, int], set[str]]:
        """Who computes how many tokens in the next step, and who is evicted."""
        output = self.step()
        assert output is not None
        return output.num_scheduled_tokens, set(output.preempted_req_ids or ())

    def end(self) -> None:
        """All get their whole answers."""
        self.run()
        self.check_done()
