"""The plug-in's settings. Runs without vLLM."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.core.errors import ConfigError
from headway.core.policy import AgingPolicy, DeadlinePolicy, FCFSPolicy, PriorityPolicy
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO, SLOTable
from headway.vllm.config import HeadwayConfig


class Asked(NamedTuple):
    """What policies look at in a request."""

    priority: int
    arrival_time: float = 10.0
    deadline: float | None = None


def parse(**settings: Any) -> HeadwayConfig:
    """As if they had come from the command line."""
    return HeadwayConfig.parse(json.loads(json.dumps({"headway": settings})))


# ---------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("additional_config", [None, {}, {"headway": {}}, {"another": 1}, object()])
def test_every_setting_has_a_default(additional_config: object) -> None:
    config = HeadwayConfig.parse(additional_config)
    assert config == HeadwayConfig()
    assert isinstance(config.make_policy(), PriorityPolicy)
    assert config.sharing.share_ms == math.inf
    assert not config.is_timed


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"policy": "priority"}, PriorityPolicy),
        ({"policy": "fcfs"}, FCFSPolicy),
        ({"policy": "aging", "tau_s": 20, "margin_s": 5}, AgingPolicy),
        ({"policy": "deadline", "margin_s": 0.5, "default_target_s": 8}, DeadlinePolicy),
    ],
    ids=lambda value: value.get("policy") if isinstance(value, dict) else "",
)
def test_the_policy_is_the_one_that_is_named(settings: dict[str, Any], policy: type) -> None:
    assert type(parse(**settings).make_policy()) is policy


def test_aging_has_its_settings() -> None:
    policy = parse(policy="aging", tau_s=20, margin_s=5).make_policy()
    assert isinstance(policy, AgingPolicy)
    assert (policy.tau, policy.margin) == (20, 5)
    default = parse(policy="aging", tau_s=20).make_policy()
    assert isinstance(default, AgingPolicy)
    assert default.margin == AgingPolicy(20).margin


def test_deadlines_have_their_settings() -> None:
    config = parse(
        policy="deadline", slos=["0:ttft=300ms", "2:ttft=2s"], margin_s=0.5, default_target_s=8
    )
    assert config.slos == ("0:ttft=300ms", "2:ttft=2s")
    policy = config.make_policy()
    assert isinstance(policy, DeadlinePolicy)
    # A class is of the requests up to its priority; behind the last there is none.
    keys = [policy.key(Asked(priority))[0] for priority in (0, 2, 3)]
    assert keys == [10.3, 12.0, 18.0]
    assert policy.threshold(Asked(3))[0] == 18.5


@pytest.mark.parametrize(
    ("settings", "share_ms", "is_timed", "bounds_all_steps"),
    [
        ({"share": "all"}, math.inf, False, False),
        ({"share": "none"}, 0.0, False, False),
        ({"share": "40ms"}, 40.0, True, False),
        ({"share": "12.5ms"}, 12.5, True, False),
        ({"share": "none", "max_step_ms": 50}, 0.0, True, True),
        ({"slos": ["0:ttft=1s"]}, math.inf, True, True),
        ({"slos": ["0:tpot=40ms"]}, math.inf, True, True),
    ],
)
def test_what_bounds_steps_in_time(
    settings: dict[str, Any], share_ms: float, is_timed: bool, bounds_all_steps: bool
) -> None:
    config = parse(**settings)
    found = (config.sharing.share_ms, config.is_timed, config.bounds_all_steps)
    assert found == (share_ms, is_timed, bounds_all_steps)


@pytest.mark.parametrize("policy", ["priority", "aging", "deadline", "fcfs"])
def test_every_policy_has_classes_with_both_targets(policy: str) -> None:
    config = parse(policy=policy, slos=["5:ttft=2s", "0:ttft=300ms,tpot=40ms"], max_step_ms=100)
    assert config.slo_table.slos == (SLO(0, 300, 40), SLO(5, 2000))
    assert config.slo_table.step_limit_ms == SLOTable(config.slo_table.slos, 100).step_limit_ms


def test_a_class_without_a_ttft_target_has_the_default_deadline() -> None:
    policy = parse(policy="deadline", slos=["0:tpot=40ms"], default_target_s=8).make_policy()
    assert policy.key(Asked(0))[0] == 18.0


def test_the_rules_for_sharing_are_kept() -> None:
    config = parse(victim="last", max_preemptions=1, prefill_share=1, share="none")
    assert config.sharing == SharingRules("none", 1, "last", 1)
    assert HeadwayConfig().sharing == SharingRules("all", 0.25, "cheapest", 3)
    assert parse(max_preemptions=None).sharing.max_preemptions is None
    assert parse(max_step_ms=50.5).max_step_ms == 50.5


def test_what_is_logged_names_the_policy_the_share_and_what_was_changed() -> None:
    assert str(HeadwayConfig()) == "policy=priority, share=all"
    config = parse(policy="aging", tau_s=20, victim="last")
    assert str(config) == "policy=aging, tau_s=20, victim=last, share=all"


# ---------------------------------------------------------------------- what is refused

NOT_A_NUMBER = ("20", True, [20], {})

BAD = [
    *(("policy", value, "priority, aging") for value in ("urgent", "", None, 1, [], {})),
    *(("victim", value, "last, cheapest") for value in ("dearest", None, 1, [])),
    *(
        ("share", value, "all, none, or a time")
        for value in ("some", "0ms", "-4ms", "4s", 40, None)
    ),
    *(("max_preemptions", value, "at least 1") for value in (0, -1)),
    *(("max_preemptions", value, "an integer") for value in (1.5, "3", True, [])),
    *(("prefill_share", value, "above 0, at most 1") for value in (0, -0.5, 1.01, math.nan, None)),
    *(("prefill_share", value, "above 0, at most 1") for value in NOT_A_NUMBER),
    *(("max_step_ms", value, "above 0") for value in (0, -1, math.inf, math.nan, *NOT_A_NUMBER)),
    *(("slos", value, "must be a list") for value in ("0:ttft=300ms", None, [1], {"0": "300ms"})),
]

#: Settings that only some policies have.
BAD_FOR = [
    *(("aging", "tau_s", value, "a number of seconds") for value in (*NOT_A_NUMBER, None)),
    *(("aging", "tau_s", value, "above 0") for value in (0, -1, math.inf, math.nan)),
    *(("aging", "margin_s", value, "a number of seconds") for value in NOT_A_NUMBER),
    *(("aging", "margin_s", value, "at least 0") for value in (-1, math.inf, math.nan)),
    *(("deadline", "margin_s", value, "at least 0") for value in (-1, math.inf, math.nan)),
    *(
        ("deadline", "default_target_s", value, "a number of seconds")
        for value in (*NOT_A_NUMBER, None)
    ),
    *(("deadline", "default_target_s", value, "at least 0") for value in (-1, math.nan)),
]


def message(**settings: Any) -> str:
    """What the operator is told."""
    with pytest.raises(ConfigError) as caught:
        parse(**settings)
    text = str(caught.value)
    assert text.startswith("headway in --additional-config: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("key", "value", "limit"), BAD)
def test_a_bad_value_is_named_with_its_limit(key: str, value: object, limit: str) -> None:
    text = message(**{key: value})
    assert f"{key} is {value!r}, must be " in text
    assert limit in text


@pytest.mark.parametrize(("policy", "key", "value", "limit"), BAD_FOR)
def test_a_bad_value_for_a_policy_is_named_with_its_limit(
    policy: str, key: str, value: object, limit: str
) -> None:
    text = message(policy=policy, **{key: value})
    assert key.removesuffix("_s") in text
    assert repr(value) in text
    assert limit in text


@pytest.mark.parametrize(
    "slo", ["0", "0:ttft", "x:ttft=300ms", "0:ttft=soon", "0:wait=300ms", "0:tpot=1ms,tpot=2ms"]
)
def test_an_slo_that_cannot_be_read_is_named(slo: str) -> None:
    assert repr(slo) in message(slos=[slo])


def test_two_classes_of_one_priority_are_refused() -> None:
    text = message(slos=["0:ttft=300ms", "0:tpot=30ms"])
    assert "two SLOs for priority 0" in text


@pytest.mark.parametrize(
    ("key", "value", "policy"),
    [
        ("tau_s", 20, "priority"),
        ("tau_s", 20, "deadline"),
        ("margin_s", 1, "priority"),
        ("margin_s", 1, "fcfs"),
        ("default_target_s", 8, "aging"),
    ],
)
def test_a_setting_that_the_policy_does_not_have_is_refused(
    key: str, value: object, policy: str
) -> None:
    text = message(policy=policy, **{key: value})
    assert f"{key} is for policy " in text
    assert text.endswith(f", not {policy}")


def test_an_unknown_key_is_named_with_those_there_are() -> None:
    text = message(polciy="aging")
    assert "unknown key 'polciy'" in text
    assert all(field.name in text for field in fields(HeadwayConfig))


@pytest.mark.parametrize("settings", [None, "aging", 3, ["aging"]])
def test_settings_are_an_object(settings: object) -> None:
    with pytest.raises(ConfigError, match=r"^headway in --additional-config: .*object"):
        HeadwayConfig.parse({"headway": settings})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    st.sampled_from(["priority", "aging", "deadline", "fcfs"]),
    st.dictionaries(
        st.sampled_from([field.name for field in fields(HeadwayConfig)]), JSON, max_size=2
    ),
)
def test_whatever_is_written_is_accepted_or_refused_in_one_line(
    policy: str, others: dict[str, Any]
) -> None:
    try:
        HeadwayConfig.parse({"headway": {"policy": policy, **others}}).make_policy()
    except ConfigError as error:
        assert "\n" not in str(error)
