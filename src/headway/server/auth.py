"""Who may use the server, and how much of it.

The check is a middleware, so that it comes before the body is read and no route can be forgotten;
routes learn whose the request is with ``Depends(authorize)``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Final

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headway.server.api_keys import ApiKey
from headway.server.errors import ApiError

__all__ = ["OPEN_PATHS", "AuthMiddleware", "Tenant", "authorize"]

#: What needs no key: probes, scraping (as in vLLM), and the documentation.
OPEN_PATHS: Final = frozenset({"/health", "/metrics", "/version", "/docs", "/openapi.json"})


class Tenant:
    """Whose a request is, and what it may ask for.

    Args:
        name: for the operator.
        most_urgent_priority: the smallest priority it may ask for; None = any.
        max_concurrent: requests at a time; None = no limit.
    """

    def __init__(
        self,
        name: str,
        most_urgent_priority: int | None = None,
        max_concurrent: int | None = None,
    ) -> None:
        self.name = name
        self.most_urgent_priority = most_urgent_priority
        self.max_concurrent = max_concurrent
        self._num_running = 0

    def default_priority(self, default: int) -> int:
        """What a request that asks for no priority gets: the default, or the next it may ask."""
        urgent = self.most_urgent_priority
        return default if urgent is None else max(default, urgent)

    def check_priority(self, priority: int) -> None:
        """Refuse a priority that is more urgent than it may ask for.

        Raises:
            ApiError: 403.
        """
        urgent = self.most_urgent_priority
        if urgent is not None and priority < urgent:
            raise ApiError(
                403,
                f"priority is {priority}, with this API key it must be at least {urgent}",
                "permission_error",
                param="priority",
                code="priority_not_allowed",
            )

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the requests it may have at a time.

        Raises:
            ApiError: 429, it has as many as it may.
        """
        if self.max_concurrent is not None and self._num_running >= self.max_concurrent:
            raise ApiError(
                429,
                f"{self._num_running} requests are running with this API key, "
                f"at most {self.max_concurrent} may",
                "rate_limit_error",
                code="rate_limit_exceeded",
            )
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1


class AuthMiddleware:
    """Finds out whose a request is, and refuses it if it is nobody's.

    Args:
        app: what comes next.
        api_keys: empty = everybody may use it.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[ApiKey]) -> None:
        self.app = app
        self._anybody = None if api_keys else Tenant("anybody")
        self._tenants = [
            (_digest(one.key), Tenant(one.tenant, one.most_urgent_priority, one.max_concurrent))
            for one in api_keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = self._anybody or self._find(Headers(scope=scope).get("authorization", ""))
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
        for one, tenant in self._tenants:
            if hmac.compare_digest(digest, one):
                found = tenant
        return found


_bearer = HTTPBearer(auto_error=False, description="An API key, if the server was given any.")


async def authorize(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Tenant:
    """A dependency: whose the request is."""
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant)
    return tenant


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _unauthorized() -> ASGIApp:
    return ApiError(
        401,
        "this server needs an API key, as in Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    ).response()
