"""Which requests of the engine belong to which request of the API.

A request of one prompt is one request of the engine, of the same id, however many choices it asks
for. A request of several prompts, or of more choices than the engine takes at once, is several:
its parts, ``{id}-0``, ``{id}-1``, … Ids are unique among the unfinished requests of a tenant;
tenants do not meet in any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from headway.core.errors import DuplicateRequest

__all__ = ["ActiveRequest", "ActiveRequests"]


class ActiveRequest(NamedTuple):
    """An API request that is being served.

    Attributes:
        request_id: the client's or drawn.
        tenant: the name of its owner.
        part_ids: ids of the engine's requests that it consists of, in the order of the choices.
    """

    request_id: str
    tenant: str
    part_ids: tuple[str, ...]

    @classmethod
    def of(cls, request_id: str, tenant: str, num_parts: int) -> ActiveRequest:
        """A request of so many parts."""
        if num_parts == 1:
            return cls(request_id, tenant, (request_id,))
        return cls(request_id, tenant, tuple(f"{request_id}-{n}" for n in range(num_parts)))

    def named(self, request_id: str) -> tuple[str, ...]:
        """The parts that an id means: all of them if it is the request's own, else one."""
        return self.part_ids if request_id == self.request_id else (request_id,)


class ActiveRequests:
    """The API requests that are being served; the event loop's own."""

    def __init__(self) -> None:
        #: By tenant, and by the ids of requests and their parts.
        self._by_id: dict[tuple[str, str], ActiveRequest] = {}

    @contextmanager
    def register(self, request: ActiveRequest) -> Iterator[None]:
        """Make a request known while the context lasts.

        Raises:
            DuplicateRequest: its id, or a part's, is in use.
        """
        keys = {(request.tenant, name) for name in (request.request_id, *request.part_ids)}
        for _, name in sorted(keys & self._by_id.keys()):
            raise DuplicateRequest(f"request id {name!r} is in use")
        self._by_id.update(dict.fromkeys(keys, request))
        try:
            yield
        finally:
            for key in keys:
                del self._by_id[key]

    def find(self, request_id: str, tenant: str) -> ActiveRequest | None:
        """The tenant's request that has this id, or a part of this id."""
        return self._by_id.get((tenant, request_id))
