"""Serving the load under a policy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from headway.core.config import PreemptionMode
from headway.demo.load import NUM_SLOTS, URGENT_PRIORITY
from headway.demo.run import Run
from headway.engine.metrics import summarize

if TYPE_CHECKING:
    from conftest import Simulation


def test_everything_is_served(runs: list[Run]) -> None:
    for run in runs:
        assert len(run.finished) == len(run.load.arrivals)
        assert not run.is_cut_off
        assert not run.engine.has_work


def test_it_takes_about_as_long_as_it_should(runs: list[Run]) -> None:
    for run in runs:
        assert 0.6 * run.load.seconds < run.elapsed < 1.4 * run.load.seconds


def test_there_are_pauses_and_losses_of_blocks(runs: list[Run]) -> None:
    ranked = runs[0].num_preemptions
    assert ranked[PreemptionMode.PAUSE] > 5
    assert ranked[PreemptionMode.SWAP] + ranked[PreemptionMode.TAIL] > 5


def test_the_urgent_never_yield(runs: list[Run]) -> None:
    assert not [
        preemption
        for _, preemption in runs[0].preemptions
        if preemption.request_id.startswith("urgent")
    ]


def test_ranking_shortens_the_wait_of_the_urgent(runs: list[Run]) -> None:
    ranked, unranked = (
        summarize(record.metrics for record in run.finished if record.metrics)[0] for run in runs
    )
    assert ranked.priority == unranked.priority == URGENT_PRIORITY
    assert ranked.ttft_p99 < unranked.ttft_p50 / 10


def test_the_measured_speed_is_that_of_full_steps(simulation: Simulation) -> None:
    # A step of the simulated machine takes 8 ms, 1 ms a sequence, and a little for contexts.
    assert simulation.speed == pytest.approx(NUM_SLOTS / 17e-3, rel=0.1)


def test_a_run_waits_for_what_is_still_to_come(simulation: Simulation) -> None:
    first = simulation.load.arrivals[0]
    late = replace(first, time=90.0, request_id="late")
    load = replace(simulation.load, arrivals=(first, late))
    run = simulation.run("priority", load)
    run.serve()
    metrics = run.records["late"].metrics
    assert metrics is not None
    assert metrics.first_scheduled_time == pytest.approx(run.start + 90.0)
    assert len(run.finished) == 2


def test_urgent_requests_stop_coming_when_the_batch_work_is_done(simulation: Simulation) -> None:
    load = simulation.make_load(speed=200.0)  # work for a slower machine: soon done
    run = simulation.run("priority", load)
    run.serve()
    assert len(run.finished) == len(run.requests) < len(load.arrivals)
    assert run.elapsed < load.seconds * 0.8


def test_a_run_that_takes_too_long_is_cut_off(simulation: Simulation) -> None:
    run = simulation.run("priority", limit=10.0)
    run.serve()
    assert run.is_cut_off
    assert 10.0 <= run.elapsed < 10.5
    assert 0 < len(run.finished) < len(run.requests)
    assert all(record.status.is_finished for record in run.requests)


def test_what_is_kept_of_a_request_is_what_the_engine_told_of_it(runs: list[Run]) -> None:
    for run in runs:
        for record in run.requests:
            metrics = record.metrics
            assert metrics is not None
            assert len(record.token_ids) == metrics.num_output_tokens == record.arrival.max_tokens
            segments = run.segments(record)
            assert segments[0].start == record.arrival_time
            assert segments[-1].end == record.finish_time
            seconds = {
                phase: sum(each.end - each.start for each in segments if each.phase is phase)
                for phase in metrics.phase_seconds
            }
            assert seconds == pytest.approx(dict(metrics.phase_seconds))
