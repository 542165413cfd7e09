"""Which requests are being served, and whose they are.

An API request with several choices is several requests to the engine. Here is what belongs
together, so that it can be listed, re-ranked and cancelled by one id; and to which tenant, so that
nobody sees another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from headway.core.errors import DuplicateRequest
from headway.server.auth import Tenant

__all__ = ["ActiveRequest", "ActiveRequests"]


@dataclass(slots=True)
class ActiveRequest:
    """One API request from its acceptance to its end.

    Attributes:
        request_id: the client's or drawn.
        tenant: whose it is.
        priorities: of its parts as they are now, by the engine's ids, in the order of the choices.
        cancelled: parts that may not start any more if they have not yet.
    """

    request_id: str
    tenant: Tenant
    priorities: dict[str, int]
    cancelled: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, request_id: str, tenant: Tenant, num_parts: int, priority: int) -> ActiveRequest:
        """A request with so many choices."""
        part_ids = (
            [f"{request_id}-{n}" for n in range(num_parts)] if num_parts > 1 else [request_id]
        )
        return cls(request_id, tenant, dict.fromkeys(part_ids, priority))

    def part_ids(self, request_id: str) -> list[str]:
        """The parts that are meant by its own id, or by a part's."""
        return list(self.priorities) if request_id == self.request_id else [request_id]


class ActiveRequests:
    """The API requests that are being served; the event loop's own."""

    def __init__(self) -> None:
        #: By their own and their parts' ids.
        self._by_id: dict[str, ActiveRequest] = {}

    @contextmanager
    def register(self, request: ActiveRequest) -> Iterator[None]:
        """Make a request known while the context lasts.

        Raises:
            DuplicateRequest: its id, or a part's, is in use.
        """
        ids = {request.request_id, *request.priorities}
        for one in sorted(ids & self._by_id.keys()):
            raise DuplicateRequest(f"request id {one!r} is in use")
        self._by_id.update(dict.fromkeys(ids, request))
        try:
            yield
        finally:
            for one in ids:
                del self._by_id[one]

    def find(self, request_id: str, tenant: Tenant) -> ActiveRequest | None:
        """The request with this id, or with a part of this id, if it is the tenant's."""
        found = self._by_id.get(request_id)
        return found if found is not None and found.tenant is tenant else None
