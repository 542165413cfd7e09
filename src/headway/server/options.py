"""The options of ``headway serve``, in the order in which its help lists them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from headway.core.errors import ConfigError
from headway.options import (
    ENGINE_OPTIONS,
    ENGINE_TOPIC,
    MAX_STEP_MS,
    QUEUE_OPTIONS,
    SHARING_OPTIONS,
    SLOS,
    Option,
    format_bytes,
    parse_bytes,
    setting,
)
from headway.server.config import DEFAULT_SERVICE_TIERS, LOG_LEVELS, ServerConfig

__all__ = ["SERVE_OPTIONS"]

_ENDPOINT: Final = "Endpoint"
_ACCESS: Final = "Access"
_CLIENTS: Final = "Limits of a client"
_LOGS: Final = "Logs and traces"

#: Of a server that is told nothing: a bound, so that a request that arrives never waits long for
#: the step in flight, and a queue that is answered in minutes.
_MAX_STEP_MS: Final = 50.0
_MAX_NUM_QUEUED_REQS: Final = 4096


def _parse_tiers(texts: Iterable[str]) -> Mapping[str, int]:
    tiers = {}
    for text in texts:
        name, _, priority = text.rpartition("=")
        try:
            tiers[name] = int(priority)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"service_tier is {text!r}, must be of the form NAME=PRIORITY")
    return tiers


def _parse_origins(text: str) -> tuple[str, ...]:
    try:
        origins = json.loads(text)
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise ConfigError(f"allowed_origins is {text!r}, must be a JSON list of texts")
    return tuple(origins)


_setting: Final = partial(setting, ServerConfig)
_num_queued_reqs, *_queue = QUEUE_OPTIONS

SERVE_OPTIONS: Final[tuple[Option, ...]] = (
    _setting(
        "host",
        "Where to listen. Without API keys, only addresses of this machine's own are accepted.",
        _ENDPOINT,
        metavar="NAME",
    ),
    _setting("port", "0: any that is free.", _ENDPOINT),
    _setting(
        "served_model_names",
        "What clients call the model; may be given several times, the first is what answers say.",
        _ENDPOINT,
        name="served_model_name",
        kind=list[str] | None,
        read=tuple,
        metavar="NAME",
        show_default="MODEL's, without path and .gguf",
    ),
    _setting(
        "shutdown_timeout",
        "What running requests get after SIGTERM or Ctrl-C; a second one ends at once.",
        _ENDPOINT,
        metavar="SECONDS",
    ),
    Option(
        "api_key",
        list[str] | None,
        None,
        "Clients must have it; may be given several times. Users that can list this machine's "
        "processes can see it here, but not in the environment or in a file.",
        _ACCESS,
        details={"metavar": "KEY", "envvar": "HEADWAY_API_KEY"},
    ),
    Option(
        "api_key_file",
        Path | None,
        None,
        "JSON: a list of {key, tenant, most_urgent_priority, max_concurrent, cache_group}; the "
        "last three may be left out.",
        _ACCESS,
        details={"metavar": "FILE"},
    ),
    _setting(
        "allow_unauthenticated",
        "Serve all clients that can connect, on any --host.",
        _ACCESS,
        flags=("--allow-unauthenticated",),
    ),
    _setting(
        "allowed_hosts",
        "A name by which clients may call a server without API keys, beside --host, localhost "
        "and loopback addresses; may be given several times. A web page could make up others.",
        _ACCESS,
        name="allowed_host",
        kind=list[str] | None,
        read=tuple,
        metavar="NAME",
    ),
    _setting(
        "allowed_origins",
        "Origins whose web pages may use it, as '[\"https://example.org\"]'; '[\"*\"]': all.",
        _ACCESS,
        kind=str,
        read=_parse_origins,
        write=lambda origins: json.dumps(list(origins)),
        metavar="JSON",
    ),
    SLOS,
    MAX_STEP_MS.with_default(_MAX_STEP_MS),
    _setting(
        "default_priority",
        "Of requests that ask for none; smaller is more urgent.",
        SLOS.topic,
    ),
    _setting(
        "service_tiers",
        "What OpenAI's service_tier means; may be given several times. auto and default are the "
        "default priority.",
        SLOS.topic,
        name="service_tier",
        kind=list[str] | None,
        read=_parse_tiers,
        metavar="NAME=PRIORITY",
        show_default=", ".join(f"{name}={value}" for name, value in DEFAULT_SERVICE_TIERS.items()),
    ),
    *SHARING_OPTIONS,
    _num_queued_reqs.with_default(_MAX_NUM_QUEUED_REQS),
    *_queue,
    *ENGINE_OPTIONS,
    Option(
        "block_size",
        int | None,
        None,
        "Tokens in a KV block; only the model's own is accepted.",
        ENGINE_TOPIC,
        details={"show_default": "the model's"},
    ),
    _setting(
        "max_body_bytes",
        "Of a request's body; longer ones get 413.",
        _CLIENTS,
        write=format_bytes,
        parser=parse_bytes,
        metavar="SIZE",
    ),
    _setting(
        "request_timeout",
        "In which a request must have arrived whole.",
        _CLIENTS,
        metavar="SECONDS",
    ),
    _setting(
        "send_timeout",
        "A client that reads nothing for so long is disconnected.",
        _CLIENTS,
        metavar="SECONDS",
    ),
    _setting(
        "max_buffered_tokens",
        "Output that waits for a slow reader; at more, its stream is ended.",
        _CLIENTS,
    ),
    _setting(
        "stream_keep_alive",
        "A stream that has been silent for so long gets a comment, so that no proxy takes it for "
        "dead; 0: never.",
        _CLIENTS,
        metavar="SECONDS",
    ),
    _setting(
        "stream_keep_alive_before_first_token",
        "Comments also while a stream waits for its first token. What prevents its answer, a full "
        "queue for one, is then told in the stream and not by the status.",
        _CLIENTS,
        flags=("--stream-keep-alive-before-first-token",),
    ),
    _setting(
        "otlp_endpoint",
        "Send OpenTelemetry spans there, as http://localhost:4318; needs "
        "pip install 'headway-llm[otel]'.",
        _LOGS,
        metavar="URL",
    ),
    _setting(
        "metrics_by_tenant",
        "Give metrics of requests the label tenant, which makes many more series.",
        _LOGS,
        flags=("--metrics-by-tenant",),
    ),
    _setting("access_log", "Log every request.", _LOGS, flags=("--access-log",)),
    _setting(
        "log_level",
        "Of the HTTP server.",
        _LOGS,
        name="uvicorn_log_level",
        metavar=f"[{'|'.join(LOG_LEVELS)}]",
    ),
)
