"""Metrics against what happened: everything that is scraped is counted here once more, afresh."""

from __future__ import annotations

import gc
import json
import re
import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headway.core.errors import InternalError, QueueFull
from headway.core.life import RequestStatus
from headway.core.request import Request, SamplingParams
from headway.core.request_table import StatusChange
from headway.core.scheduler_output import Preemption, SchedulerOutput
from headway.core.slo import SLO
from headway.engine.client import EngineClient, StepReport
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput, RequestMetrics
from headway.executor.base import ModelRunnerOutput
from headway.server.telemetry.definitions import RecordedMetrics, statistics_metrics
from headway.server.telemetry.labels import OTHER
from headway.server.telemetry.metrics import MAX_PRIORITY_LABELS, MAX_TENANT_LABELS, Metrics

MakeEngine = Callable[..., Engine]
ClientOf = Callable[[Engine], EngineClient]
MetricsOf = Callable[..., Metrics]
Drain = Callable[[Engine], list[EngineOutput]]

MODEL = "story-teller"


@pytest.fixture
def metrics_of(client_of: ClientOf) -> MetricsOf:
    """``metrics_of(engine, …)``: metrics of an engine that the test steps itself."""
    return lambda engine, **more: Metrics(client_of(engine), MODEL, **more)


class Scraped:
    """One scrape."""

    def __init__(self, metrics: Metrics) -> None:
        content, content_type = metrics.render()
        assert content_type.startswith("text/plain; version=0.0.4")
        self.families = {
            family.name: family for family in text_string_to_metric_families(content.decode())
        }
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of one series."""
        wanted = frozenset({"model_name": MODEL, **labels}.items())
        return self.samples[f"headway:{name}", wanted]

    def series(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric by one label, summed over the others."""
        found: dict[str, float] = defaultdict(float)
        for (full_name, labels), value in self.samples.items():
            if full_name == f"headway:{name}":
                found[dict(labels)[label]] += value
        return dict(found)

    def total(self, name: str) -> float:
        """Of all series of a metric."""
        return sum(self.series(name, "model_name").values())

    def assert_histogram(self, name: str, values: Sequence[float], **labels: str) -> None:
        """It holds exactly these values."""
        assert self(f"{name}_count", **labels) == len(values)
        assert self(f"{name}_sum", **labels) == pytest.approx(sum(values))
        ordered = sorted(values)
        buckets = {
            dict(found)["le"]: count
            for (full_name, found), count in self.samples.items()
            if full_name == f"headway:{name}_bucket" and labels.items() <= dict(found).items()
        }
        assert len(buckets) > 10
        for le, count in buckets.items():
            # A value at a bucket's bound may be rounded to either side.
            least, most = (bisect_left(ordered, float(le) * (1 + off)) for off in (-1e-12, 1e-12))
            assert least <= count <= most, f"{name} le={le}"


class Witness:
    """Writes down what an engine does; attach it after the metrics, so that it sees the same."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[StepReport] = []
        self.preemptions: list[Preemption] = []
        self.changes: dict[str, list[StatusChange]] = defaultdict(list)
        #: Of requests that have got a token, what was known of them then.
        self.begun: dict[str, RequestMetrics] = {}
        self.token_times: dict[str, list[float]] = defaultdict(list)
        self.slowdowns: dict[int, list[float]] = defaultdict(list)
        self.ended: list[tuple[RequestMetrics, EngineOutput]] = []
        engine.listeners.append(self._on_step)

    def _on_step(self, report: StepReport, outputs: Sequence[EngineOutput]) -> None:
        self.steps.append(report)
        self.preemptions += report.output.preemptions
        for change in report.changes:
            self.changes[change.request_id].append(change)
        costs = self.engine.scheduler.cost_model.coefficients
        for output in outputs:
            request, request_id = output.metrics, output.request_id
            self.token_times[request_id] += [report.execute_end] * len(output.token_ids)
            if output.token_ids and request_id not in self.begun:
                assert request is not None
                self.begun[request_id] = request
                cached = request.num_cached_tokens
                fresh = request.num_prompt_tokens - cached
                limit = self.engine.scheduler.config.max_num_batched_tokens
                idle_ms = (
                    costs.step * -(-fresh // limit)
                    + costs.prefill_token * fresh
                    + costs.prefill_context * fresh * (cached + fresh / 2)
                )
                ttft_ms = (report.execute_end - request.arrival_time) * 1e3
                self.slowdowns[request.priority].append(ttft_ms / idle_ms)
            if output.is_last:
                assert request is not None
                self.ended.append((request, output))

    def of(self, priority: int, reasons: str = "stop length") -> list[RequestMetrics]:
        """Requests of a priority that ended for one of these reasons."""
        return [
            request
            for request, output in self.ended
            if request.priority == priority and output.finish_reason in reasons.split()
        ]

    def state_times(self, request: RequestMetrics) -> dict[str, float]:
        """From its changes of status, one by one."""
        times: dict[str, float] = defaultdict(float)
        changes = [(change.time, change.status) for change in self.changes[request.request_id]]
        changes[0] = (request.arrival_time, RequestStatus.WAITING)
        for (start, status), (end, _) in pairwise(changes):
            if status is RequestStatus.RUNNING:
                first = request.first_token_time
                border = end if first is None else min(max(first, start), end)
                times["prefill"] += border - start
                times["decode"] += end - border
            else:
                times[status.value] += end - start
        return times


def ask(
    request_id: str, priority: int, prompt: Sequence[int], max_tokens: int, **more: Any
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, stop=("rain",))
    return Request(request_id, priority, prompt, sampling_params=params, **more)


def run_load(
    engine: Engine, story: str, seed: int, num_requests: int = 60, name: str = "r"
) -> None:
    """Requests of three priorities that come and go; some have beginnings in common."""
    random = Random(seed)
    text = list(story.encode())
    num_asked = 0
    for _ in range(5000):
        for _ in range(random.choice([0, 0, 0, 0, 1, 2])):
            if num_asked == num_requests:
                break
            start = random.choice([0, 0, random.randrange(50)])
            prompt = text[start : start + random.randint(1, 60)]
            priority = random.choice([-5, 0, 0, 7, 7, 7])
            engine.submit(ask(f"{name}{num_asked}", priority, prompt, random.randint(1, 40)))
            num_asked += 1
        if engine.scheduler.requests and random.random() < 0.05:
            engine.abort(random.choice(sorted(engine.scheduler.requests)))
        engine.step()
        if num_asked == num_requests and not engine.has_work:
            return
    raise AssertionError("unfinished")


SETTINGS: list[dict[str, Any]] = [
    {"preemption_mode": "auto"},
    {"preemption_mode": "tail"},
    {"preemption_mode": "swap"},
    {"preemption_mode": "recompute", "max_num_queued_reqs": 4},
    {"preemption_mode": "recompute", "enable_prefix_caching": False, "queue_timeout": 0.3},
    {"preemption_mode": "pause", "max_step_ms": 12.0, "max_num_queued_reqs": 3},
]


@pytest.fixture(params=range(len(SETTINGS)), ids=lambda index: SETTINGS[index]["preemption_mode"])
def witnessed(
    request: pytest.FixtureRequest, make_engine: MakeEngine, metrics_of: MetricsOf, story: str
) -> tuple[Witness, Scraped]:
    """What happened under a load that is too much for the pool, and what was scraped."""
    settings = {
        "num_blocks": 40,
        "num_swap_blocks": 30,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 48,
        "slos": (SLO(0, ttft_ms=40, tpot_ms=15),),
    } | SETTINGS[request.param]
    engine = make_engine(**settings)
    metrics = metrics_of(engine)
    witness = Witness(engine)
    run_load(engine, story, seed=request.param + 1)
    assert len(witness.ended) == 60
    return witness, Scraped(metrics)


PRIORITIES = (-5, 0, 7)


def between(requests: Sequence[RequestMetrics], start: str, end: str) -> list[float]:
    return [getattr(request, end) - getattr(request, start) for request in requests]


def test_latencies(witnessed: tuple[Witness, Scraped]) -> None:
    witness, scraped = witnessed
    for priority in PRIORITIES:
        label = str(priority)
        begun = [request for request in witness.begun.values() if request.priority == priority]
        times = [witness.token_times[request.request_id] for request in begun]
        completed = witness.of(priority)
        assert completed
        for name, values in {
            "time_to_first_token_seconds": between(begun, "arrival_time", "first_token_time"),
            "request_queue_time_seconds": between(begun, "arrival_time", "first_scheduled_time"),
            "request_prefill_time_seconds": between(
                begun, "first_scheduled_time", "first_token_time"
            ),
            "inter_token_latency_seconds": [
                after - before for series in times for before, after in pairwise(series)
            ],
            "request_slowdown": witness.slowdowns[priority],
            "e2e_request_latency_seconds": between(completed, "arrival_time", "finish_time"),
            "request_inference_time_seconds": between(
                completed, "first_scheduled_time", "finish_time"
            ),
            "request_decode_time_seconds": between(completed, "first_token_time", "finish_time"),
            "request_time_per_output_token_seconds": [
                (series[-1] - series[0]) / (len(series) - 1)
                for series in (witness.token_times[request.request_id] for request in completed)
                if len(series) > 1
            ],
            "request_prompt_tokens": [request.num_prompt_tokens for request in begun],
            "request_params_max_tokens": [request.max_tokens for request in begun],
            "request_generation_tokens": [request.num_output_tokens for request in completed],
        }.items():
            scraped.assert_histogram(name, values, priority=label)


def test_ends_and_refusals(witnessed: tuple[Witness, Scraped]) -> None:
    witness, scraped = witnessed
    ends = Counter((output.finish_reason, request.priority) for request, output in witness.ended)
    assert {reason for reason, _ in ends} >= {"stop", "length", "abort"}
    assert scraped.total("request_success_total") == 60
    for (reason, priority), count in ends.items():
        labels = {"finished_reason": str(reason), "priority": str(priority)}
        assert scraped("request_success_total", **labels) == count
    errors = Counter(type(output.error).__name__ for _, output in witness.ended)
    assert scraped.series("queue_refusals_total", "reason") == {
        "queue_full": errors["QueueFull"],
        "queue_timeout": errors["QueueTimeout"],
    }
    settings = witness.engine.queue_limits
    assert bool(errors["QueueFull"]) == (settings.max_num_reqs < 10)
    assert bool(errors["QueueTimeout"]) == (settings.timeout is not None)


def test_the_times_in_the_states_sum_to_the_lives(witnessed: tuple[Witness, Scraped]) -> None:
    witness, scraped = witnessed
    expected: dict[tuple[str, int], float] = defaultdict(float)
    for request, _ in witness.ended:
        times = witness.state_times(request)
        (life,) = between([request], "arrival_time", "finish_time")
        assert sum(times.values()) == pytest.approx(life)
        for state, seconds in times.items():
            expected[state, request.priority] += seconds
    for (state, priority), seconds in expected.items():
        if seconds:
            labels = {"state": state, "priority": str(priority)}
            assert scraped("request_state_seconds_total", **labels) == pytest.approx(seconds)
    assert scraped.total("request_state_seconds_total") == pytest.approx(
        sum(between([request for request, _ in witness.ended], "arrival_time", "finish_time"))
    )


def test_tokens(witnessed: tuple[Witness, Scraped]) -> None:
    witness, scraped = witnessed
    is_cached = witness.engine.scheduler.config.enable_prefix_caching
    begun = list(witness.begun.values())
    hits = sum(request.num_cached_tokens for request in begun)
    assert bool(hits) == is_cached
    assert scraped("prefix_cache_hits_total") == hits
    assert scraped("prefix_cache_queries_total") == is_cached * sum(
        request.num_prompt_tokens for request in begun
    )
    for priority in PRIORITIES:
        label = str(priority)
        mine = [request for request in begun if request.priority == priority]
        assert scraped("prompt_tokens_total", priority=label) == sum(
            request.num_prompt_tokens for request in mine
        )
        assert scraped("generation_tokens_total", priority=label) == sum(
            len(witness.token_times[request.request_id]) for request in mine
        )
        again = sum(
            request.num_recomputed_tokens
            for request, _ in witness.ended
            if request.priority == priority
        )
        assert scraped.series("recomputed_tokens_total", "priority").get(label, 0) == again
    steps = sum(report.num_recomputed_tokens for report in witness.steps)
    assert scraped.total("recomputed_tokens_total") == steps


def test_yielding(witnessed: tuple[Witness, Scraped]) -> None:
    witness, scraped = witnessed
    statistics = witness.engine.scheduler.statistics()
    modes = scraped.series("num_preemptions_total", "mode")
    assert {mode: count for mode, count in modes.items() if count} == statistics.preemptions
    assert sum(modes.values()) > 5
    tokens: dict[tuple[str, int], int] = Counter()
    for preemption in witness.preemptions:
        tokens[preemption.mode.value, preemption.priority] += preemption.num_tokens
    for (mode, priority), count in tokens.items():
        if count:
            labels = {"mode": mode, "priority": str(priority)}
            assert scraped("preempted_tokens_total", **labels) == count
    assert scraped.total("preempted_tokens_total") == sum(tokens.values())
    num_out = sum(len(step.output.swap_out) for step in witness.steps)
    num_in = sum(len(step.output.swap_in) for step in witness.steps)
    assert scraped.series("swapped_blocks_total", "way") == (
        {"out": num_out, "in": num_in} if num_out else {}
    )
    assert scraped("swap_seconds_total") == pytest.approx((num_out + num_in) * 1e-4)


def test_steps(witnessed: tuple[Witness, Scraped]) -> None:
    witness, scraped = witnessed
    steps = [step for step in witness.steps if step.output]
    seconds = [step.end - step.start - step.result.swap_ms / 1e3 for step in steps]
    scraped.assert_histogram("step_time_seconds", seconds)
    scraped.assert_histogram(
        "iteration_tokens_total", [step.output.num_batched_tokens for step in steps]
    )
    scraped.assert_histogram(
        "step_time_ratio",
        [
            duration * 1e3 / step.output.predicted_ms
            for duration, step in zip(seconds, steps, strict=True)
        ],
    )
    assert 0 <= scraped("recompute_seconds_total") < sum(seconds)
    assert bool(scraped("recompute_seconds_total")) == bool(
        scraped.total("recomputed_tokens_total")
    )


def test_promises(witnessed: tuple[Witness, Scraped]) -> None:
    witness, scraped = witnessed
    outcomes: Counter[tuple[str, str]] = Counter()
    for request, output in witness.ended:
        if request.priority > 0:
            continue
        times = witness.token_times.get(request.request_id, [])
        (life,) = between([request], "arrival_time", "finish_time")
        if times:
            is_met = times[0] - request.arrival_time <= 0.040
            outcomes["ttft", "met" if is_met else "missed"] += 1
        elif output.error is not None or life > 0.040:
            outcomes["ttft", "missed"] += 1
        if len(times) > 1:
            is_met = (times[-1] - times[0]) / (len(times) - 1) <= 0.015
            outcomes["tpot", "met" if is_met else "missed"] += 1
    assert outcomes["ttft", "met"] and outcomes["ttft", "missed"] and outcomes["tpot", "met"]
    for target in ("ttft", "tpot"):
        for outcome in ("met", "missed"):
            labels = {"slo": "0", "target": target, "outcome": outcome}
            assert scraped("slo_requests_total", **labels) == outcomes[target, outcome]


def test_gauges_are_what_the_scheduler_counts(
    make_engine: MakeEngine, story: str, metrics_of: MetricsOf
) -> None:
    engine = make_engine(num_blocks=40, num_swap_blocks=12, max_num_seqs=3, preemption_mode="swap")
    metrics = metrics_of(engine)
    seen: Counter[str] = Counter()

    def compare(*_: Any) -> None:
        scraped, statistics = Scraped(metrics), engine.scheduler.statistics()
        for state in ("running", "waiting", "paused", "swapped", "preempted"):
            count = getattr(statistics, f"num_{state}")
            assert scraped(f"num_requests_{state}") == count
            seen[state] += count
        assert scraped("num_queued_tokens") == statistics.num_queued_tokens
        assert scraped("kv_cache_usage_perc") == statistics.blocks.usage
        assert scraped("swap_space_usage_perc") == statistics.num_swap_blocks_used / 12

    engine.listeners.append(compare)
    run_load(engine, story, seed=2, num_requests=15)
    assert min(seen.values()) > 0 and len(seen) == 5
    idle = Scraped(metrics)
    for state in seen:
        assert idle(f"num_requests_{state}") == 0
    assert idle("kv_cache_usage_perc") == idle("swap_space_usage_perc") == 0


def test_without_a_swap_space_none_of_it_is_used(
    make_engine: MakeEngine, metrics_of: MetricsOf
) -> None:
    assert Scraped(metrics_of(make_engine()))("swap_space_usage_perc") == 0


def test_the_ring(make_engine: MakeEngine, drain: Drain, metrics_of: MetricsOf) -> None:
    engine = make_engine(ingress_capacity=4)
    metrics = metrics_of(engine)

    def fill(*_: Any) -> None:
        """Requests come during the step, until there is no room."""
        engine.listeners.remove(fill)
        for index in range(4):
            engine.submit(ask(f"r{index}", 0, [97], 1))
        with pytest.raises(QueueFull):
            engine.submit(ask("r4", 0, [97], 1))

    engine.listeners.insert(0, fill)
    engine.submit(ask("first", 0, [97], 2))
    engine.step()
    assert Scraped(metrics)("ingress_usage_perc") == 0  # as published before they came
    engine.publish_statistics()
    scraped = Scraped(metrics)
    assert (scraped("ingress_usage_perc"), scraped("ingress_refusals_total")) == (1, 1)
    drain(engine)
    assert Scraped(metrics)("ingress_usage_perc") == 0


def test_the_cost_model_can_be_read(make_engine: MakeEngine, metrics_of: MetricsOf) -> None:
    engine = make_engine()
    model = engine.scheduler.cost_model
    assert Scraped(metrics_of(engine)).series("cost_model_seconds", "term") == {
        **{name: ms / 1e3 for name, ms in model.coefficients._asdict().items()},
        "swapped_block": model.swap_ms_per_block / 1e3,
    }


def test_slowdown_is_one_on_an_idle_engine_whose_costs_are_known(
    make_engine: MakeEngine, drain: Drain, story: str, metrics_of: MetricsOf
) -> None:
    engine = make_engine(enable_prefix_caching=False, max_num_batched_tokens=64)
    for index in range(60):  # to learn from
        engine.submit(ask(f"r{index}", 0, list(story[: 2 + 3 * index].encode()), 3))
        if index % 7 == 0:
            drain(engine)
    drain(engine)
    metrics = metrics_of(engine)
    for size in (3, 40, 150):  # in one step, and in three
        engine.submit(ask(f"size-{size}", 0, list(story[:size].encode()), 1))
        drain(engine)
    scraped = Scraped(metrics)
    assert scraped("request_slowdown_count", priority="0") == 3
    assert scraped("request_slowdown_sum", priority="0") == pytest.approx(3, rel=0.05)
    assert scraped("step_time_ratio_sum") == pytest.approx(
        scraped("step_time_ratio_count"), rel=0.05
    )


def test_what_is_found_in_the_prefix_cache_is_not_expected_to_take_time(
    make_engine: MakeEngine, drain: Drain, story: str, metrics_of: MetricsOf
) -> None:
    engine = make_engine()
    metrics = metrics_of(engine)
    for name in ("first", "second"):
        engine.submit(ask(name, 0, list(story.encode()[:80]), 1))
        drain(engine)
    scraped = Scraped(metrics)
    assert scraped("prefix_cache_queries_total") == 160
    assert scraped("prefix_cache_hits_total") == 76
    # The second took 4 tokens' time; against 80 tokens' time it would be a fraction.
    assert scraped("request_slowdown_bucket", priority="0", le="0.5") == 0


def test_recomputing_takes_its_share_of_a_step(
    make_engine: MakeEngine, drain: Drain, metrics_of: MetricsOf
) -> None:
    engine = make_engine(
        preemption_mode="recompute",
        num_blocks=8,
        max_num_seqs=2,
        enable_prefix_caching=False,
    )
    metrics, witness = metrics_of(engine), Witness(engine)
    engine.submit(ask("victim", 1, [97] * 10, 10))
    for _ in range(4):
        engine.step()
    engine.submit(ask("urgent", 0, [97] * 20, 2))
    drain(engine)
    # Of its 14 tokens, 13 had been computed.
    (step,) = (
        step for step in witness.steps[4:] if 14 in [len(row.token_ids) for row in step.output]
    )
    share = 13 / step.output.num_batched_tokens
    scraped = Scraped(metrics)
    assert scraped("recomputed_tokens_total", priority="1") == 13
    assert scraped("recompute_seconds_total") == pytest.approx((step.end - step.start) * share)
    labels = {"mode": "recompute", "priority": "1"}
    assert scraped("num_preemptions_total", **labels) == 1
    assert scraped("preempted_tokens_total", **labels) == 13


def test_what_the_executor_cannot_compute_counts_as_nothing(
    make_engine: MakeEngine, drain: Drain, metrics_of: MetricsOf
) -> None:
    engine = make_engine()
    metrics = metrics_of(engine)
    execute = engine.executor.execute

    def fail_one(output: SchedulerOutput) -> ModelRunnerOutput:
        result = execute(output)
        tokens, errors = list(result.tokens), {}
        for position, row in enumerate(output):
            num_output = row.start + len(row.token_ids) - row.num_prompt_tokens
            if (row.request_id, num_output) in (("broken", 2), ("stillborn", 0)):
                tokens[position], errors[position] = (), InternalError("not a number")
        return result._replace(tokens=tokens, errors=errors)

    engine.executor.execute = fail_one
    engine.submit(ask("broken", 0, [97] * 6, 9))
    engine.submit(ask("stillborn", 0, [97] * 7, 9))
    engine.submit(ask("whole", 0, [97] * 5, 9))
    drain(engine)
    scraped = Scraped(metrics)
    assert scraped.series("request_success_total", "finished_reason") == {
        "abort": 2,
        "length": 1,
    }
    assert scraped("generation_tokens_total", priority="0") == 2 + 9
    assert scraped("inter_token_latency_seconds_count", priority="0") == 1 + 8
    assert scraped.total("recomputed_tokens_total") == 0


def test_more_priorities_than_labels(
    make_engine: MakeEngine, drain: Drain, metrics_of: MetricsOf
) -> None:
    engine = make_engine(slos=(SLO(40, ttft_ms=100),))
    metrics = metrics_of(engine, priorities=(39, -(2**63)))
    for priority in range(41):
        engine.submit(ask(f"p{priority}", priority, [97], 2))
    drain(engine)
    engine.submit(ask("lowest", -(2**63), [97], 2))
    drain(engine)
    tokens = Scraped(metrics).series("generation_tokens_total", "priority")
    own = [*range(MAX_PRIORITY_LABELS - 3), 39, 40, -(2**63)]
    assert tokens == {
        **{str(priority): 2 for priority in own},
        OTHER: 2 * (42 - len(own)),
    }


def test_what_happens_after_a_change_of_priority_counts_for_the_new_one(
    make_engine: MakeEngine, drain: Drain, metrics_of: MetricsOf
) -> None:
    engine = make_engine()
    metrics = metrics_of(engine)
    engine.submit(ask("r", 5, [97] * 4, 6))
    engine.step()
    engine.step()
    engine.set_priority("r", 1)
    drain(engine)
    scraped = Scraped(metrics)
    assert scraped.series("generation_tokens_total", "priority") == {"5": 2, "1": 4}
    assert scraped.series("inter_token_latency_seconds_count", "priority") == {"5": 1, "1": 4}
    assert scraped.series("time_to_first_token_seconds_count", "priority") == {"5": 1}
    assert scraped.series("e2e_request_latency_seconds_count", "priority") == {"1": 1}


def test_what_is_rare_is_known_before_it_happens(
    make_engine: MakeEngine, metrics_of: MetricsOf
) -> None:
    engine = make_engine(slos=(SLO(0, ttft_ms=9), SLO(3, ttft_ms=9, tpot_ms=9)))
    scraped = Scraped(metrics_of(engine, priorities=[7]))
    zeros = {"0": 0, "3": 0, "7": 0}
    assert scraped.series("queue_refusals_total", "priority") == zeros
    assert scraped.series("num_preemptions_total", "priority") == zeros
    assert scraped.series("num_preemptions_total", "mode") == {
        "pause": 0,
        "tail": 0,
        "swap": 0,
        "recompute": 0,
    }
    targets = {
        (dict(labels)["slo"], dict(labels)["target"], dict(labels)["outcome"])
        for name, labels in scraped.samples
        if name == "headway:slo_requests_total"
    }
    assert targets == {
        (slo, target, outcome)
        for slo, target in (("0", "ttft"), ("3", "ttft"), ("3", "tpot"))
        for outcome in ("met", "missed")
    }


def test_each_choice_counts(
    make_engine: MakeEngine, metrics_of: MetricsOf, drain: Drain, story: str
) -> None:
    engine = make_engine(slos=(SLO(0, tpot_ms=1000),))
    metrics, witness = metrics_of(engine), Witness(engine)
    engine.submit(ask("group", 0, list(story[:9].encode()), 6, n=3))
    drain(engine)
    scraped = Scraped(metrics)
    ((request, _),) = witness.ended
    times = sorted(set(witness.token_times["group"]))
    assert len(times) == 6
    assert scraped("request_success_total", finished_reason="length", priority="0") == 1
    assert scraped("prompt_tokens_total", priority="0") == 9
    assert scraped("generation_tokens_total", priority="0") == 18
    gaps = [after - before for before, after in pairwise(times)] * 3
    scraped.assert_histogram("inter_token_latency_seconds", gaps, priority="0")
    scraped.assert_histogram("request_generation_tokens", [18], priority="0")
    (life,) = between([request], "first_token_time", "finish_time")
    scraped.assert_histogram("request_time_per_output_token_seconds", [life / 5], priority="0")
    assert scraped("slo_requests_total", slo="0", target="tpot", outcome="met") == 1


def test_metrics_by_tenant(
    make_engine: MakeEngine, metrics_of: MetricsOf, drain: Drain, story: str
) -> None:
    engine = make_engine(
        num_blocks=8, preemption_mode="recompute", slos=(SLO(0, ttft_ms=1000),), max_num_seqs=2
    )
    metrics = metrics_of(engine, tenants=["web", "batch"])
    assert set(Scraped(metrics).series("queue_refusals_total", "tenant")) == {"web", "batch"}
    engine.submit(ask("batch/r", 1, [97] * 10, 10, tenant="batch"))
    for _ in range(4):
        engine.step()
    engine.submit(ask("web/r", 0, [97] * 20, 2, tenant="web"))
    drain(engine)
    scraped = Scraped(metrics)
    assert scraped.series("generation_tokens_total", "tenant") == {"web": 2, "batch": 10}
    assert scraped.series("time_to_first_token_seconds_count", "tenant") == {"web": 1, "batch": 1}
    assert scraped.series("num_preemptions_total", "tenant") == {"web": 0, "batch": 1}
    assert scraped.series("slo_requests_total", "tenant") == {"web": 1, "batch": 0}
    labels = {"priority": "0", "tenant": "web", "finished_reason": "length"}
    assert scraped("request_success_total", **labels) == 1


def test_more_tenants_than_labels(
    make_engine: MakeEngine, metrics_of: MetricsOf, drain: Drain
) -> None:
    engine = make_engine()
    metrics = metrics_of(engine, tenants=["known"])
    names = [f"t{index}" for index in range(MAX_TENANT_LABELS + 3)]
    for name in (*names, "known"):
        engine.submit(ask(f"{name}/r", 0, [97], 2, tenant=name))
        drain(engine)
    tokens = Scraped(metrics).series("generation_tokens_total", "tenant")
    own = [*names[: MAX_TENANT_LABELS - 1], "known"]
    assert tokens == {**dict.fromkeys(own, 2), OTHER: 2 * 4}


def test_engines_of_one_process_have_metrics_of_their_own(
    make_engine: MakeEngine, drain: Drain, metrics_of: MetricsOf, client_of: ClientOf
) -> None:
    one, other = make_engine(), make_engine()
    metrics, others = metrics_of(one), Metrics(client_of(other), "another")
    one.submit(ask("r", 0, [97], 3))
    drain(one)
    assert Scraped(metrics).total("generation_tokens_total") == 3
    assert 'model_name="another"' in others.render()[0].decode()
    assert MODEL not in others.render()[0].decode()


def test_scrapes_while_steps_are_done(
    make_engine: MakeEngine, story: str, metrics_of: MetricsOf
) -> None:
    engine = make_engine(num_blocks=40, num_swap_blocks=30, max_num_seqs=6)
    metrics = metrics_of(engine)
    stepping = threading.Thread(target=run_load, args=(engine, story, 3, 150))
    stepping.start()
    is_over, last = False, 0.0
    while not is_over:
        is_over = not stepping.is_alive()
        scraped = Scraped(metrics)
        total = scraped.total("generation_tokens_total")
        assert total >= last
        last = total
        gaps = scraped.series("inter_token_latency_seconds_count", "priority")
        for priority, count in gaps.items():
            labels = {"priority": priority, "le": "+Inf"}
            assert scraped("inter_token_latency_seconds_bucket", **labels) == count
    assert scraped.total("request_success_total") == 150


def test_the_process_is_measured_too(make_engine: MakeEngine, metrics_of: MetricsOf) -> None:
    families = Scraped(metrics_of(make_engine())).families
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6


DOCS = Path(__file__).parents[3] / "docs"


def test_the_documentation_lists_every_metric_with_its_labels(
    make_engine: MakeEngine, client_of: ClientOf
) -> None:
    page = (DOCS / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", page, re.MULTILINE)
    documented = sorted(
        (f"headway:{name}", kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in rows
    )
    instruments = [
        *statistics_metrics(client_of(make_engine()), str),
        *vars(RecordedMetrics(("priority",))).values(),
    ]
    assert documented == sorted(
        (instrument.name, instrument.family({}).type, instrument.label_names)
        for instrument in instruments
    )


def test_queries_and_dashboard_ask_for_what_there_is(
    make_engine: MakeEngine, story: str, metrics_of: MetricsOf
) -> None:
    engine = make_engine(num_blocks=40, max_num_seqs=6, slos=(SLO(0, ttft_ms=60),))
    metrics = metrics_of(engine)
    run_load(engine, story, seed=1, num_requests=10)
    there = {name for name, _ in Scraped(metrics).samples}
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    queries = [
        *re.findall(r"```promql\n(.*?)```", (DOCS / "metrics.md").read_text(), re.DOTALL),
        *(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())),
        *(
            variable["query"]
            for variable in dashboard["templating"]["list"]
            if variable["type"] == "query"
        ),
    ]
    asked = [name for query in queries for name in re.findall(r"headway:\w+", query)]
    assert len(asked) > 40
    assert set(asked) <= there


def test_nothing_is_kept_of_requests_that_have_ended(
    make_engine: MakeEngine, story: str, metrics_of: MetricsOf
) -> None:
    engine = make_engine(num_blocks=40, max_num_seqs=6, max_num_queued_reqs=5)
    metrics = metrics_of(engine)
    run_load(engine, story, seed=8, name="ephemeral")
    gc.collect()
    assert Scraped(metrics).total("request_success_total") == 60
    left = [request for request in gc.get_objects() if isinstance(request, Request)]
    assert not [request for request in left if request.request_id.startswith("ephemeral")]
    assert not metrics._answering
