"""``/v1/requests``: look at unfinished requests, make them more or less urgent, cancel them.

A request with several choices goes by its own id, and each choice by ``{id}-{index}``. Tenants see
their own requests only; another's is as unknown as one that does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request

from headway.core.errors import UnknownRequest
from headway.engine.async_engine import AsyncEngine
from headway.engine.request_info import RequestInfo
from headway.server.active import ActiveRequest, ActiveRequests
from headway.server.answers import Deleted, NewPriority, RequestList, RequestState
from headway.server.auth import Tenant, authorize
from headway.server.protocol import SetPriorityRequest

__all__ = ["router"]

router = APIRouter(prefix="/v1/requests", tags=["requests"])

_Owner = Annotated[Tenant, Depends(authorize)]
_Status = Literal["waiting", "running", "paused", "swapped", "preempted"]


@router.get("", summary="List unfinished requests, those that go first first")
async def list_requests(
    request: Request,
    tenant: _Owner,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    status: Annotated[_Status | None, Query()] = None,
) -> RequestList:
    engine: AsyncEngine = request.app.state.engine
    active: ActiveRequests = request.app.state.active
    parts: dict[str, list[RequestInfo]] = {}
    for info in await engine.list_requests():
        owner = active.find(info.request_id, tenant)
        if owner is not None:
            parts.setdefault(owner.request_id, []).append(info)
    states = [_state(request_id, infos) for request_id, infos in parts.items()]
    found = [state for state in states if status is None or state["status"] == status]
    return {"object": "list", "data": found[:limit]}


@router.get("/{request_id}", summary="Where a request stands")
async def get_request(request: Request, tenant: _Owner, request_id: str) -> RequestState:
    engine: AsyncEngine = request.app.state.engine
    _, part_ids = _find(request, request_id, tenant)
    infos = [info for info in await engine.list_requests() if info.request_id in part_ids]
    if not infos:
        raise _unknown(request_id)
    return _state(request_id, infos)


@router.post("/{request_id}", summary="Make a request more or less urgent")
async def set_priority(
    request: Request, tenant: _Owner, request_id: str, body: SetPriorityRequest
) -> NewPriority:
    engine: AsyncEngine = request.app.state.engine
    active, part_ids = _find(request, request_id, tenant)
    tenant.check_priority(body.priority)
    for one in part_ids:
        engine.set_priority(one, body.priority)
        active.priorities[one] = body.priority
    return {"id": request_id, "object": "request", "priority": body.priority}


@router.delete("/{request_id}", summary="Cancel a request")
async def cancel_request(request: Request, tenant: _Owner, request_id: str) -> Deleted:
    engine: AsyncEngine = request.app.state.engine
    active, part_ids = _find(request, request_id, tenant)
    active.cancelled.update(part_ids)
    for one in part_ids:
        await engine.abort(one)
    return {"id": request_id, "object": "request", "deleted": True}


def _find(request: Request, request_id: str, tenant: Tenant) -> tuple[ActiveRequest, list[str]]:
    """The request that an id belongs to, and the engine's ids that it means."""
    active: ActiveRequests = request.app.state.active
    found = active.find(request_id, tenant)
    if found is None:
        raise _unknown(request_id)
    return found, found.part_ids(request_id)


def _unknown(request_id: str) -> UnknownRequest:
    return UnknownRequest(f"no unfinished request has the id {request_id!r}")


def _state(request_id: str, infos: Sequence[RequestInfo]) -> RequestState:
    """The state of what goes first among ``infos``, and of each if there are several."""
    first = infos[0]
    state: RequestState = {
        "id": request_id,
        "object": "request",
        "status": first.status,
        "priority": first.priority,
        "rank": first.rank,
        "age": first.age,
        "predicted_wait": first.predicted_wait,
        "prompt_tokens": first.num_prompt_tokens,
        "computed_tokens": first.num_computed_tokens,
        "output_tokens": first.num_output_tokens,
        "max_tokens": first.max_tokens,
        "preemptions": first.num_preemptions,
    }
    if len(infos) > 1:
        state["parts"] = [_state(one.request_id, [one]) for one in infos]
    return state
