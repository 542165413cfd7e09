"""What needs no prompt: the models, the server's health, version and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai import NotFoundError, OpenAI

from headway import __version__


def test_the_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("story", "model", "headway")
    assert client.models.retrieve("story") == model
    assert model.to_dict()["max_model_len"] == 800
    with pytest.raises(NotFoundError, match="gpt-5"):
        client.models.retrieve("gpt-5")


def test_a_models_name_may_be_a_path(serve: Callable[..., Any]) -> None:
    server = serve(served_model_names=("story", "my/tale.gguf"))
    listed = server.call("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["story", "my/tale.gguf"]
    assert server.call("GET", "/v1/models/my/tale.gguf").json()["id"] == "my/tale.gguf"


def test_health_version_and_metrics(server: Any) -> None:
    assert server.call("GET", "/health").json() == {"status": "ok"}
    assert server.call("GET", "/version").json() == {"version": __version__}
    metrics = server.call("GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert b"headway:num_requests_running" in metrics.body
