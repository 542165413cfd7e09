"""How long a request may get: what the context, the pool and a step have room for."""

from __future__ import annotations

from headway.core.config import SchedulerConfig
from headway.core.errors import InvalidRequest, RequestTooLong
from headway.core.request import Request

__all__ = ["check_fits", "token_limit"]


def check_fits(request: Request, config: SchedulerConfig) -> None:
    """Refuse a request that could never be served. Reads settings only: any thread may ask.

    Raises:
        InvalidRequest: it has more choices than a step has slots or tokens.
        RequestTooLong: its prompt leaves no room for one token in the context or the pool.
    """
    if request.n > config.max_num_choices:
        raise InvalidRequest(
            f"n of request {request.request_id!r} is {request.n}, a step has room for "
            f"{config.max_num_choices}"
        )
    limit = _sequence_limit(request, config)
    for sequence in request.live:
        if sequence.num_tokens >= limit:
            is_pool = limit != config.max_model_len
            what = "the whole KV pool holds" if is_pool else "the context is"
            choices = f" for each of {request.n} choices" if is_pool and request.n > 1 else ""
            raise RequestTooLong(
                f"prompt of request {request.request_id!r} has {sequence.num_tokens} tokens, "
                f"{what} {limit} tokens{choices} and one must be left to generate"
            )


def token_limit(request: Request, config: SchedulerConfig) -> int:
    """``num_tokens`` at which the output of each of its sequences is as long as it may get."""
    asked = request.num_prompt_tokens + request.sampling_params.max_tokens
    return min(asked, _sequence_limit(request, config))


def _sequence_limit(request: Request, config: SchedulerConfig) -> int:
    """The longest that a sequence may get: all choices must fit into the pool together.

    They share the blocks that the prompt fills, and each has its own after that.
    """
    if request.n == 1:
        return config.max_request_tokens
    shared = request.num_prompt_tokens // config.block_size
    own = max(0, config.num_blocks - shared) // request.n
    return min(config.max_request_tokens, (shared + own) * config.block_size)
