"""``headway serve``: from options to a running server.

This module is imported for every ``headway --help``, so the web framework and the engine are
imported by what needs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from headway import console
from headway.core.config import PreemptionMode
from headway.core.errors import ConfigError
from headway.core.slo import SLO
from headway.models.registry import DEFAULT_MODEL
from headway.server.api_keys import collect_api_keys
from headway.server.config import DEFAULT_SERVICE_TIERS, LOG_LEVELS, ServerConfig

__all__ = ["EPILOG", "serve"]

EPILOG: Final = (
    "\b\nExamples:\n"
    "  headway serve\n"
    "  headway serve --slo 0:ttft=200ms,tpot=40ms --service-tier urgent=0\n"
    "  headway serve --host 0.0.0.0 --api-key-file keys.json path/to/model.gguf\n"
    "\n"
    "Names and meanings of options are vLLM's where it has them."
)

_ENDPOINT: Final = "Endpoint"
_ACCESS: Final = "Access"
_PRIORITIES: Final = "Priorities and targets"
_QUEUE: Final = "Queue"
_CLIENTS: Final = "Limits of a client"
_LOGS: Final = "Logs and traces"

_TIERS: Final = ", ".join(f"{name}={priority}" for name, priority in DEFAULT_SERVICE_TIERS.items())


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A known model (headway models) or a .gguf file.")
    ] = DEFAULT_MODEL,
    host: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where to listen. Without API keys, only addresses of this machine's own are "
            "accepted.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0: any that is free.", rich_help_panel=_ENDPOINT)
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What clients call the model; may be given several times, the first is what "
            "answers say.",
            show_default="MODEL's, without path and .gguf",
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="What running requests get after SIGTERM or Ctrl-C; a second one ends at once.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = 30.0,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="HEADWAY_API_KEY",
            help="Clients must have it; may be given several times. Who can list processes can "
            "see it here; not so in the environment, or in a file.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON: a list of {key, tenant, most_urgent_priority, max_concurrent}; the last "
            "two may be left out.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated",
            help="Let everybody who can connect use it, on any --host.",
            rich_help_panel=_ACCESS,
        ),
    ] = False,
    allowed_origins: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="Origins whose web pages may use it, as '[\"https://example.org\"]'; "
            "'[\"*\"]': all.",
            rich_help_panel=_ACCESS,
        ),
    ] = "[]",
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PRIORITY:TARGETS",
            help="Targets for requests that are at least so urgent, as 0:ttft=200ms,tpot=40ms "
            "(time to first token, time per token); may be given several times. Steps are cut so "
            "that they can be met.",
            rich_help_panel=_PRIORITIES,
        ),
    ] = None,
    max_step_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="No step is predicted to take longer, targets or not; an urgent request waits "
            "for the step in flight.",
            rich_help_panel=_PRIORITIES,
        ),
    ] = 50.0,
    default_priority: Annotated[
        int,
        typer.Option(
            help="Of requests that ask for none; smaller is more urgent.",
            rich_help_panel=_PRIORITIES,
        ),
    ] = 0,
    service_tier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PRIORITY",
            help="What OpenAI's service_tier means; may be given several times. auto and default "
            "are the default priority.",
            show_default=_TIERS,
            rich_help_panel=_PRIORITIES,
        ),
    ] = None,
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(
            help="Requests that may wait. When they do, the least urgent one gets 503 and when to "
            "try again.",
            rich_help_panel=_QUEUE,
        ),
    ] = 4096,
    max_queued_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompts that may wait.",
            show_default="no limit",
            rich_help_panel=_QUEUE,
        ),
    ] = None,
    queue_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="A request that has waited so long for its first step gets 503.",
            show_default="no limit",
            rich_help_panel=_QUEUE,
        ),
    ] = None,
    scheduling_policy: console.SchedulingPolicyName = "priority",
    preemption_mode: console.PreemptionModeName = PreemptionMode.AUTO.value,
    max_num_seqs: console.MaxNumSeqs = 64,
    max_num_batched_tokens: console.MaxNumBatchedTokens = 256,
    max_model_len: console.MaxModelLen = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a KV block; only the model's own is accepted.",
            show_default="the model's",
            rich_help_panel=console.ENGINE_TOPIC,
        ),
    ] = None,
    kv_cache_bytes: console.KVCacheBytes = None,
    swap_space_bytes: console.SwapSpaceBytes = None,
    enable_prefix_caching: console.PrefixCaching = True,
    max_body_bytes: Annotated[
        int,
        typer.Option(
            parser=console.parse_bytes,
            metavar="SIZE",
            help="Of a request's body; longer ones get 413.",
            rich_help_panel=_CLIENTS,
        ),
    ] = "4MiB",  # type: ignore[assignment]  # goes through the parser
    request_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="In which a request must have arrived whole.",
            rich_help_panel=_CLIENTS,
        ),
    ] = 30.0,
    send_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="A client that reads nothing for so long is disconnected.",
            rich_help_panel=_CLIENTS,
        ),
    ] = 30.0,
    max_buffered_tokens: Annotated[
        int,
        typer.Option(
            help="Output that waits for a slow reader; at more, its stream is ended.",
            rich_help_panel=_CLIENTS,
        ),
    ] = 1024,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send OpenTelemetry spans there, as http://localhost:4318; needs "
            "pip install 'headway-llm[otel]'.",
            rich_help_panel=_LOGS,
        ),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log every request.", rich_help_panel=_LOGS)
    ] = False,
    uvicorn_log_level: Annotated[
        str,
        typer.Option(
            metavar=f"[{'|'.join(LOG_LEVELS)}]",
            help="Of the HTTP server.",
            rich_help_panel=_LOGS,
        ),
    ] = "warning",
) -> None:
    """Serve a MODEL to OpenAI's clients; urgent requests do not wait for others."""
    # All that can be refused without a model is refused before one is loaded.
    config = ServerConfig(
        served_model_names=tuple(served_model_name or [Path(model).name.removesuffix(".gguf")]),
        host=host,
        port=port,
        api_keys=collect_api_keys(api_key or (), api_key_file),
        allow_unauthenticated=allow_unauthenticated,
        allowed_origins=_parse_origins(allowed_origins),
        service_tiers=_parse_tiers(service_tier or ()),
        default_priority=default_priority,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        send_timeout=send_timeout,
        max_buffered_tokens=max_buffered_tokens,
        shutdown_timeout=shutdown_timeout,
        otlp_endpoint=otlp_endpoint,
        access_log=access_log,
        log_level=uvicorn_log_level,
    )
    slos = tuple(map(SLO.parse, slo or ()))

    from headway.engine.config import EngineConfig  # noqa: PLC0415
    from headway.engine.warm_up import warm_up  # noqa: PLC0415
    from headway.server import run, tracing  # noqa: PLC0415
    from headway.server.announcement import announce  # noqa: PLC0415

    engine_config = EngineConfig(
        model=model,
        scheduling_policy=scheduling_policy,
        preemption_mode=preemption_mode,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        kv_cache_bytes=kv_cache_bytes,
        swap_space_bytes=swap_space_bytes,
        enable_prefix_caching=enable_prefix_caching,
        max_step_ms=max_step_ms,
        slos=slos,
        max_num_queued_reqs=max_num_queued_reqs,
        max_queued_tokens=max_queued_tokens,
        queue_timeout=queue_timeout,
    )
    if otlp_endpoint is not None:
        tracing.check_endpoint(otlp_endpoint)
    with run.bind(config) as listener:
        with console.startup_bar() as progress:
            engine = engine_config.build(progress)
            if block_size not in (None, engine.executor.block_size):
                engine.close()
                own = engine.executor.block_size
                raise ConfigError(f"block_size is {block_size}, must be {own}")
            warm_up(engine, lambda fraction: progress("warm up", fraction))
        url = run.base_url(config, listener)
        run.run(engine, config, listener, lambda: announce(engine, config, url))


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
    if not isinstance(origins, list) or not all(isinstance(one, str) for one in origins):
        raise ConfigError(f"allowed_origins is {text!r}, must be a JSON list of texts")
    return tuple(origins)
