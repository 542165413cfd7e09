"""All routes, and what they share.

The routes find on ``app.state``: ``engine``, ``config``, ``metrics`` and, if requests are traced,
``tracer``, which whoever builds the application puts there, and ``active`` and ``prompts``, which
``add_routes`` does.
"""

from __future__ import annotations

from fastapi import FastAPI

from headway.server import chat, completions, models_api, probes, requests_api
from headway.server.active import ActiveRequests
from headway.server.prompts import PromptEncoder

__all__ = ["add_routes"]


def add_routes(app: FastAPI) -> None:
    """Let an application answer; it must have ``app.state.engine`` by now."""
    engine = app.state.engine.engine
    app.state.active = ActiveRequests()
    app.state.prompts = PromptEncoder(engine.tokenizer, engine.scheduler.config.max_request_tokens)
    for one in (completions, chat, models_api, requests_api, probes):
        app.include_router(one.router)
