"""A request of vLLM's with its rank: what the rules of ``headway.core`` look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm.logger import init_logger
from vllm.v1.request import Request

from headway.core.policy import BuiltinPolicy, Key

__all__ = ["TTFT_ARG", "RankedRequest", "rank"]

# Under vLLM's name, whose handlers it has: others of this process show warnings only.
logger = init_logger(f"vllm.{__name__}")

#: In the body's ``vllm_xargs``: milliseconds from its arrival until the first token is due.
TTFT_ARG = "headway_ttft_ms"


class RankedRequest:
    """The rank of a request; kept on it as ``request.headway``."""

    __slots__ = (
        "block_table",
        "deadline",
        "key",
        "last_step",
        "request",
        "request_id",
        "threshold",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        #: vLLM's name for it.
        self.request_id: str = request.request_id
        #: When its first token is due, on the clock of ``arrival_time``; None = not said.
        self.deadline: float | None = None
        #: The rank; smaller goes first.
        self.key: Key = ()
        #: While waiting, it may displace exactly those whose key is above this.
        self.threshold: Key = ()
        #: The last step in which it got a share of bounded time.
        self.last_step = -1
        #: Its blocks, as of when they were last asked for.
        self.block_table: Sequence[int] = ()

    @property
    def priority(self) -> int:
        """Smaller is more urgent."""
        return int(self.request.priority)

    @property
    def arrival_time(self) -> float:
        """When the front end received it (seconds since 1970)."""
        return float(self.request.arrival_time)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens in the KV cache, those of the steps in flight included."""
        return int(self.request.num_computed_tokens)

    def __repr__(self) -> str:
        return f"RankedRequest({self.request_id!r}, key={self.key})"


def rank(request: Request, policy: BuiltinPolicy, sequence: int) -> None:
    """Give ``request`` its rank; ``sequence`` makes it differ from every other's."""
    ranked = getattr(request, "headway", None)
    if ranked is None:
        ranked = request.headway = RankedRequest(request)
    ranked.deadline = _deadline(request)
    ranked.key = (*policy.key(ranked), sequence)
    ranked.threshold = policy.threshold(ranked)


def _deadline(request: Request) -> float | None:
    params = request.sampling_params
    value = params.extra_args.get(TTFT_ARG) if params and params.extra_args else None
    if value is None:
        return None
    # vLLM has accepted the request, and the scheduler has no way to refuse it.
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        logger.warning_once(
            "Headway: %s is %s, must be milliseconds, a number of at least 0; it is ignored.",
            TTFT_ARG,
            repr(value),
        )
        return None
    return float(request.arrival_time) + value / 1e3
