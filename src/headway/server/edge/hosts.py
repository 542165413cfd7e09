"""By which names a server without keys lets itself be called.

A web page may resolve its own name to this machine's loopback address after it was loaded (DNS
rebinding). To the browser the server is then of the page's own origin: the page may read answers,
and no rule about origins holds it off. But the request still says the page's name as its ``Host``.
So a server that is protected by nothing but its loopback address answers to names of loopback
addresses only, to the name that it was told to listen on, and to names that the operator adds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headway.server.protocol.errors import ApiError, quote

__all__ = ["HostMiddleware"]


class HostMiddleware:
    """Refuses requests that call the server by another name with 421.

    Args:
        app: what comes next.
        allowed_hosts: names beside ``localhost`` and loopback addresses.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str]) -> None:
        self.app = app
        #: In lower case, most telling first.
        self._names = tuple(dict.fromkeys([*map(str.lower, allowed_hosts), "localhost"]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if not self._allows(host):
                await self._refuse(host)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets that hold no address
            return False
        name = name.removesuffix(".")
        if name in self._names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _refuse(self, host: str) -> ASGIApp:
        return ApiError(
            421,
            f"Host is {quote(repr(host))}, must be {', '.join(self._names)} or a loopback address; "
            "--allowed-host adds others",
            code="misdirected_request",
        ).response()
