"""``GET /v1/models``."""

from __future__ import annotations

import time
from typing import Final

from fastapi import APIRouter, Depends, Request

from headway.server.answers import Model, ModelList
from headway.server.auth import authorize
from headway.server.config import ServerConfig
from headway.server.intake import check_model
from headway.server.prompts import PromptEncoder

__all__ = ["router"]

router = APIRouter(tags=["models"], dependencies=[Depends(authorize)])

#: Of the models, as far as this server is concerned.
_CREATED: Final = int(time.time())


@router.get("/v1/models", summary="List the models")
async def list_models(request: Request) -> ModelList:
    config: ServerConfig = request.app.state.config
    return {"object": "list", "data": [_model(request, one) for one in config.served_model_names]}


@router.get("/v1/models/{model:path}", summary="Describe a model")
async def get_model(request: Request, model: str) -> Model:
    check_model(model, request.app.state.config)
    return _model(request, model)


def _model(request: Request, name: str) -> Model:
    encoder: PromptEncoder = request.app.state.prompts
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "headway",
        "max_model_len": encoder.max_tokens,
    }
