"""All routes; they find ``app.state.serving`` and ``app.state.metrics``."""

from __future__ import annotations

from fastapi import FastAPI

from headway.server.routes import chat, completions, models, probes, requests

__all__ = ["add_routes"]


def add_routes(app: FastAPI) -> None:
    """Let an application answer."""
    for module in (completions, chat, models, requests, probes):
        app.include_router(module.router)
