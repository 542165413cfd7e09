"""What the runs came to."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from headway.demo.picture import draw
from headway.demo.report import as_data, conclusion, num_equal_outputs, summarize_runs, table

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Simulation
    from headway.demo.report import RunSummary
    from headway.demo.run import Run


@pytest.fixture
def summaries(runs: list[Run]) -> list[RunSummary]:
    return summarize_runs(runs)


def test_nothing_of_an_output_depends_on_the_policy(runs: list[Run]) -> None:
    num = len(runs[0].load.arrivals)
    assert num_equal_outputs(runs) == (num, num)


def test_the_table_fits_80_columns(summaries: list[RunSummary]) -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(table(summaries))
    text = capture.get()
    for label in ("first token, p50", "end to end, p99", "tokens/s", "yielded: swap", "recomputed"):
        assert label in text
    assert "…" not in text
    assert "cut off" not in text


def test_the_conclusion_is_a_sentence_with_the_ratio(summaries: list[RunSummary]) -> None:
    ranked, unranked = summaries
    ratio = unranked.classes["urgent"].ttft_p50 / ranked.classes["urgent"].ttft_p50
    text = conclusion(ranked, unranked, (36, 36))
    assert f"{ratio:.0f} times sooner" in text
    assert "all 36 outputs are the same" in text
    assert "compare with care" not in text


def test_the_data_is_json_and_adds_up(runs: list[Run], summaries: list[RunSummary]) -> None:
    data = json.loads(json.dumps(as_data(summaries, (36, 36))))
    for run, numbers in zip(runs, data["runs"], strict=True):
        assert numbers["policy"] == run.policy
        assert sum(numbers["num_unfinished"].values()) == 0
        modes = sum(sum(counts.values()) for counts in numbers["preemptions"].values())
        assert modes == len(run.preemptions)


def test_runs_that_were_cut_off_are_reported_as_such(
    simulation: Simulation, tmp_path: Path
) -> None:
    runs = [simulation.run(policy, limit=5.0) for policy in ("priority", "fcfs")]
    for run in runs:
        run.serve()
    summaries = summarize_runs(runs)
    assert sum(summaries[1].num_unfinished.values()) >= 20
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(table(summaries))
    assert "cut off" in capture.get()
    assert "no comparison" in conclusion(*summaries, num_equal_outputs(runs))
    draw(runs, summaries, tmp_path / "picture.png")


def test_the_picture_is_a_png(runs: list[Run], summaries: list[RunSummary], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    draw(runs, summaries, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert 1000 < width < 2500
    assert 1000 < height < 2500


def test_only_what_came_in_both_runs_is_compared(simulation: Simulation) -> None:
    fast = simulation.make_load(speed=200.0)  # work for a slower machine: soon done
    long = [simulation.run("priority", limit=600.0), simulation.run("fcfs", fast)]
    for run in long:
        run.serve()
    urgent = [summary.classes["urgent"].num_requests for summary in summarize_runs(long)]
    assert urgent[0] == urgent[1] < len(simulation.load.arrivals) - 24
