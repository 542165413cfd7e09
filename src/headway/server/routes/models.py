"""``GET /v1/models``."""

from __future__ import annotations

import time
from typing import Final

from fastapi import APIRouter, Depends

from headway.server.edge.auth import authorize
from headway.server.protocol.response_types import Model, ModelList
from headway.server.routes.common import CurrentServing
from headway.server.serving import Serving

__all__ = ["router"]

router = APIRouter(tags=["models"], dependencies=[Depends(authorize)])

#: Of the models, as far as this server is concerned.
_CREATED: Final = int(time.time())


@router.get("/v1/models", summary="List the models")
async def list_models(serving: CurrentServing) -> ModelList:
    names = serving.config.served_model_names
    return {"object": "list", "data": [_model(serving, name) for name in names]}


@router.get("/v1/models/{model:path}", summary="Describe a model")
async def get_model(serving: CurrentServing, model: str) -> Model:
    serving.check_model(model)
    return _model(serving, model)


def _model(serving: Serving, name: str) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "headway",
        "max_model_len": serving.prompts.max_tokens,
    }
