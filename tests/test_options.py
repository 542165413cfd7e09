"""Options: what commands read is what configurations have."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from headway.cli import app
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO
from headway.engine.config import EngineConfig
from headway.options import (
    ENGINE_OPTIONS,
    MODEL,
    Option,
    format_bytes,
    parse_bytes,
    settings_of,
)
from headway.server.config import ServerConfig
from headway.server.options import SERVE_OPTIONS

#: Fields that no option sets, or that are put together from several.
WITHOUT_OPTION = {
    EngineConfig: {"model", "executor", "sharing"},
    SharingRules: {"victim_order", "share_ms"},  # derived
    ServerConfig: {"api_keys", "max_num_choices", "max_stop"},
}


def read(command: str, *args: str) -> dict[str, Any]:
    """What a command gets as keyword arguments."""
    group: Any = typer.main.get_command(app)
    context = group.commands[command].make_context(command, list(args))
    parameters: dict[str, Any] = context.params
    return parameters


def settings(config: type, options: tuple[Option, ...], values: dict[str, Any]) -> dict[str, Any]:
    """The fields that are set to something else than their defaults."""
    needed = {"served_model_names": ("m",)} if config is ServerConfig else {}
    default = config(**needed)
    changed = config(**(needed | settings_of(config, options, values)))
    return {
        field.name: getattr(changed, field.name)
        for field in fields(config)
        if getattr(changed, field.name) != getattr(default, field.name)
    }


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig, SharingRules])
def test_every_field_has_one_option(config: type) -> None:
    names = [option.field_name for option in SERVE_OPTIONS if option.config is config]
    assert len(names) == len(set(names))
    assert {*names} | WITHOUT_OPTION[config] == {field.name for field in fields(config)}


def test_commands_that_are_told_nothing_have_the_defaults() -> None:
    mode = {"preemption_mode": EngineConfig().preemption_mode.value}  # by its name
    options = (MODEL, *ENGINE_OPTIONS)
    assert settings(EngineConfig, options, read("generate", "hi")) == mode
    values = read("serve")
    assert settings(ServerConfig, SERVE_OPTIONS, values) == {}
    own = {"max_step_ms": 50.0, "max_num_queued_reqs": 4096}
    assert settings(EngineConfig, SERVE_OPTIONS, values) == own | mode


@pytest.mark.parametrize(
    ("option", "texts", "config", "field", "value"),
    [
        ("--max-num-seqs", ["7"], EngineConfig, "max_num_seqs", 7),
        ("--kv-cache-bytes", ["1MiB"], EngineConfig, "kv_cache_bytes", 1 << 20),
        ("--swap-space-bytes", ["0"], EngineConfig, "swap_space_bytes", 0),
        ("--no-enable-prefix-caching", [], EngineConfig, "enable_prefix_caching", False),
        ("--queue-timeout", ["1.5"], EngineConfig, "queue_timeout", 1.5),
        ("--share", ["40ms"], SharingRules, "share", "40ms"),
        ("--prefill-share", ["0.25"], SharingRules, "prefill_share", 0.25),
        ("--victim", ["cheapest"], SharingRules, "victim", "cheapest"),
        ("--max-preemptions", ["3"], SharingRules, "max_preemptions", 3),
        ("--metrics-by-tenant", [], ServerConfig, "metrics_by_tenant", True),
        ("--slo", ["1:tpot=2", "0:ttft=1s"], EngineConfig, "slos", (SLO(1, None, 2), SLO(0, 1e3))),
        ("--served-model-name", ["a", "b"], ServerConfig, "served_model_names", ("a", "b")),
        ("--allowed-host", ["a", "b"], ServerConfig, "allowed_hosts", ("a", "b")),
        ("--allowed-origins", ['["*"]'], ServerConfig, "allowed_origins", ("*",)),
        ("--max-body-bytes", ["1K"], ServerConfig, "max_body_bytes", 1024),
        ("--stream-keep-alive", ["0"], ServerConfig, "stream_keep_alive", 0),
        ("--uvicorn-log-level", ["info"], ServerConfig, "log_level", "info"),
        ("--access-log", [], ServerConfig, "access_log", True),
    ],
)
def test_options_are_read(
    option: str, texts: list[str], config: type, field: str, value: Any
) -> None:
    args = [word for text in texts for word in (option, text)] or [option]
    values = settings_of(config, SERVE_OPTIONS, read("serve", *args))
    assert values[field] == value


def test_service_tiers_are_read() -> None:
    values = read("serve", "--service-tier", "a=-3", "--service-tier", "b=c=4")
    settings = settings_of(ServerConfig, SERVE_OPTIONS, values)
    assert settings["service_tiers"] == {"a": -3, "b=c": 4}


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("2GiB", 2 << 30),
        ("2Gi", 2 << 30),
        ("2GB", 2_000_000_000),
        ("1.5G", 3 << 29),
        ("64 KiB", 64 << 10),
        ("100B", 100),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "3X", "1 2", "1iB", "0x10", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="512M"):
        parse_bytes(text)


@given(st.integers(0, 2**50))
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (4 << 20, "4MiB"), (1 << 40, "1TiB"), (1025, "1025")]
)
def test_sizes_are_written_shortly(size: int, text: str) -> None:
    assert format_bytes(size) == text
