"""The server's settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headway.core.errors import ConfigError
from headway.server.config import ServerConfig


def test_service_tiers_are_added_to_the_usual_ones() -> None:
    config = ServerConfig(("m",), service_tiers={"flex": 50, "bulk": 99}, default_priority=5)
    assert config.service_tiers == {
        "auto": 5,
        "default": 5,
        "priority": -10,
        "flex": 50,
        "bulk": 99,
    }


def test_answers_say_the_first_name() -> None:
    assert ServerConfig(("first", "second")).model_name == "first"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"served_model_names": ()}, ["served_model_names"]),
        ({"served_model_names": ("m", "")}, ["served_model_names"]),
        ({"port": -1}, ["port is -1", "0 … 65535"]),
        ({"port": 65536}, ["port is 65536"]),
        ({"default_priority": 2**63}, ["default_priority", "int64"]),
        ({"service_tiers": {"now": -(2**63) - 1}}, ["'now'", "int64"]),
        ({"max_body_bytes": 0}, ["max_body_bytes is 0", "at least 1"]),
        ({"request_timeout": 0}, ["request_timeout is 0", "above 0"]),
        ({"request_timeout": math.nan}, ["request_timeout is nan"]),
        ({"send_timeout": math.inf}, ["send_timeout is inf"]),
        ({"shutdown_timeout": -1}, ["shutdown_timeout is -1", "at least 0"]),
        ({"stream_keep_alive": -1}, ["stream_keep_alive is -1", "at least 0"]),
        ({"shutdown_timeout": math.nan}, ["shutdown_timeout is nan"]),
        ({"log_level": "loud"}, ["'loud'", "warning"]),
    ],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as info:
        ServerConfig(**({"served_model_names": ("m",)} | settings))
    for word in words:
        assert word in str(info.value)
