"""The scheduler-policy experiment, simulated: it runs, repeats itself, and shows what it claims."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "exp002_scheduler_policy.py"


@pytest.fixture(scope="module")
def exp002() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exp002_scheduler_policy", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(exp002: ModuleType) -> list[Any]:
    found: list[Any] = exp002.run(exp002.SimulatedBackend())
    return found


def by_policy(results: list[Any], scenario: str) -> dict[str, Any]:
    return {result.policy: result for result in results if result.scenario == scenario}


SCENARIOS = ("mixed_load", "burst_high_priority", "resource_constrained")


def test_runs_every_scenario_under_every_policy(exp002: ModuleType, results: list[Any]) -> None:
    assert tuple(exp002.SCENARIOS) == SCENARIOS
    for scenario in SCENARIOS:
        assert list(by_policy(results, scenario)) == [policy.name for policy in exp002.POLICIES]


def test_the_same_numbers_every_time(exp002: ModuleType, results: list[Any]) -> None:
    assert exp002.run(exp002.SimulatedBackend(), runs=2) == results


def test_outputs_are_those_of_each_request_alone(results: list[Any]) -> None:
    assert all(result.outputs_equal for result in results)


def test_unequal_outputs_are_noticed(exp002: ModuleType) -> None:
    backend, arrivals = exp002.SimulatedBackend(), exp002.SCENARIOS["mixed_load"]
    backend.open(exp002.pool_size(arrivals, backend.encode))
    alone = exp002.outputs_alone(backend, arrivals)
    alone[2][5] += 1
    result = exp002.run_once(backend, "mixed_load", arrivals, exp002.POLICIES[0], alone)
    assert not result.outputs_equal


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_urgent_requests_are_faster_with_preemption(results: list[Any], scenario: str) -> None:
    found = by_policy(results, scenario)
    auto, fcfs = found["priority, auto"].classes[0], found["FCFS"].classes[0]
    assert auto.latency_mean < fcfs.latency_mean
    assert auto.latency_p99 < fcfs.latency_p99
    assert auto.ttft_mean < fcfs.ttft_mean


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_each_mode_pays(results: list[Any], scenario: str) -> None:
    found = by_policy(results, scenario)
    for policy in ("FCFS", "priority, none"):
        assert found[policy].preemptions == {}
    for policy in ("priority, pause", "priority, swap", "priority, auto"):
        assert found[policy].num_recomputed_tokens == 0
    for policy in ("priority, pause", "priority, tail", "priority, recompute"):
        assert found[policy].num_swapped_blocks == 0


def test_recomputing_is_paid_for_by_batch_requests(results: list[Any]) -> None:
    found = by_policy(results, "burst_high_priority")
    recompute, swap = found["priority, recompute"], found["priority, swap"]
    assert recompute.num_recomputed_tokens > 0 and swap.num_swapped_blocks > 0
    assert recompute.classes[1].latency_mean > swap.classes[1].latency_mean


def test_pause_needs_room_in_the_pool(exp002: ModuleType, results: list[Any]) -> None:
    scenario = "burst_high_priority"
    tight = by_policy(results, scenario)
    roomy = by_policy(
        exp002.run(exp002.SimulatedBackend(), {scenario: exp002.SCENARIOS[scenario]}, pool=4),
        scenario,
    )
    assert tight["priority, pause"].classes == tight["FCFS"].classes
    pause, fcfs = roomy["priority, pause"], roomy["FCFS"]
    assert pause.classes[0].latency_mean < fcfs.classes[0].latency_mean / 2
    assert pause.total == pytest.approx(fcfs.total)


def test_the_limits_are_limits(exp002: ModuleType) -> None:
    results = exp002.run(exp002.SimulatedBackend(), exp002.LIMITS)
    assert all(result.outputs_equal for result in results)
    for scenario in ("light_load", "equal_classes"):
        assert len({result.total for result in by_policy(results, scenario).values()}) == 1
    late = by_policy(results, "victims_almost_done")
    urgent = {name: result.classes[0].latency_mean for name, result in late.items()}
    assert urgent["priority, recompute"] > urgent["FCFS"] > urgent["priority, auto"]


def test_time_scale_stretches_arrivals_only(exp002: ModuleType) -> None:
    scenario = {"mixed_load": exp002.SCENARIOS["mixed_load"]}
    policies = exp002.POLICIES[:1]
    (idle,) = exp002.run(exp002.SimulatedBackend(time_scale=100.0), scenario, policies)
    (busy,) = exp002.run(exp002.SimulatedBackend(), scenario, policies)
    assert idle.classes[0].latency_mean * idle.time_scale < busy.classes[0].latency_mean


def test_command_line(
    exp002: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exp002.main(["--simulated", "--json", "--output", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "exp002-simulated.json").read_text())
    assert len(printed["results"]) == len(exp002.SCENARIOS) * len(exp002.POLICIES)
    assert (tmp_path / "exp002-simulated.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("style", [[], ["--markdown"]])
def test_tables(exp002: ModuleType, style: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exp002.main(["--simulated", *style]) == 0
    printed = capsys.readouterr().out
    assert all(scenario in printed for scenario in SCENARIOS)
    assert "NO" not in printed


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--pool", "0"], ["--time-scale", "-1"]])
def test_refuses_impossible_options(
    exp002: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        exp002.main(["--simulated", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
