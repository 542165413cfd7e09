"""Service level objectives: how they are written, and whose they are."""

from __future__ import annotations

import pytest

from headway.core.config import SchedulerConfig
from headway.core.errors import ConfigError
from headway.core.policy import DeadlinePolicy
from headway.core.request import MAX_PRIORITY, MIN_PRIORITY, Request
from headway.core.slo import SLO, TTFT_SHARE, SLOTable


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("0:ttft=200ms,tpot=40ms", SLO(0, 200.0, 40.0)),
        ("0:tpot=40ms", SLO(0, None, 40.0)),
        ("-3:ttft=1.5s", SLO(-3, 1500.0)),
        (" 7 : ttft = 200 , tpot = 900us ", SLO(7, 200.0, 0.9)),
        (f"{MIN_PRIORITY}:ttft=1s", SLO(MIN_PRIORITY, 1000.0)),
    ],
)
def test_is_written_as_priority_and_targets(text: str, slo: SLO) -> None:
    assert SLO.parse(text) == slo
    assert SLO.parse(str(slo)) == slo


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0:",
        "ttft=200ms",
        "x:ttft=200ms",
        "0:ttft",
        "0:ttft=",
        "0:ttft=-1ms",
        "0:ttft=0ms",
        "0:ttft=1h",
        "0:ttft=1ms,ttft=2ms",
        "0:e2e=1ms",
        "0:ttft=inf",
        "1.5:ttft=1ms",
        f"{MAX_PRIORITY + 1}:ttft=1ms",
        f"{10**400}:ttft=1ms",
        f"0:ttft={10**400}",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        SLO.parse(text)


def test_a_class_reaches_down_to_the_next_more_urgent_one() -> None:
    interactive, standard = SLO(0, 100.0), SLO(5, 1000.0)
    table = SLOTable([standard, interactive])
    assert [table.of(priority) for priority in (MIN_PRIORITY, 0)] == [interactive] * 2
    assert [table.of(priority) for priority in (1, 5)] == [standard] * 2
    assert table.of(6) is None
    assert SLOTable().of(0) is None


def test_two_targets_for_one_priority_are_refused() -> None:
    with pytest.raises(ConfigError, match="two SLOs for priority 3"):
        SchedulerConfig(slos=(SLO(3, 1.0), SLO(3, 2.0)))


def test_no_step_takes_more_than_its_share_of_the_tightest_ttft() -> None:
    both = SchedulerConfig(slos=(SLO(0, 100.0), SLO(5, 50.0)))
    assert both.step_limit_ms == pytest.approx(50.0 * TTFT_SHARE)
    assert SchedulerConfig(max_step_ms=10.0, slos=(SLO(0, 100.0),)).step_limit_ms == 10.0
    assert SchedulerConfig(slos=(SLO(0, None, 5.0),)).step_limit_ms == float("inf")


def test_the_deadline_policy_takes_its_deadlines_from_the_classes() -> None:
    config = SchedulerConfig(policy="deadline", slos=(SLO(0, 2000.0), SLO(9, 30_000.0)))
    assert isinstance(config.policy, DeadlinePolicy)
    keys = [
        config.policy.key(Request("r", priority, "x", arrival_time=5.0))[0]
        for priority in (-1, 0, 4, 10)
    ]
    assert keys == [7.0, 7.0, 35.0, 65.0]


def test_a_first_token_has_half_of_its_target_but_leaves_the_classes_above_theirs() -> None:
    table = SLOTable([SLO(0, 100.0), SLO(5, None, 30.0), SLO(10, 60_000.0), SLO(20, 10.0)], 400.0)
    assert table.step_limit_ms == pytest.approx(10.0 * TTFT_SHARE)
    assert table.first_step_ms(-3) == table.first_step_ms(0) == pytest.approx(50.0)
    assert table.first_step_ms(3) == table.step_limit_ms  # without a target for first tokens
    assert table.first_step_ms(10) == pytest.approx(100.0 * TTFT_SHARE)
    assert table.first_step_ms(20) == pytest.approx(5.0)
    assert table.first_step_ms(21) == table.step_limit_ms
    bounded = SLOTable([SLO(0, 1000.0)], max_step_ms=40.0)
    assert bounded.first_step_ms(0) == bounded.step_limit_ms == 40.0
