"""Latencies and costs by class, from requests whose times are known exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from headway.core.life import Phase
from headway.core.request import Request, SamplingParams
from headway.engine.engine import Engine
from headway.engine.metrics import percentile, summarize
from headway.engine.outputs import EngineOutput, RequestMetrics

MakeEngine = Callable[..., Engine]
Drain = Callable[[Engine], list[EngineOutput]]


@pytest.mark.parametrize("rank", [0, 1, 25, 50, 90, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpy_s(rank: float, count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    assert percentile(values, rank) == pytest.approx(np.percentile(values, rank), abs=1e-12)


class Ticks:
    """A clock that says one second more each time the engine looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def ask(request_id: str, priority: int, num_prompt: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    prompt = [ord(character) for character in f"{request_id:x<{num_prompt}}"]
    return Request(request_id, priority, prompt, sampling_params=params)


def metrics_of(outputs: list[EngineOutput]) -> dict[str, RequestMetrics]:
    """What the last output of each request that has ended says of it."""
    return {
        output.request_id: output.metrics
        for output in outputs
        if output.is_last and output.metrics is not None
    }


def test_times_of_a_request(make_engine: MakeEngine, drain: Drain) -> None:
    """A step looks at the clock when it begins, on both sides of the executor, and at its end."""
    engine = make_engine(clock=Ticks())
    engine.submit(ask("a", 0, 4, 3))  # at 1
    outputs = drain(engine)  # steps begin at 2, 6, 10; their tokens are ready at 4, 8, 12
    begun, _, ended = (output.metrics for output in outputs)
    assert begun is not None and ended is not None
    assert outputs[1].metrics is None, "metrics come with the first token and with the end"
    for metrics in (begun, ended):
        assert (metrics.arrival_time, metrics.first_scheduled_time) == (1, 2)
        assert (metrics.first_token_time, metrics.ttft) == (4, 3)
    assert (begun.last_token_time, begun.finish_time, begun.latency) == (4, None, None)
    assert (begun.status, begun.num_output_tokens) == ("running", 1)
    assert (ended.last_token_time, ended.finish_time, ended.latency) == (12, 12, 11)
    assert (ended.status, ended.num_output_tokens) == ("finished_length_capped", 3)
    (summary,) = summarize([ended])
    assert (summary.ttft_p50, summary.ttft_p99, summary.latency_mean) == (3, 3, 11)
    assert (summary.tpot_mean, summary.num_output_tokens) == (4, 3)


def test_a_class_is_a_priority_and_the_most_urgent_comes_first(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine()
    for index in range(9):
        engine.submit(ask(f"{index}", index % 3 - 1, 4 + index, 4))
    ended = list(metrics_of(drain(engine)).values())
    summaries = summarize(reversed(ended))
    assert [summary.priority for summary in summaries] == [-1, 0, 1]
    assert [summary.num_requests for summary in summaries] == [3, 3, 3]
    for summary in summaries:
        latencies = np.array(
            [metrics.latency for metrics in ended if metrics.priority == summary.priority]
        )
        assert summary.latency_mean == pytest.approx(np.mean(latencies))
        assert summary.latency_p99 == pytest.approx(np.percentile(latencies, 99))
        assert summary.ttft_p50 <= summary.ttft_p99 <= summary.latency_p99
        assert summary.num_output_tokens == 12


def test_what_yielding_cost_is_counted(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine(
        preemption_mode="recompute", num_blocks=8, max_num_seqs=2, enable_prefix_caching=False
    )
    engine.submit(ask("victim", 1, 10, 10))
    for _ in range(4):
        engine.step()
    engine.submit(ask("urgent", 0, 20, 2))
    first, second = summarize(metrics_of(drain(engine)).values())
    assert (first.num_preemptions, first.num_recomputed_tokens) == (0, 0)
    # Its prompt and the three generated tokens that had been computed.
    assert (second.num_preemptions, second.num_recomputed_tokens) == (1, 13)


def test_a_pause_costs_no_tokens(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.submit(ask("victim", 1, 10, 10))
    for _ in range(4):
        engine.step()
    engine.submit(ask("urgent", 0, 20, 2))
    metrics = metrics_of(drain(engine))["victim"]
    (summary,) = summarize([metrics])
    assert metrics.phase_seconds[Phase.PAUSED] > 0
    assert (summary.num_pauses, summary.num_preemptions) == (1, 0)
    assert summary.num_recomputed_tokens == 0


def test_cached_tokens_are_counted(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine()
    for request_id in ("first", "second"):
        engine.submit(Request(request_id, prompt=[7] * 18, max_tokens=1))
        metrics = metrics_of(drain(engine))[request_id]
    assert metrics.num_cached_tokens == 16


def test_a_request_that_got_nothing_is_left_out(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine()
    engine.submit(ask("ended", 0, 4, 4))
    engine.abort("ended")
    engine.submit(ask("running", 1, 4, 4))
    outputs = engine.step()
    (ended,) = metrics_of(outputs).values()
    (running,) = (output.metrics for output in outputs if output.request_id == "running")
    assert running is not None
    assert summarize([ended, running]) == []
    assert (ended.ttft, ended.num_output_tokens) == (None, 0)
    assert (ended.first_scheduled_time, ended.last_token_time) == (None, None)
    assert running.latency is None
    drain(engine)


@pytest.mark.parametrize("mode", ["auto", "pause", "swap", "recompute", "tail"])
def test_phases_add_up_to_the_latency(make_engine: MakeEngine, drain: Drain, mode: str) -> None:
    engine = make_engine(
        preemption_mode=mode, num_blocks=10, num_swap_blocks=20, max_num_seqs=2, max_model_len=40
    )
    outputs: list[EngineOutput] = []
    for index in range(6):
        engine.submit(ask(f"{index}", -index, 6 + index, 12))
        outputs += [output for _ in range(4) for output in engine.step()]
    ended = metrics_of(outputs + drain(engine))
    assert len(ended) == 6
    for metrics in ended.values():
        assert sum(metrics.phase_seconds.values()) == pytest.approx(metrics.latency)
        assert metrics.segments[0].start == metrics.arrival_time
        assert metrics.segments[-1].end == metrics.finish_time


def test_metrics_are_of_the_whole_group(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=3)
    engine.submit(Request("a", 0, [65] * 10, sampling_params=params, n=4, tenant="t"))
    metrics = metrics_of(drain(engine))["a"]
    assert (metrics.num_sequences, metrics.num_prompt_tokens) == (4, 10)
    assert (metrics.num_output_tokens, metrics.max_tokens) == (12, 3)
    assert (metrics.tenant, metrics.sampling_params.seed is None) == ("t", False)


def test_forecasts_learn_how_much_of_what_they_may_requests_generate(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(max_num_seqs=8, eos_token_ids=frozenset({ord(";")}))
    assert engine.statistics.forecast.output_fraction == 1.0
    end = story.index(";")
    prompt = list(story[: end - 9].encode())
    for index in range(120):  # each ends with its tenth token of twenty
        params = SamplingParams(max_tokens=20)
        request = Request(
            f"{index}", prompt_token_ids=prompt, sampling_params=params, n=1 + index % 2
        )
        engine.submit(request)
        if index % 40 == 39:
            drain(engine)
    assert engine.statistics.forecast.output_fraction == pytest.approx(0.5, abs=0.02)
