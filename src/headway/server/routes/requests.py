"""``/v1/requests``: look at unfinished requests, make them more or less urgent, cancel them.

A request that is served in several parts (see ``headway.server.active``) goes by its own id, which
means all of them, and each part by ``{id}-{index}``. Tenants see their own requests only; a request
of another tenant is as unknown as a request that does not exist.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from headway.server.protocol.requests import SetPriorityRequest
from headway.server.protocol.response_types import Deleted, NewPriority, RequestList, RequestState
from headway.server.routes.common import CurrentServing, CurrentTenant

__all__ = ["router"]

router = APIRouter(prefix="/v1/requests", tags=["requests"])

_Status = Literal["waiting", "running", "paused", "swapped", "preempted"]


@router.get("", summary="List unfinished requests, most urgent first")
async def list_requests(
    tenant: CurrentTenant,
    serving: CurrentServing,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    status: Annotated[_Status | None, Query()] = None,
) -> RequestList:
    states = serving.list_requests(tenant)
    found = [state for state in states if status is None or state["status"] == status]
    return {"object": "list", "data": found[:limit]}


@router.get("/{request_id}", summary="Where a request stands")
async def get_request(
    tenant: CurrentTenant, serving: CurrentServing, request_id: str
) -> RequestState:
    return serving.get_request(tenant, request_id)


@router.post("/{request_id}", summary="Make a request more or less urgent")
async def set_priority(
    tenant: CurrentTenant, serving: CurrentServing, request_id: str, body: SetPriorityRequest
) -> NewPriority:
    await serving.set_priority(tenant, request_id, body.priority)
    return {"id": request_id, "object": "request", "priority": body.priority}


@router.delete("/{request_id}", summary="Cancel a request")
async def cancel_request(
    tenant: CurrentTenant, serving: CurrentServing, request_id: str
) -> Deleted:
    await serving.cancel(tenant, request_id)
    return {"id": request_id, "object": "request", "deleted": True}
