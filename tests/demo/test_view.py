"""The demo while it runs."""

from __future__ import annotations

import io
import itertools
import re
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from headway.demo.view import make_view, render

if TYPE_CHECKING:
    from conftest import Simulation
    from headway.engine.client import StepReport

SIZES = list(itertools.product((20, 40, 80, 120, 250), (4, 12, 24, 40, 80)))


def text_of(run: object, width: int, height: int) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(render(run, "a title", width, height))  # type: ignore[arg-type]
    return capture.get()


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_it_fits_every_terminal_at_every_moment(simulation: Simulation, policy: str) -> None:
    run = simulation.run(policy)
    sizes = itertools.cycle(SIZES)
    num_steps = 0

    def look(*_: object) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps % 10 == 0:
            width, height = next(sizes)
            lines = text_of(run, width, height).splitlines()
            assert len(lines) <= height
            assert all(len(line) <= width for line in lines)

    run.engine.listeners.append(look)
    run.serve()
    assert num_steps > 10 * len(SIZES)


def test_it_shows_all_that_are_under_way_in_24_lines(simulation: Simulation) -> None:
    run = simulation.run("priority")
    num_looks = 0

    def look(step: StepReport, _: object) -> None:
        nonlocal num_looks
        if step.output.preemptions:
            num_looks += 1
            text = text_of(run, 80, 24)
            for record in run.requests:
                status = record.status
                if not status.is_finished and status.value != "waiting":
                    assert re.search(rf"^{record.request_id} +{status.value} ", text, re.M)

    run.engine.listeners.append(look)
    run.serve()
    assert num_looks > 10


def test_a_finished_run_can_be_shown(simulation: Simulation) -> None:
    run = simulation.run("priority")
    run.serve()
    assert "finished" in text_of(run, 80, 24)


def test_a_run_that_has_not_begun_can_be_shown(simulation: Simulation) -> None:
    assert "a title" in text_of(simulation.run("priority"), 80, 24)


def test_without_a_terminal_there_are_plain_lines_now_and_then(simulation: Simulation) -> None:
    file = io.StringIO()
    run = simulation.run("priority")
    with make_view(Console(file=file, force_terminal=False, width=80)) as view:
        view.follow(run, "a title")
        run.serve()
    lines = file.getvalue().splitlines()
    assert lines[0] == "a title"
    assert 3 <= len(lines) <= 1 + run.elapsed / 5
    assert all("running" in line and "pool" in line for line in lines[1:])
    assert "\x1b" not in file.getvalue()


def test_a_terminal_is_as_before_afterwards(simulation: Simulation) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24)
    with pytest.raises(KeyboardInterrupt), make_view(console) as view:
        run = simulation.run("priority")
        view.follow(run, "a title")

        def interrupt(*_: object) -> None:
            if run.elapsed > 3:
                raise KeyboardInterrupt

        run.engine.listeners.append(interrupt)
        run.serve()
    output = file.getvalue()
    assert "batch-01" in output
    assert output.rindex("\x1b[?1049l") > output.rindex("\x1b[?1049h"), "the other screen is left"
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is back"
