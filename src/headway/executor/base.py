"""The seam between deciding and computing.

The engine hands a ``SchedulerOutput`` down and gets a ``ModelRunnerOutput`` back; it knows
nothing else of how tokens are made. ``OpenVINOExecutor`` runs the model, ``SimulatedExecutor``
only takes the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

from headway.core.errors import InternalError
from headway.core.request import Request
from headway.core.scheduler_output import SchedulerOutput

__all__ = ["Executor", "ModelRunnerOutput", "PromptLogprobs", "TokenLogprobs", "positions_to_rate"]

_NONE: Final[Mapping[int, Any]] = MappingProxyType({})


class TokenLogprobs(NamedTuple):
    """How likely the model found a token, before penalties, biases and temperature.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens and their log-probabilities, as many as were asked for, likeliest
            first and the smaller id first among equals; ``token_id`` may be one of them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class PromptLogprobs(NamedTuple):
    """A stretch of a prompt: the position of its first token, and each of its tokens."""

    start: int
    tokens: list[TokenLogprobs]


class ModelRunnerOutput(NamedTuple):
    """What a step produced.

    The mappings go by index in the step and hold those requests only that they concern.

    Attributes:
        sampled_token_ids: parallel to the scheduled requests; None where the scheduled tokens
            do not reach the request's last one, so that nothing was sampled, and for those with
            an error.
        swap_ms: of the step's time, what copying between pool and swap space took.
        logprobs: of the sampled tokens, where ``SamplingParams.logprobs`` asks for them.
        prompt_logprobs: of the prompt tokens at ``positions_to_rate``.
        errors: why a request cannot go on, while the others can.
    """

    sampled_token_ids: list[int | None]
    swap_ms: float = 0.0
    logprobs: Mapping[int, TokenLogprobs] = _NONE
    prompt_logprobs: Mapping[int, PromptLogprobs] = _NONE
    errors: Mapping[int, InternalError] = _NONE


class Executor(Protocol):
    """Runs steps, one at a time, from one thread."""

    #: KV blocks in the pool.
    num_blocks: int
    #: Tokens in a block.
    block_size: int
    #: Blocks that the swap space can hold.
    num_swap_blocks: int
    #: The longest context the model can attend to, in tokens.
    max_model_len: int

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Do ``output``'s swap-outs, block copies and swap-ins, in that order; then its tokens."""
        ...

    def close(self) -> None:
        """Release memory and threads; the executor cannot be used any more."""
        ...


def positions_to_rate(request: Request, num_scheduled_tokens: int) -> range:
    """Which tokens of the prompt a step rates, for a request that asks for ``prompt_logprobs``.

    Computing a token says how likely each is to follow it. So the first token of a prompt has no
    log-probability, and what is computed again has been rated before.
    """
    start = max(request.num_computed_tokens, request.peak_computed_tokens)
    end = request.num_computed_tokens + num_scheduled_tokens
    return range(start + 1, min(end + 1, request.num_prompt_tokens))
