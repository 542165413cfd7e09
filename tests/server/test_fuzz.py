"""Requests made up from the server's own document: none breaks it, and it keeps to its word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

Serve = Callable[..., Any]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/requests/{request_id}"),
        ("GET", "/v1/requests"),
        ("GET", "/v1/requests/{request_id}"),
        ("DELETE", "/v1/requests/{request_id}"),
        ("GET", "/v1/models/{model}"),
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/version"),
        ("GET", "/metrics"),
    ],
)
def test_made_up_requests(serve: Serve, method: str, path: str) -> None:
    server = serve()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    strategy = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if method == "POST" or path == "/v1/requests":  # what others are given cannot be wrong
        strategy |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @given(case=strategy)
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    def test(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    test()
    server.assert_idle()
