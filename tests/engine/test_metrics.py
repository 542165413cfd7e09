"""Latencies and costs by class, from requests whose times are known exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from headway.core.request import Request, SamplingParams
from headway.engine.engine import Engine
from headway.engine.metrics import percentile, summarize
from headway.engine.outputs import EngineOutput, metrics_of

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


def test_times_of_a_request(make_engine: MakeEngine, drain: Drain) -> None:
    """A step looks at the clock when it begins, on both sides of the executor, and at its end."""
    engine = make_engine(clock=Ticks())
    engine.observers.clear()
    request = ask("a", 0, 4, 3)
    engine.submit(request)  # at 1
    drain(engine)  # steps begin at 2, 6, 10; their tokens are ready at 4, 8, 12
    metrics = metrics_of(request)
    assert (metrics.arrival_time, metrics.first_scheduled_time) == (1, 2)
    assert (metrics.first_token_time, metrics.finish_time) == (4, 12)
    assert (metrics.ttft, metrics.latency) == (3, 11)
    (summary,) = summarize([request])
    assert (summary.ttft_p50, summary.ttft_p99, summary.latency_mean) == (3, 3, 11)
    assert (summary.tpot_mean, summary.num_output_tokens) == (4, 3)


def test_a_class_is_a_priority_and_the_most_urgent_comes_first(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = make_engine()
    requests = [ask(f"{index}", index % 3 - 1, 4 + index, 4) for index in range(9)]
    for request in requests:
        engine.submit(request)
    drain(engine)
    summaries = summarize(reversed(requests))
    assert [one.priority for one in summaries] == [-1, 0, 1]
    assert [one.num_requests for one in summaries] == [3, 3, 3]
    for one in summaries:
        latencies = [metrics_of(r).latency for r in requests if r.priority == one.priority]
        assert one.latency_mean == pytest.approx(np.mean(np.array(latencies)))
        assert one.latency_p99 == pytest.approx(np.percentile(np.array(latencies), 99))
        assert one.ttft_p50 <= one.ttft_p99 <= one.latency_p99
        assert one.num_output_tokens == 12


def test_what_yielding_cost_is_counted(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine(
        preemption_mode="recompute", num_blocks=8, max_num_seqs=2, enable_prefix_caching=False
    )
    victim, urgent = ask("victim", 1, 10, 10), ask("urgent", 0, 20, 2)
    engine.submit(victim)
    for _ in range(4):
        engine.step()
    engine.submit(urgent)
    drain(engine)
    first, second = summarize([victim, urgent])
    assert (first.num_preemptions, first.num_recomputed_tokens) == (0, 0)
    # Its prompt and the three generated tokens that had been computed.
    assert (second.num_preemptions, second.num_recomputed_tokens) == (1, 13)


def test_a_pause_costs_no_tokens(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine(max_num_seqs=1)
    victim = ask("victim", 1, 10, 10)
    engine.submit(victim)
    for _ in range(4):
        engine.step()
    engine.submit(ask("urgent", 0, 20, 2))
    drain(engine)
    (summary,) = summarize([victim])
    assert (summary.num_pauses, summary.num_preemptions) == (1, 0)
    assert summary.num_recomputed_tokens == 0


def test_cached_tokens_are_counted(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine()
    for request_id in ("first", "second"):
        request = Request(request_id, prompt=[7] * 18, max_tokens=1)
        engine.submit(request)
        drain(engine)
    assert metrics_of(request).num_cached_tokens == 16


def test_who_got_nothing_is_left_out(make_engine: MakeEngine, drain: Drain) -> None:
    engine = make_engine()
    ended, running = ask("ended", 0, 4, 4), ask("running", 1, 4, 4)
    engine.submit(ended)
    engine.abort("ended")
    engine.submit(running)
    engine.step()
    assert summarize([ended, running]) == []
    assert metrics_of(ended).ttft is None
    assert metrics_of(running).latency is None
    drain(engine)
