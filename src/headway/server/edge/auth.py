"""Who may use the server, and how much of it.

The check is a middleware, so that it comes before the body is read and no route can be forgotten;
routes get the request's tenant with ``Depends(authorize)``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Annotated, Final

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headway.server.edge.api_keys import ApiKey
from headway.server.edge.tenants import Tenant
from headway.server.protocol.errors import ApiError

__all__ = ["OPEN_PATHS", "AuthMiddleware", "authorize"]

#: What needs no key: probes, scraping (as in vLLM), and the documentation.
OPEN_PATHS: Final = frozenset({"/health", "/metrics", "/version", "/docs", "/openapi.json"})


class AuthMiddleware:
    """Finds the tenant whose API key a request has, and refuses the request if there is none.

    Args:
        app: what comes next.
        api_keys: empty = requests need none.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[ApiKey]) -> None:
        self.app = app
        self._everybody = None if api_keys else Tenant("")
        self._tenants = [(_digest(key.key), _tenant(key)) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = self._everybody or self._find(Headers(scope=scope).get("authorization", ""))
            if tenant is None and scope["path"] not in OPEN_PATHS:
                await _unauthorized()(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)

    def _find(self, authorization: str) -> Tenant | None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        # All keys are compared, as hashes, so that the time says nothing about any of them.
        digest, found = _digest(key.strip()), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


_bearer = HTTPBearer(auto_error=False, description="An API key, if the server was given any.")


async def authorize(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Tenant:
    """A dependency: the request's tenant."""
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant)
    return tenant


def _tenant(key: ApiKey) -> Tenant:
    return Tenant(key.tenant, key.most_urgent_priority, key.max_concurrent, key.cache_group)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _unauthorized() -> ASGIApp:
    return ApiError(
        401,
        "this server needs an API key, as in Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    ).response()
