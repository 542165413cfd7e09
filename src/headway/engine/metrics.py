"""What a load felt like: latencies and costs of finished requests, by class.

Definitions, for a request that arrives at a, whose first token is ready at f and last at e:
TTFT = f − a; end-to-end latency = e − a; TPOT = (e − f) / (tokens − 1). A class is the set of
requests of one priority. Percentiles interpolate linearly between the order statistics
(Hyndman and Fan's type 7, numpy's default).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headway.engine.outputs import RequestMetrics

__all__ = ["ClassSummary", "percentile", "summarize"]


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """Finished requests of one class; times in seconds, None where there is nothing to time.

    Attributes:
        priority: of the class.
        num_requests: finished ones that generated something.
        ttft_p50, ttft_p99, latency_mean, latency_p50, latency_p99, tpot_mean: see the module.
        num_output_tokens: generated, in all.
        num_pauses: times one of them sat out while it held its blocks.
        num_preemptions: times one of them lost blocks.
        num_recomputed_tokens: computed again because of that.
    """

    priority: int
    num_requests: int
    ttft_p50: float
    ttft_p99: float
    latency_mean: float
    latency_p50: float
    latency_p99: float
    tpot_mean: float | None
    num_output_tokens: int
    num_pauses: int
    num_preemptions: int
    num_recomputed_tokens: int


def summarize(requests: Iterable[RequestMetrics]) -> list[ClassSummary]:
    """One summary per priority, most urgent first. Requests without a token are left out."""
    by_priority: dict[int, list[RequestMetrics]] = {}
    for request in requests:
        if request.finish_time is not None and request.first_token_time is not None:
            by_priority.setdefault(request.priority, []).append(request)
    return [_summary(priority, by_priority[priority]) for priority in sorted(by_priority)]


def percentile(values: Sequence[float], rank: float) -> float:
    """The ``rank``-th percentile (0 … 100) of at least one value. O(n log n)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * rank / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _summary(priority: int, requests: Sequence[RequestMetrics]) -> ClassSummary:
    ttfts = [request.ttft for request in requests if request.ttft is not None]
    latencies = [request.latency for request in requests if request.latency is not None]
    tpots = [
        (request.finish_time - request.first_token_time) / (request.num_output_tokens - 1)
        for request in requests
        if request.num_output_tokens > 1
        and request.finish_time is not None
        and request.first_token_time is not None
    ]
    return ClassSummary(
        priority=priority,
        num_requests=len(requests),
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        latency_mean=sum(latencies) / len(latencies),
        latency_p50=percentile(latencies, 50),
        latency_p99=percentile(latencies, 99),
        tpot_mean=sum(tpots) / len(tpots) if tpots else None,
        num_output_tokens=sum(request.num_output_tokens for request in requests),
        num_pauses=sum(request.num_pauses for request in requests),
        num_preemptions=sum(request.num_preemptions for request in requests),
        num_recomputed_tokens=sum(request.num_recomputed_tokens for request in requests),
    )
