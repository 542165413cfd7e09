"""The seam between deciding and computing.

The engine hands a ``SchedulerOutput`` down and gets a ``ModelRunnerOutput`` back; it knows
nothing else of how tokens are made. ``NativeExecutor`` runs the model, ``SimulatedExecutor``
only takes the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from headway.core.errors import InternalError
from headway.core.scheduler_output import SchedulerOutput

__all__ = ["Executor", "ModelRunnerOutput", "PromptLogprobs", "TokenLogprobs", "accept_drafts"]

#: No dictionary that may be changed, and, unlike ``MappingProxyType``, one that can be pickled.
_NONE: Final[Mapping[int, Any]] = {}


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
    """What a step produced. A value: it refers to none of the executor's arrays; can be pickled.

    The mappings go by index of the row in the step and hold those rows only that they concern.

    Attributes:
        tokens: parallel to the rows. () where the row has no seed, so that nothing was sampled,
            and where it has an error. With one seed: the drafts that were accepted, then one new
            token. With several: the first token of each of the sequences.
        swap_ms: of the step's time, what copying between pool and swap space took.
        logprobs: of each of the row's ``tokens``, where ``SamplingParams.logprobs`` asks for them.
        prompt_logprobs: of the tokens of the row's ``rated``.
        errors: why a row's request cannot go on, while the others can.
    """

    tokens: list[tuple[int, ...]]
    swap_ms: float = 0.0
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = _NONE
    prompt_logprobs: Mapping[int, PromptLogprobs] = _NONE
    errors: Mapping[int, InternalError] = _NONE


class Executor(Protocol):
    """Runs steps, one at a time, from one thread. It knows of a step what the step says."""

    #: KV blocks in the pool.
    num_blocks: int
    #: Tokens in a block.
    block_size: int
    #: Blocks that the swap space can hold.
    num_swap_blocks: int
    #: The longest context the model can attend to, in tokens.
    max_model_len: int

    @property
    def cost_prior(self) -> Sequence[float]:
        """A first guess of what a step costs here (ms): the ``coefficients`` of a ``CostModel``."""
        ...

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Do ``output``'s swap-outs, block copies and swap-ins, in that order; then its rows."""
        ...

    def close(self) -> None:
        """Release memory and threads; the executor cannot be used any more."""
        ...


def accept_drafts(sampled: Iterable[int], drafts: Sequence[int]) -> tuple[int, ...]:
    """The tokens that a row yields: as many drafts as were right, and one token more.

    A draft is right if it is the token that would have been sampled in its place, so a sequence is
    the same with drafts and without (Leviathan, Kalman and Matias, "Fast Inference from
    Transformers via Speculative Decoding", ICML 2023, for draws that are fixed beforehand).

    Args:
        sampled: item i is the token drawn after the row's tokens and its first i drafts, for
            0 ≤ i ≤ ``len(drafts)``. Nothing is taken from it behind the first wrong draft: those
            tokens were drawn after something that the sequence does not have.
        drafts: the proposed tokens.
    """
    accepted: list[int] = []
    for token_id in sampled:
        place = len(accepted)
        accepted.append(token_id)
        if place == len(drafts) or token_id != drafts[place]:
            break
    return tuple(accepted)
