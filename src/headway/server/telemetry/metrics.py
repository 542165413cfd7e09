"""What the engine does, as Prometheus metrics; ``docs/metrics.md`` defines each of them.

vLLM's names where it has one, under the prefix ``headway:``. What requests experience is told apart
by their priority, which is what this engine is about, and by tenant if the operator wants it.

Everything comes from values that the engine publishes: after each step, from the thread that steps,
where it may take microseconds only. Scrapes come from another thread and need no lock; see
``headway.server.telemetry.instruments``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric

from headway.core.config import PreemptionMode
from headway.core.errors import QueueFull, QueueTimeout
from headway.core.scheduler_output import Preemption
from headway.core.slo import SLO
from headway.engine.client import EngineClient, StepReport
from headway.engine.outputs import EngineOutput, RequestMetrics
from headway.server.telemetry.definitions import RecordedMetrics, statistics_metrics
from headway.server.telemetry.instruments import Labels
from headway.server.telemetry.labels import BoundedLabels

__all__ = ["MAX_PRIORITY_LABELS", "MAX_TENANT_LABELS", "Metrics"]

#: Priorities, and tenants, that have series of their own.
MAX_PRIORITY_LABELS: Final = 16
MAX_TENANT_LABELS: Final = 16

#: How requests end that were served to their end.
_COMPLETED: Final = frozenset({"stop", "length"})

#: Why requests are turned away, by what they are told.
_REFUSALS: Final[Mapping[type, str]] = {QueueFull: "queue_full", QueueTimeout: "queue_timeout"}

#: The ways in which a request may yield.
_MODES: Final = (
    PreemptionMode.PAUSE,
    PreemptionMode.TAIL,
    PreemptionMode.SWAP,
    PreemptionMode.RECOMPUTE,
)


class _Answering:
    """An unfinished request that has got its first token."""

    __slots__ = ("labels", "num_tokens", "tenant", "token_times")

    def __init__(self, labels: Labels, tenant: str, num_choices: int) -> None:
        self.labels = labels
        self.tenant = tenant
        #: For each choice, the tokens that it has got.
        self.num_tokens = [0] * num_choices
        #: For each choice, when it got the latest token (seconds); None = it has got none.
        self.token_times: list[float | None] = [None] * num_choices


class Metrics:
    """Listens to an engine, and tells Prometheus.

    Args:
        engine: to listen to; it has not served anything yet.
        model_name: the label ``model_name`` of everything.
        priorities: that have a label whatever else comes, as those of the SLOs do.
        tenants: that the label ``tenant`` knows from the start; None = there is no such label.
    """

    def __init__(
        self,
        engine: EngineClient,
        model_name: str,
        priorities: Iterable[int] = (),
        tenants: Iterable[str] | None = None,
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._priorities = BoundedLabels(MAX_PRIORITY_LABELS)
        self._tenants = None if tenants is None else BoundedLabels(MAX_TENANT_LABELS)
        #: Labels of requests that have been seen.
        self._known: set[Labels] = set()
        #: By the engine's ids.
        self._answering: dict[str, _Answering] = {}
        names = ("priority",) if tenants is None else ("priority", "tenant")
        self._recorded = RecordedMetrics(names)
        self._instruments = (
            *statistics_metrics(engine, self._priorities.of),
            *vars(self._recorded).values(),
        )
        slos = engine.description.slos
        priorities = [*(slo.priority for slo in slos), *priorities]
        for priority in priorities:
            self._priorities.add(priority)
        known = [""] if tenants is None else list(tenants)
        if self._tenants is not None:
            for tenant in known:
                self._tenants.of(tenant)
        for tenant in known:
            for priority in priorities:
                self._labels_of(priority, tenant)
            for slo in slos:
                for target, target_ms in (("ttft", slo.ttft_ms), ("tpot", slo.tpot_ms)):
                    if target_ms is not None:
                        for outcome in ("met", "missed"):
                            self._count_outcome(slo, target, outcome, tenant, 0)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        engine.add_listener(self._on_step)

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

    def _on_step(self, report: StepReport, outputs: Sequence[EngineOutput]) -> None:
        for change in report.changes:
            answering = self._answering.get(change.request_id)
            if answering is not None:
                answering.labels = self._labels_of(change.priority, answering.tenant)
        for preemption in report.output.preemptions:
            self._on_preemption(preemption)
        self._on_outputs(outputs, report.execute_end)
        if report.result is not None:
            self._on_execution(report, report.result.swap_ms / 1e3)

    def _on_execution(self, report: StepReport, swap_seconds: float) -> None:
        output, recorded = report.output, self._recorded
        if output.num_swapped_blocks:
            recorded.swapped_blocks.add(("out",), len(output.swap_out))
            recorded.swapped_blocks.add(("in",), len(output.swap_in))
            recorded.swap_time.add((), swap_seconds)
        if not output:
            return
        seconds = report.end - report.start - swap_seconds  # as the cost model counts
        recorded.step_tokens.observe((), output.num_batched_tokens)
        recorded.step_time.observe((), seconds)
        if output.predicted_ms > 0:
            recorded.step_time_ratio.observe((), seconds * 1e3 / output.predicted_ms)
        if report.num_recomputed_tokens:
            share = report.num_recomputed_tokens / output.num_batched_tokens
            recorded.recompute_time.add((), seconds * share)

    def _on_outputs(self, outputs: Sequence[EngineOutput], now: float) -> None:
        recorded = self._recorded
        # (labels, time of the token before) → how many choices got tokens now, and how many
        # tokens. They are noted together: most choices got the one before in the same step, too.
        tally: dict[tuple[Labels, float | None], tuple[int, int]] = {}
        for output in outputs:
            answering = self._answering.get(output.request_id)
            if answering is None and output.metrics is not None:
                answering = self._on_metrics(output.request_id, output.metrics, now)
            num_tokens = len(output.token_ids)
            if num_tokens and answering is not None:
                index = output.index
                key = (answering.labels, answering.token_times[index])
                num_choices, num_before = tally.get(key, (0, 0))
                tally[key] = (num_choices + 1, num_before + num_tokens)
                answering.token_times[index] = now
                answering.num_tokens[index] += num_tokens
            if output.is_last and output.metrics is not None:
                self._on_end(output, output.metrics)
        for (labels, last), (num_choices, num_tokens) in tally.items():
            recorded.generation_tokens.add(labels, num_tokens)
            if last is not None:
                recorded.inter_token_latency.observe(labels, now - last, num_choices)
            if num_tokens > num_choices:  # the others came with the first
                recorded.inter_token_latency.observe(labels, 0.0, num_tokens - num_choices)

    def _on_metrics(
        self, request_id: str, metrics: RequestMetrics, now: float
    ) -> _Answering | None:
        """Note a request that has got its first token in this step, if it has."""
        first = metrics.first_token_time
        if first != now:
            return None
        recorded, labels = self._recorded, self._labels_of(metrics.priority, metrics.tenant)
        begin, num_prompt_tokens = metrics.first_scheduled_time, metrics.num_prompt_tokens
        ttft = _between(metrics.arrival_time, first)
        recorded.ttft.observe(labels, ttft)
        recorded.queue_time.observe(labels, _between(metrics.arrival_time, begin))
        recorded.prefill_time.observe(labels, _between(begin, first))
        idle_ms = self._idle_ttft_ms(metrics)
        if idle_ms > 0:
            recorded.slowdown.observe(labels, ttft * 1e3 / idle_ms)
        recorded.prompt_size.observe(labels, num_prompt_tokens)
        recorded.max_tokens.observe(labels, metrics.max_tokens)
        recorded.prompt_tokens.add(labels, num_prompt_tokens)
        if self._engine.description.enable_prefix_caching:
            recorded.cache_queries.add((), num_prompt_tokens)
            recorded.cache_hits.add((), metrics.num_cached_tokens)
        if metrics.slo is not None:
            self._judge(metrics.slo, "ttft", metrics.slo.ttft_ms, ttft, metrics.tenant)
        answering = _Answering(labels, metrics.tenant, metrics.num_sequences)
        self._answering[request_id] = answering
        return answering

    def _on_preemption(self, preemption: Preemption) -> None:
        labels = self._labels_of(preemption.priority, preemption.tenant)
        labels = (preemption.mode.value, *labels)
        self._recorded.preemptions.add(labels)
        if preemption.mode is not PreemptionMode.PAUSE:
            self._recorded.preempted_tokens.add(labels, preemption.num_tokens)

    # ------------------------------------------------------------------ when a request ends

    def _on_end(self, output: EngineOutput, metrics: RequestMetrics) -> None:
        """Note a request that has ended; its tokens have been noted."""
        recorded, labels = self._recorded, self._labels_of(metrics.priority, metrics.tenant)
        assert output.finish_reason is not None
        recorded.ended.add((output.finish_reason, *labels))
        for phase, seconds in metrics.phase_seconds.items():
            recorded.state_time.add((phase.value, *labels), seconds)
        reason = _REFUSALS.get(type(output.error))
        if reason is not None:
            recorded.refusals.add((reason, *labels))
        if metrics.finish_time is None:  # the engine never took it in
            return
        answering = self._answering.pop(output.request_id, None)
        #: Tokens of the longest choice.
        num_tokens = 0 if answering is None else max(answering.num_tokens)
        if output.finish_reason in _COMPLETED:
            self._on_completion(metrics, labels, num_tokens)
        slo, first, last = metrics.slo, metrics.first_token_time, metrics.last_token_time
        if slo is None:
            return
        if first is None:
            life = metrics.finish_time - metrics.arrival_time
            # A request that leaves before its first token was due has missed no target.
            if output.error is not None or (slo.ttft_ms is not None and life * 1e3 > slo.ttft_ms):
                self._judge(slo, "ttft", slo.ttft_ms, math.inf, metrics.tenant)
        elif last is not None and num_tokens > 1:
            tpot = (last - first) / (num_tokens - 1)
            self._judge(slo, "tpot", slo.tpot_ms, tpot, metrics.tenant)

    def _on_completion(self, metrics: RequestMetrics, labels: Labels, num_tokens: int) -> None:
        recorded, end = self._recorded, metrics.finish_time
        decode_time = _between(metrics.first_token_time, end)
        recorded.e2e_latency.observe(labels, _between(metrics.arrival_time, end))
        recorded.inference_time.observe(labels, _between(metrics.first_scheduled_time, end))
        recorded.decode_time.observe(labels, decode_time)
        recorded.output_size.observe(labels, metrics.num_output_tokens)
        if num_tokens > 1:
            recorded.tpot.observe(labels, decode_time / (num_tokens - 1))

    # ------------------------------------------------------------------ small parts

    def _judge(
        self, slo: SLO, target: str, target_ms: float | None, seconds: float, tenant: str
    ) -> None:
        """Count whether a target was met, if there is one."""
        if target_ms is not None:
            outcome = "met" if seconds * 1e3 <= target_ms else "missed"
            self._count_outcome(slo, target, outcome, tenant)

    def _count_outcome(
        self, slo: SLO, target: str, outcome: str, tenant: str, amount: int = 1
    ) -> None:
        labels: Labels = (str(slo.priority), target, outcome)
        if self._tenants is not None:
            labels = (*labels, self._tenants.of(tenant))
        self._recorded.slo_outcomes.add(labels, amount)

    def _idle_ttft_ms(self, metrics: RequestMetrics) -> float:
        """The time to first token that the cost model expects of an idle engine."""
        costs = self._engine.statistics.coefficients
        cached = metrics.num_cached_tokens
        count = metrics.num_prompt_tokens - cached
        num_steps = -(-count // self._engine.description.max_num_batched_tokens)
        num_logit_rows = metrics.num_sequences if metrics.sampling_params.needs_logits else 0
        return (
            num_steps * costs.step
            + count * costs.prefill_token
            + count * (cached + count / 2) * costs.prefill_context
            + num_logit_rows * costs.logit_row
        )

    def _labels_of(self, priority: int, tenant: str) -> Labels:
        labels: Labels = (self._priorities.of(priority),)
        if self._tenants is not None:
            labels = (*labels, self._tenants.of(tenant))
        if labels not in self._known:
            self._known.add(labels)
            # Rare events have series before they happen: Prometheus counts from the first sample.
            for reason in _REFUSALS.values():
                self._recorded.refusals.add((reason, *labels), 0)
            for mode in _MODES:
                self._recorded.preemptions.add((mode.value, *labels), 0)
        return labels


def _between(start: float | None, end: float | None) -> float:
    """Seconds between two events of which the caller knows that they have happened."""
    assert start is not None and end is not None
    return end - start
