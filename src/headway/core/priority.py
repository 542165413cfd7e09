"""What a priority may be: an int64, as in vLLM's API; smaller is more urgent."""

from __future__ import annotations

from typing import Final

from headway.core.errors import InvalidRequest

__all__ = ["MAX_PRIORITY", "MIN_PRIORITY", "check_priority"]

MIN_PRIORITY: Final = -(2**63)
MAX_PRIORITY: Final = 2**63 - 1


def check_priority(request_id: str, priority: object) -> None:
    """Refuse a priority that is no int64.

    Raises:
        InvalidRequest: naming the request, the value and the range.
    """
    if (
        not isinstance(priority, int)
        or isinstance(priority, bool)
        or not (MIN_PRIORITY <= priority <= MAX_PRIORITY)
    ):
        raise InvalidRequest(
            f"priority of request {request_id!r} is {priority!r}, must be an int64 "
            f"({MIN_PRIORITY} … {MAX_PRIORITY})"
        )
