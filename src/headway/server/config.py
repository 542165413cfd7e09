"""The server's settings, checked; the engine's are in ``headway.engine.config``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from headway.core.errors import ConfigError
from headway.core.priority import MAX_PRIORITY, MIN_PRIORITY
from headway.server.edge.api_keys import ApiKey

__all__ = ["DEFAULT_SERVICE_TIERS", "LOG_LEVELS", "UNSPECIFIC_TIERS", "ServerConfig"]

#: OpenAI's service tiers that ask for another priority than the default one.
DEFAULT_SERVICE_TIERS: Final[Mapping[str, int]] = {"priority": -10, "flex": 10}

#: OpenAI's service tiers that leave the priority to the server.
UNSPECIFIC_TIERS: Final = ("auto", "default")

#: uvicorn's levels, the quietest first.
LOG_LEVELS: Final = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True)
class ServerConfig:
    """How to serve.

    Attributes:
        served_model_names: what the model answers to; responses say the first.
        host: to bind to; a name or an address.
        port: to bind to; 0 = any that is free.
        api_keys: a request must have one of them; empty = it needs none.
        allow_unauthenticated: bind to other addresses than loopback ones even without keys.
        allowed_hosts: names that a ``Host`` header may say beside ``host``, ``localhost`` and
            loopback addresses; where there are keys, or ``allow_unauthenticated``, it may say
            anything.
        allowed_origins: web pages of these origins may use it (CORS); ``*`` = all.
        service_tiers: the priority each ``service_tier`` asks for. Those of
            ``DEFAULT_SERVICE_TIERS`` are there unless given; so are ``auto`` and ``default``, with
            the default priority.
        default_priority: of a request that asks for none.
        max_body_bytes: a longer body is refused. The default is a hundred times the text of an
            8,192-token context, and is parsed in a few hundredths of a second, for which all
            other clients wait.
        request_timeout: seconds in which a request must have arrived whole.
        send_timeout: seconds without progress after which a client that does not read is
            disconnected.
        max_buffered_tokens: output of a request that may wait for its reader; at more it is ended.
        stream_keep_alive: seconds of silence after which a stream that has begun gets a comment;
            0 = none does.
        stream_keep_alive_before_first_token: streams that have not begun get one, too. Their status
            is then 200, and what prevents their answers can only be an event.
        shutdown_timeout: seconds that running requests get after SIGTERM.
        max_num_choices: most completions of a prompt (``n``), times prompts of a request.
        max_stop: most stop texts of a request.
        otlp_endpoint: an OpenTelemetry collector, which gets a span for every request; None = no
            spans are made.
        metrics_by_tenant: metrics of requests have the label ``tenant``.
        access_log: log every request.
        log_level: of the HTTP server's own log.

    Raises:
        ConfigError: a value is out of range.
    """

    served_model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[ApiKey, ...] = ()
    allow_unauthenticated: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    service_tiers: Mapping[str, int] = field(default_factory=dict)
    default_priority: int = 0
    max_body_bytes: int = 4 << 20
    request_timeout: float = 30.0
    send_timeout: float = 30.0
    max_buffered_tokens: int = 1024
    stream_keep_alive: float = 15.0
    stream_keep_alive_before_first_token: bool = False
    shutdown_timeout: float = 30.0
    max_num_choices: int = 128
    max_stop: int = 16
    otlp_endpoint: str | None = None
    metrics_by_tenant: bool = False
    access_log: bool = False
    log_level: str = "warning"

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_names must be names, at least one")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, must be 0 … 65535")
        priorities = {"default_priority": self.default_priority} | {
            f"the priority of service tier {tier!r}": priority
            for tier, priority in self.service_tiers.items()
        }
        for name, priority in priorities.items():
            if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
                raise ConfigError(f"{name} is {priority}, must be an int64")
        for name in ("max_body_bytes", "max_buffered_tokens", "max_num_choices", "max_stop"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("request_timeout", "send_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)} s, must be above 0")
        for name in ("shutdown_timeout", "stream_keep_alive"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)} s, must be at least 0")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level is {self.log_level!r}, must be one of {', '.join(LOG_LEVELS)}"
            )
        tiers = {
            **dict.fromkeys(UNSPECIFIC_TIERS, self.default_priority),
            **DEFAULT_SERVICE_TIERS,
            **self.service_tiers,
        }
        object.__setattr__(self, "service_tiers", tiers)

    @property
    def is_protected(self) -> bool:
        """Whether others than this machine's own users may connect: with keys, or knowingly."""
        return bool(self.api_keys) or self.allow_unauthenticated

    @property
    def model_name(self) -> str:
        """The name that responses say."""
        return self.served_model_names[0]
