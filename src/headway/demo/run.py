"""One run of the demo's load under one policy, and what there is to see while it goes on."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from headway.core.config import PreemptionMode
from headway.core.cost_model import CostModel
from headway.core.request import Request, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import Preemption
from headway.demo.load import NUM_SLOTS, URGENT_PRIORITY, Load
from headway.demo.record import RequestRecord
from headway.engine.client import StepReport
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput
from headway.engine.timeline import Segment, TimelineRecorder

__all__ = ["Run", "measure_speed", "policy_engine"]

_WARM_UP_TOKENS = 40
_WARM_UP_SECONDS = 4.0


class Run:
    """Serves a load on an engine of its own; read it at any time, from the same thread.

    Args:
        engine: fresh, with the policy under test.
        load: what arrives when.
        wait: sleeps for some seconds when there is nothing to do yet.
        limit: seconds after which what is unfinished is given up.
    """

    def __init__(
        self,
        engine: Engine,
        load: Load,
        wait: Callable[[float], None] = time.sleep,
        limit: float = math.inf,
    ) -> None:
        self.engine = engine
        self.load = load
        self.policy: str = engine.description.scheduling_policy
        #: Those that have arrived, by id, in order of arrival.
        self.records: dict[str, RequestRecord] = {}
        #: When requests had to yield: (seconds on the engine's clock, which one and how).
        self.preemptions: list[tuple[float, Preemption]] = []
        self.num_output_tokens = 0
        #: Seconds of the steps that only decoded, and with (almost) all slots: much the same
        #: under every policy, unless the machine had something else to do.
        self.full_step_seconds: list[float] = []
        #: Whether the time limit cut it off.
        self.is_cut_off = False
        self.start = engine.clock()
        self.end: float | None = None
        self._wait = wait
        self._limit = limit
        self._timelines = TimelineRecorder()
        engine.listeners.append(self._listen)

    @property
    def elapsed(self) -> float:
        """Seconds since the start, or from start to end."""
        return (self.engine.clock() if self.end is None else self.end) - self.start

    @property
    def requests(self) -> list[RequestRecord]:
        """All that have arrived, in order of arrival."""
        return list(self.records.values())

    @property
    def finished(self) -> list[RequestRecord]:
        """The requests that got all they asked for."""
        return [record for record in self.records.values() if record.is_served]

    @property
    def num_preemptions(self) -> Counter[PreemptionMode]:
        """How often requests yielded, by how."""
        return Counter(preemption.mode for _, preemption in self.preemptions)

    def segments(self, record: RequestRecord, now: float | None = None) -> list[Segment]:
        """The request's life; see ``TimelineRecorder``."""
        return self._timelines.timeline(
            record.request_id, record.arrival_time, record.first_token_time, now
        )

    def serve(self) -> None:
        """Serve all of the load, or as much of it as the time limit allows.

        Urgent requests stop coming when the batch work is done: they would find no competition.
        """
        pending = list(reversed(self.load.arrivals))
        self.start = self.engine.clock()
        while pending or self.engine.has_work:
            elapsed = self.elapsed
            if elapsed > self._limit:
                self.is_cut_off = True
                self.engine.abort_all()
                break
            while pending and pending[-1].time <= elapsed:
                arrival = pending.pop()
                record = RequestRecord(arrival, self.start + arrival.time)
                self.records[record.request_id] = record
                self.engine.submit(arrival.request(self.start))
            if self.engine.has_work:
                self.engine.step()
            elif all(arrival.priority == URGENT_PRIORITY for arrival in pending):
                break
            else:
                self._wait(pending[-1].time - elapsed)
        self.end = self.engine.clock()
        self.engine.listeners.remove(self._listen)

    def _listen(self, step: StepReport, outputs: Sequence[EngineOutput]) -> None:
        if step.output.num_batched_tokens == len(step.output) >= NUM_SLOTS - 2:
            self.full_step_seconds.append(step.end - step.start)
        for preemption in step.output.preemptions:
            self.preemptions.append((step.start, preemption))
        self._timelines.record(step.changes)
        for change in step.changes:
            self.records[change.request_id].status = change.status
        for output in outputs:
            self.records[output.request_id].extend(output)
            self.num_output_tokens += len(output.token_ids)


def policy_engine(engine: Engine, policy: str, num_blocks: int) -> Engine:
    """A fresh engine on the same executor: ``policy``, and a pool of ``num_blocks``."""
    config = replace(engine.scheduler.config, policy=policy, num_blocks=num_blocks)
    # What has been learned of the machine's speed stays true under any policy.
    cost_model = CostModel(
        engine.scheduler.cost_model.coefficients, engine.scheduler.cost_model.swap_ms_per_block
    )
    scheduler = PriorityScheduler(config=config, cost_model=cost_model)
    return Engine(engine.executor, scheduler, engine.tokenizer, clock=engine.clock)


def measure_speed(engine: Engine, prompt_token_ids: Sequence[int]) -> float:
    """Tokens a second that the engine decodes with all slots in use; takes about a second."""
    num_tokens, seconds = 0, 0.0

    def listen(step: StepReport, _: Sequence[EngineOutput]) -> None:
        nonlocal num_tokens, seconds
        if step.output.num_batched_tokens == len(step.output) == NUM_SLOTS:
            num_tokens += NUM_SLOTS
            seconds += step.end - step.start

    params = SamplingParams(max_tokens=_WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
    engine.listeners.append(listen)
    for number in range(NUM_SLOTS):
        request_id = f"warm-up-{number}"
        engine.submit(
            Request(request_id, prompt_token_ids=prompt_token_ids, sampling_params=params)
        )
    start = engine.clock()
    while engine.has_work:
        engine.step()
        if engine.clock() - start > _WARM_UP_SECONDS and num_tokens:
            engine.abort_all()
    engine.listeners.remove(listen)
    return num_tokens / seconds
