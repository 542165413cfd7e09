"""Forecasts: what the cost model and the ranking say about waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from headway.core.cost_model import CostModel
from headway.core.forecast import Forecast

if TYPE_CHECKING:
    from tests.core.conftest import Lab

#: A step takes 10 ms, a prefill token one more.
MODEL = (10.0, 1.0, 0.0, 0.0)


def waits(lab: Lab) -> dict[str, float]:
    return {one.request_id: ms for one, ms in Forecast(lab.scheduler).waits_ms()}


def test_who_has_a_slot_does_not_wait_and_the_next_waits_for_the_first_end(lab: type[Lab]) -> None:
    busy = lab(cost_model=CostModel(MODEL), max_num_seqs=2)
    busy.add("long", 0, max_tokens=21)
    busy.add("short", 0, max_tokens=11)
    busy.step()
    busy.add("next", 0, max_tokens=5)
    busy.add("last", 1, max_tokens=5)
    assert waits(busy) == pytest.approx(
        {"long": 0, "short": 0, "next": 100, "last": 100 + 4 + 50}, abs=1
    )
    assert Forecast(busy.scheduler).next_slot_ms() == pytest.approx(100)
    assert Forecast(busy.scheduler).next_slot_ms(2) == pytest.approx(200)
    assert Forecast(busy.scheduler).next_slot_ms(4) == pytest.approx(400)
    busy.drain()


def test_the_urgent_wait_for_nobody_and_those_displaced_wait_for_them(lab: type[Lab]) -> None:
    busy = lab(cost_model=CostModel(MODEL), max_num_seqs=1)
    busy.add("batch", 9, max_tokens=20)
    busy.step()
    busy.add("urgent", 0, num_prompt=30, max_tokens=3)
    busy.step()
    assert waits(busy) == pytest.approx({"urgent": 0, "batch": 20}, abs=1)
    busy.drain()


def test_prefills_before_it_are_waited_for_one_after_another(lab: type[Lab]) -> None:
    idle = lab(cost_model=CostModel(MODEL), max_num_seqs=8)
    for i in range(4):
        idle.add(f"r{i}", num_prompt=100, max_tokens=1)
    assert waits(idle) == pytest.approx({"r0": 0, "r1": 100, "r2": 200, "r3": 300})
    idle.drain()


def test_a_pool_for_two_serves_two_at_a_time(lab: type[Lab]) -> None:
    tight = lab(cost_model=CostModel(MODEL), max_num_seqs=8, num_blocks=12, block_size=4)
    for i in range(4):
        tight.add(f"r{i}", num_prompt=4, max_tokens=20)
    found = waits(tight)
    assert found["r1"] < 100
    assert found["r2"] == pytest.approx(200, abs=10)
    tight.drain()


def test_it_learns_how_much_of_what_they_may_requests_generate(lab: type[Lab]) -> None:
    busy = lab(cost_model=CostModel(MODEL), max_num_seqs=1)
    forecast = Forecast(busy.scheduler)
    request = busy.add("half", max_tokens=100)
    while request.num_output_tokens < 50:
        busy.step()
    for _ in range(200):
        forecast.observe_finished(request)
    assert forecast.output_fraction == pytest.approx(0.5, abs=0.01)
    busy.scheduler.abort("half")
    busy.add("next", max_tokens=40)
    busy.step()
    busy.add("waiting", max_tokens=40)
    assert dict(forecast.waits_ms())[busy.scheduler.requests["waiting"]] == pytest.approx(190, 0.1)
    busy.drain()


def test_those_who_take_turns_take_longer(lab: type[Lab]) -> None:
    """Four decode, and a bounded step has time for two."""
    bounded = lab(cost_model=CostModel((10.0, 0.0, 10.0, 0.0)), max_num_seqs=4, max_step_ms=30.0)
    for i in range(4):
        bounded.add(f"r{i}", num_prompt=1, max_tokens=11)
    bounded.steps(4)
    bounded.add("next", max_tokens=1)
    fewest = min(11 - one.num_output_tokens for one in bounded.scheduler.resident)
    assert waits(bounded)["next"] == pytest.approx(fewest * 2 * 30)
    bounded.drain()


def test_nobody_there_means_no_wait(lab: type[Lab]) -> None:
    idle = lab()
    assert waits(idle) == {}
    assert Forecast(idle.scheduler).next_slot_ms(3) == 0.0
