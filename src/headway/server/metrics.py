"""What the engine does, as Prometheus metrics; ``docs/metrics.md`` defines each of them.

vLLM's names where it has one, under the prefix ``headway:``. What requests experience is told apart
by their priority, which is what this engine is about.

Everything is gathered by the thread that steps: after each step, where it may take microseconds
only, and when a request ends. Scrapes come from another thread and need no lock; see
``headway.server.instruments``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric

from headway.core.config import PreemptionMode
from headway.core.cost_model import StepFeatures
from headway.core.errors import QueueFull, QueueTimeout
from headway.core.request import Request, RequestStatus
from headway.core.scheduler_output import SchedulerOutput
from headway.core.slo import SLO
from headway.engine.engine import Engine, Step
from headway.engine.outputs import EngineOutput
from headway.engine.timeline import timeline
from headway.server.instruments import Labels
from headway.server.metric_definitions import Observed, readings

__all__ = ["MAX_PRIORITY_LABELS", "OTHER_PRIORITY", "Metrics"]

#: Priorities are the clients' to choose, and each makes time series of its own: so many get a
#: label, first come, first served.
MAX_PRIORITY_LABELS: Final = 16

#: The label of all others.
OTHER_PRIORITY: Final = "other"

#: How requests end that were served to their end.
_COMPLETED: Final = frozenset(
    {RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED}
)

#: Why requests are turned away, by what they are told.
_REFUSALS: Final[Mapping[type, str]] = {QueueFull: "queue_full", QueueTimeout: "queue_timeout"}

#: The ways in which a request may yield.
_MODES: Final = (
    PreemptionMode.PAUSE,
    PreemptionMode.TAIL,
    PreemptionMode.SWAP,
    PreemptionMode.RECOMPUTE,
)


class Metrics:
    """Observes an engine, and tells Prometheus.

    Args:
        engine: to observe, from now on.
        model_name: the label ``model_name`` of everything.
        priorities: that get a label whatever else comes, as those of the SLOs do.
    """

    def __init__(self, engine: Engine, model_name: str, priorities: Iterable[int] = ()) -> None:
        self._engine = engine
        self._model_name = model_name
        #: Priority → its label, alone, as most instruments have it.
        self._labels: dict[int, Labels] = {}
        #: When unfinished requests got their latest token (seconds).
        self._token_times: dict[Request, float] = {}
        #: Unfinished requests that have ever lost blocks.
        self._preempted: set[Request] = set()
        self._observed = Observed()
        self._instruments = (
            *readings(engine, self._preempted),
            *vars(self._observed).values(),
        )
        for slo in engine.scheduler.config.slos:
            self._add_label(slo.priority)
            for target, target_ms in (("ttft", slo.ttft_ms), ("tpot", slo.tpot_ms)):
                if target_ms is not None:
                    for outcome in ("met", "missed"):
                        self._observed.slo_outcomes.add((str(slo.priority), target, outcome), 0)
        for priority in priorities:
            self._add_label(priority)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        engine.observers.append(self._on_step)
        engine.request_observers.append(self._on_end)

    def render(self) -> tuple[bytes, str]:
        """What a scrape is told, and its content type.

        It is Prometheus's text format, whatever a scraper likes best: in OpenMetrics,
        ``prometheus_client`` replaces the colons of names in some lines and not in others.
        """
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Every metric as it stands; makes this a collector to ``prometheus_client``."""
        constant = {"model_name": self._model_name}
        return (instrument.family(constant) for instrument in self._instruments)

    # ------------------------------------------------------------------ after a step

    def _on_step(self, step: Step) -> None:
        output, observed = step.output, self._observed
        if output.preemptions:
            self._on_preemptions(output)
        num_recomputed = self._on_tokens(step)
        swap_seconds = step.result.swap_ms / 1e3
        if output.num_swapped_blocks:
            observed.swapped_blocks.add(("out",), len(output.swap_out))
            observed.swapped_blocks.add(("in",), len(output.swap_in))
            observed.swap_time.add((), swap_seconds)
        if not output.requests:
            return
        seconds = step.end - step.start - swap_seconds  # as the cost model counts
        observed.step_tokens.observe((), output.num_batched_tokens)
        observed.step_time.observe((), seconds)
        if output.predicted_ms > 0:
            observed.step_time_ratio.observe((), seconds * 1e3 / output.predicted_ms)
        if num_recomputed:
            share = num_recomputed / output.num_batched_tokens
            observed.recompute_time.add((), seconds * share)

    def _on_tokens(self, step: Step) -> int:
        """Note who got a token; returns how many tokens were computed again."""
        output, now = step.output, step.execute_end
        observed, token_times = self._observed, self._token_times
        num_recomputed = 0
        # (priority, time of the token before) → how many got one now. They are noted together:
        # most got the one before in the same step, too.
        tally: dict[tuple[int, float | None], int] = {}
        for request, count, token_id in zip(
            output.requests,
            output.num_scheduled_tokens,
            step.result.sampled_token_ids,
            strict=True,
        ):
            if token_id is None and request.finish_time is not None:
                continue  # the executor could not compute it
            ahead = request.peak_computed_tokens - request.num_computed_tokens + count
            if ahead > 0:
                again = min(count, ahead)
                num_recomputed += again
                observed.recomputed_tokens.add(self._labels_of(request.priority), again)
            if token_id is None:
                continue
            last = token_times.get(request)
            if last is None and request.num_output_tokens == 1:
                self._on_first_token(request)
            token_times[request] = now
            key = (request.priority, last)
            tally[key] = tally.get(key, 0) + 1
        for (priority, last), num_requests in tally.items():
            labels = self._labels_of(priority)
            observed.generation_tokens.add(labels, num_requests)
            if last is not None:
                observed.inter_token_latency.observe(labels, now - last, num_requests)
        return num_recomputed

    def _on_first_token(self, request: Request) -> None:
        observed, labels = self._observed, self._labels_of(request.priority)
        begin, first = request.first_scheduled_time, request.first_token_time
        ttft = _between(request.arrival_time, first)
        observed.ttft.observe(labels, ttft)
        observed.queue_time.observe(labels, _between(request.arrival_time, begin))
        observed.prefill_time.observe(labels, _between(begin, first))
        idle_ms = self._idle_ttft_ms(request)
        if idle_ms > 0:
            observed.slowdown.observe(labels, ttft * 1e3 / idle_ms)
        observed.prompt_size.observe(labels, request.num_prompt_tokens)
        observed.max_tokens.observe(labels, request.max_tokens)
        observed.prompt_tokens.add(labels, request.num_prompt_tokens)
        if self._engine.scheduler.config.enable_prefix_caching:
            observed.cache_queries.add((), request.num_prompt_tokens)
            observed.cache_hits.add((), request.num_cached_tokens)
        if request.slo is not None:
            self._judge(request.slo, "ttft", request.slo.ttft_ms, ttft)

    def _on_preemptions(self, output: SchedulerOutput) -> None:
        for preemption in output.preemptions:
            # It has not ended in the step in which there was no room for it.
            request = self._engine.scheduler.requests[preemption.request_id]
            labels = (preemption.mode.value, *self._labels_of(request.priority))
            self._observed.preemptions.add(labels)
            if preemption.mode is not PreemptionMode.PAUSE:
                self._observed.preempted_tokens.add(labels, preemption.num_tokens)
                self._preempted.add(request)

    # ------------------------------------------------------------------ when a request ends

    def _on_end(self, request: Request, output: EngineOutput) -> None:
        """Note an ended request; the step that may have ended it has been noted."""
        observed, labels = self._observed, self._labels_of(request.priority)
        assert output.finish_reason is not None
        observed.ended.add((output.finish_reason, *labels))
        for phase, start, end in timeline(request):
            observed.state_time.add((phase.value, *labels), end - start)
        reason = _REFUSALS.get(type(output.error))
        if reason is not None:
            observed.refusals.add((reason, *labels))
        if request.status in _COMPLETED:
            self._on_completion(request, labels)
        self._preempted.discard(request)
        last_token_time = self._token_times.pop(request, None)
        slo, first = request.slo, request.first_token_time
        if slo is None:
            return
        if first is None:
            life = _between(request.arrival_time, request.finish_time)
            # Who leaves before a token was due has been promised nothing.
            if output.error is not None or (slo.ttft_ms is not None and life * 1e3 > slo.ttft_ms):
                self._judge(slo, "ttft", slo.ttft_ms, math.inf)
        elif last_token_time is not None and request.num_output_tokens > 1:
            tpot = (last_token_time - first) / (request.num_output_tokens - 1)
            self._judge(slo, "tpot", slo.tpot_ms, tpot)

    def _on_completion(self, request: Request, labels: Labels) -> None:
        observed, last = self._observed, request.finish_time
        decode_time = _between(request.first_token_time, last)
        observed.e2e_latency.observe(labels, _between(request.arrival_time, last))
        observed.inference_time.observe(labels, _between(request.first_scheduled_time, last))
        observed.decode_time.observe(labels, decode_time)
        observed.output_size.observe(labels, request.num_output_tokens)
        if request.num_output_tokens > 1:
            observed.tpot.observe(labels, decode_time / (request.num_output_tokens - 1))

    # ------------------------------------------------------------------ small parts

    def _judge(self, slo: SLO, target: str, target_ms: float | None, seconds: float) -> None:
        """Count whether a target was met, if there is one."""
        if target_ms is not None:
            outcome = "met" if seconds * 1e3 <= target_ms else "missed"
            self._observed.slo_outcomes.add((str(slo.priority), target, outcome))

    def _idle_ttft_ms(self, request: Request) -> float:
        """The time to first token that the cost model expects of an idle engine."""
        scheduler = self._engine.scheduler
        cached = request.num_cached_tokens
        count = request.num_prompt_tokens - cached
        num_steps = -(-count // scheduler.config.max_num_batched_tokens)
        features = StepFeatures(count, 0, 0, count * (cached + count / 2))
        one_step_ms = scheduler.cost_model.predict_ms(features)
        return one_step_ms + (num_steps - 1) * scheduler.cost_model.coefficients.step

    def _labels_of(self, priority: int) -> Labels:
        labels = self._labels.get(priority)
        if labels is not None:
            return labels
        if len(self._labels) < MAX_PRIORITY_LABELS:
            return self._add_label(priority)
        return (OTHER_PRIORITY,)

    def _add_label(self, priority: int) -> Labels:
        labels = self._labels[priority] = (str(priority),)
        # What is rare must be known before it happens: Prometheus counts from the first sample on.
        for reason in _REFUSALS.values():
            self._observed.refusals.add((reason, *labels), 0)
        for mode in _MODES:
            self._observed.preemptions.add((mode.value, *labels), 0)
        return labels


def _between(start: float | None, end: float | None) -> float:
    """Seconds between two events of which the caller knows that they have happened."""
    assert start is not None and end is not None
    return end - start
