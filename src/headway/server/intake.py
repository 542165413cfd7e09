"""What both kinds of completion do before anything is generated: whose, how urgent, how many."""

from __future__ import annotations

import re
import uuid
from typing import Final

from fastapi import Request

from headway.core.request import SamplingParams
from headway.server.active import ActiveRequest
from headway.server.auth import Tenant
from headway.server.config import ServerConfig
from headway.server.errors import ApiError
from headway.server.generation import Generation
from headway.server.priorities import priority_of
from headway.server.protocol import GenerationRequest
from headway.server.streaming import AnswerFormat, GenerationResponse
from headway.server.tracing import Tracer

__all__ = ["accept", "check_model", "respond"]

#: An id stands in paths and headers.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def accept(
    request: Request, body: GenerationRequest, tenant: Tenant, prefix: str, num_prompts: int
) -> ActiveRequest:
    """Check everything that can be checked without looking at the prompts.

    Args:
        request: the HTTP request.
        body: what it asks for.
        tenant: whose it is.
        prefix: of an id that is drawn.
        num_prompts: how many prompts it has.

    Raises:
        ApiError: the model is unknown, a number exceeds the server's limits, the id cannot stand in
            a path, or the priority is none or not allowed.
    """
    config: ServerConfig = request.app.state.config
    if body.model is not None:
        check_model(body.model, config)
    num_stop, num_parts = len(body.stop_texts), num_prompts * body.num_choices
    if num_stop > config.max_stop:
        raise ApiError(
            400, f"stop has {num_stop} texts, may have at most {config.max_stop}", param="stop"
        )
    if num_parts > config.max_num_choices:
        raise ApiError(
            400,
            f"{num_prompts} prompts with n={body.num_choices} make {num_parts} choices, "
            f"at most {config.max_num_choices} are allowed",
            param="prompt" if body.num_choices == 1 else "n",
        )
    request_id = request.headers.get("X-Request-Id", f"{prefix}-{uuid.uuid4().hex}")
    if not _REQUEST_ID.fullmatch(request_id):
        raise ApiError(
            400,
            f"X-Request-Id is {request_id!r}, must be 1 … 128 letters, digits and . _ : -",
            param="X-Request-Id",
        )
    priority = priority_of(request, body, tenant, config)
    return ActiveRequest.of(request_id, tenant, num_parts, priority)


def check_model(name: str, config: ServerConfig) -> None:
    """Refuse a model that is not served.

    Raises:
        ApiError: 404.
    """
    if name not in config.served_model_names:
        served = ", ".join(config.served_model_names)
        raise ApiError(
            404,
            f"model is {name!r}, served are: {served}",
            param="model",
            code="model_not_found",
        )


def respond(
    request: Request,
    body: GenerationRequest,
    accepted: ActiveRequest,
    prompts: list[list[int]],
    params: SamplingParams,
    answer: AnswerFormat,
) -> GenerationResponse:
    """The response that generates what was asked for."""
    state = request.app.state
    tracer: Tracer | None = getattr(state, "tracer", None)
    if tracer is not None:
        for one in accepted.priorities:
            tracer.begin(one, request.headers)
    generation = Generation(accepted, prompts, params, body.num_choices)
    return GenerationResponse(state.engine, state.active, generation, answer, body.stream is True)
