"""What routes find on the application, and what a request's headers say."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from headway.server.edge.auth import authorize
from headway.server.edge.priorities import priority_in
from headway.server.edge.tenants import Tenant
from headway.server.serving import Call, Serving

__all__ = ["CurrentServing", "CurrentTenant", "call_of"]


async def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


#: Dependencies of routes: what serves, and the request's tenant.
CurrentServing = Annotated[Serving, Depends(_serving)]
CurrentTenant = Annotated[Tenant, Depends(authorize)]


def call_of(request: Request, tenant: Tenant) -> Call:
    """The tenant, and what the headers say.

    Raises:
        ApiError: 400, a header holds no priority.
    """
    headers = request.headers
    return Call(tenant, headers.get("X-Request-Id"), priority_in(headers), headers)
