"""What may be asked about a request that is unfinished."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["RequestInfo"]


class RequestInfo(NamedTuple):
    """A request as it stood after a step.

    Attributes:
        request_id: as given or drawn.
        tenant: whose it is.
        status: ``waiting``, ``running``, ``paused``, ``swapped`` or ``preempted``.
        priority: smaller is more urgent.
        rank: how many requests go before it.
        age: seconds since it arrived.
        num_sequences: its choices.
        num_prompt_tokens, max_tokens: of the request.
        num_computed_tokens: whose keys and values are in the pool.
        num_output_tokens: generated so far, of all choices.
        num_preemptions: how often it lost blocks.
        predicted_wait: seconds until it is expected to be in a step (again); 0 if it is in one.
    """

    request_id: str
    tenant: str
    status: str
    priority: int
    rank: int
    age: float
    num_sequences: int
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_preemptions: int
    predicted_wait: float
