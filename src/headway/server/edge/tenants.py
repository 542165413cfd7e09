"""Tenants: the owners of requests, and what they may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headway.server.protocol.errors import ApiError

__all__ = ["Tenant"]


class Tenant:
    """An owner of requests, and what it may ask for.

    Args:
        name: unique; request ids are unique within it. Empty = of everybody, where there are no
            API keys.
        most_urgent_priority: the smallest priority it may ask for; None = any.
        max_concurrent: sequences at a time; None = no limit.
        cache_group: of tenants that share cached prefixes; None = it shares them with none.
    """

    def __init__(
        self,
        name: str,
        most_urgent_priority: int | None = None,
        max_concurrent: int | None = None,
        cache_group: str | None = None,
    ) -> None:
        self.name = name
        self.most_urgent_priority = most_urgent_priority
        self.max_concurrent = max_concurrent
        self.cache_group = cache_group
        #: Sequences of its unfinished requests.
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

    def check_room(self, num_sequences: int) -> None:
        """Refuse a request of so many sequences if it would make more than it may have at a time.

        Raises:
            ApiError: 400, it has more by itself; 429, together with what is running.
        """
        limit = self.max_concurrent
        if limit is None or self._num_running + num_sequences <= limit:
            return
        asked = f"the request has {num_sequences} sequences (prompts times n)"
        if num_sequences > limit:
            raise ApiError(
                400,
                f"{asked}, with this API key at most {limit} may run at a time",
                param="n",
                code="too_many_sequences",
            )
        raise ApiError(
            429,
            f"{asked} and {self._num_running} are running with this API key, at most {limit} may",
            "rate_limit_error",
            code="rate_limit_exceeded",
        )

    @contextmanager
    def slots(self, num_sequences: int) -> Iterator[None]:
        """So many of the sequences it may have at a time, while the context lasts.

        Raises:
            ApiError: as ``check_room``.
        """
        self.check_room(num_sequences)
        self._num_running += num_sequences
        try:
            yield
        finally:
            self._num_running -= num_sequences
