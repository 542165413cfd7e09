"""``headway serve``: from options to a running server.

This module is imported for every ``headway --help``, so the web framework and what runs models are
imported by what needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from headway import console
from headway.core.errors import ConfigError
from headway.core.sharing_rules import SharingRules
from headway.engine.config import EngineConfig
from headway.options import MODEL, settings_of, takes
from headway.server.config import ServerConfig
from headway.server.edge.api_keys import collect_api_keys
from headway.server.options import SERVE_OPTIONS

__all__ = ["EPILOG", "serve"]

EPILOG: Final = (
    "\b\nExamples:\n"
    "  headway serve\n"
    "  headway serve --slo 0:ttft=200ms,tpot=40ms --service-tier urgent=0\n"
    "  headway serve --host 0.0.0.0 --api-key-file keys.json path/to/model.gguf\n"
    "\n"
    "Names and meanings of options are vLLM's where it has them."
)


@takes(*SERVE_OPTIONS)
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL.help)] = MODEL.default,
    **values: Any,
) -> None:
    """Serve a MODEL to OpenAI's clients; urgent requests do not wait for others."""
    # All that can be refused without a model is refused before one is loaded.
    values["served_model_name"] = values["served_model_name"] or [
        Path(model).name.removesuffix(".gguf")
    ]
    config = ServerConfig(
        **settings_of(ServerConfig, SERVE_OPTIONS, values),
        api_keys=collect_api_keys(values["api_key"] or (), values["api_key_file"]),
    )
    engine_config = EngineConfig(
        model=model,
        sharing=SharingRules(**settings_of(SharingRules, SERVE_OPTIONS, values)),
        **settings_of(EngineConfig, SERVE_OPTIONS, values),
    )

    from headway.engine.async_engine import AsyncEngine  # noqa: PLC0415
    from headway.engine.warm_up import warm_up  # noqa: PLC0415
    from headway.server import run  # noqa: PLC0415
    from headway.server.announcement import announce  # noqa: PLC0415
    from headway.server.telemetry import tracing  # noqa: PLC0415

    if config.otlp_endpoint is not None:
        tracing.check_endpoint(config.otlp_endpoint)
    with run.bind(config) as listener:
        with console.startup_bar() as progress:
            engine = engine_config.build(progress)
            own_block_size = engine.executor.block_size
            if values["block_size"] not in (None, own_block_size):
                engine.close()
                raise ConfigError(f"block_size is {values['block_size']}, must be {own_block_size}")
            warm_up(engine, lambda fraction: progress("warm up", fraction))
        url = run.base_url(config, listener)
        client = AsyncEngine(engine, config.max_buffered_tokens)
        run.run(client, config, listener, lambda: announce(client, config, url))
