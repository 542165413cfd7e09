"""Settings: defaults that work, and one line that names what does not."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.errors import ConfigError
from headway.core.policy import AgingPolicy, PriorityPolicy
from headway.core.scheduler import PriorityScheduler


def test_the_defaults() -> None:
    config = SchedulerConfig()
    assert config.max_num_seqs == 4
    assert isinstance(config.policy, PriorityPolicy)
    assert config.preemption_mode is PreemptionMode.AUTO
    assert config.max_request_tokens == config.num_blocks * config.block_size


@pytest.mark.parametrize("mode", PreemptionMode)
def test_a_mode_may_be_named(mode: PreemptionMode) -> None:
    assert SchedulerConfig(preemption_mode=mode.value).preemption_mode is mode
    assert SchedulerConfig(preemption_mode=mode).preemption_mode is mode


def test_a_policy_may_be_an_object() -> None:
    policy = AgingPolicy(tau=3.0)
    assert SchedulerConfig(policy=policy).policy is policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0, must be an integer of at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs is True, must be an integer of at least 1"),
        ({"max_num_seqs": 2.0}, "max_num_seqs is 2.0, must be an integer of at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0, must be an integer of at"),
        ({"num_blocks": 0}, "num_blocks is 0, must be an integer of at least 1"),
        ({"block_size": -1}, "block_size is -1, must be an integer of at least 1"),
        ({"num_swap_blocks": -1}, "num_swap_blocks is -1, must be an integer of at least 0"),
        ({"max_model_len": 1}, "max_model_len is 1, must be an integer of at least 2"),
        ({"max_model_len": "8"}, "max_model_len is '8', must be an integer of at least 2"),
        ({"max_step_ms": 0.0}, "max_step_ms is 0.0, must be above 0"),
        ({"max_step_ms": float("inf")}, "max_step_ms is inf, must be above 0"),
        ({"max_step_ms": float("nan")}, "max_step_ms is nan, must be above 0"),
        (
            {"preemption_mode": "kill"},
            "'kill', must be one of none, pause, tail, swap, recompute, auto",
        ),
        ({"policy": "random"}, "'random', must be one of fcfs, priority, aging, deadline"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        SchedulerConfig().max_num_seqs = 5  # type: ignore[misc]


def test_the_longest_request_is_the_smaller_of_context_and_pool() -> None:
    assert SchedulerConfig(num_blocks=4, block_size=4).max_request_tokens == 16
    assert SchedulerConfig(num_blocks=4, block_size=4, max_model_len=10).max_request_tokens == 10
    assert SchedulerConfig(num_blocks=4, block_size=4, max_model_len=99).max_request_tokens == 16


def test_the_batch_size_of_a_scheduler_is_its_number_of_slots() -> None:
    config = SchedulerConfig(num_blocks=7, policy=AgingPolicy(3.0))
    scheduler = PriorityScheduler(2, config)
    assert scheduler.config.max_num_seqs == 2
    assert scheduler.config.num_blocks == 7
    assert scheduler.policy is config.policy
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        PriorityScheduler(max_batch_size=0)
