"""How urgent a request is: what it says itself, and what it may say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from headway.core.priority import MAX_PRIORITY, MIN_PRIORITY
from headway.server.config import UNSPECIFIC_TIERS, ServerConfig
from headway.server.edge.tenants import Tenant
from headway.server.protocol.errors import ApiError
from headway.server.protocol.requests import GenerationRequest

__all__ = ["PRIORITY_HEADERS", "priority_in", "priority_of"]

#: The first of them that a request has counts, and precedes the body.
PRIORITY_HEADERS: Final = ("X-Headway-Priority", "X-Vllm-Priority")

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,19}")


def priority_in(headers: Mapping[str, str]) -> int | None:
    """The priority that headers ask for, if any does.

    Args:
        headers: of a request; names are found in any case.

    Raises:
        ApiError: 400, it is no int64.
    """
    for name in PRIORITY_HEADERS:
        text = headers.get(name)
        if text is None:
            continue
        if not _INTEGER.fullmatch(text) or not MIN_PRIORITY <= int(text) <= MAX_PRIORITY:
            raise ApiError(
                400,
                f"{name} is {text!r}, must be an int64 ({MIN_PRIORITY} … {MAX_PRIORITY})",
                param=name,
            )
        return int(text)
    return None


def priority_of(
    asked: int | None, body: GenerationRequest, tenant: Tenant, config: ServerConfig
) -> int:
    """What is asked for beside the body, else body, else service tier, else the tenant's default.

    Raises:
        ApiError: 400, there is no such tier; 403, the tenant may not ask for the priority.
    """
    priority = body.priority if asked is None else asked
    if priority is None:
        tier = UNSPECIFIC_TIERS[0] if body.service_tier is None else body.service_tier
        priority = _from_tier(tier, config)
        if tier in UNSPECIFIC_TIERS:
            return tenant.default_priority(priority)
    tenant.check_priority(priority)
    return priority


def _from_tier(tier: str, config: ServerConfig) -> int:
    if tier not in config.service_tiers:
        known = ", ".join(config.service_tiers)
        raise ApiError(
            400, f"service_tier is {tier!r}, must be one of {known}", param="service_tier"
        )
    return config.service_tiers[tier]
