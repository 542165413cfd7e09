"""The seam between deciding and computing.

The engine hands a ``SchedulerOutput`` down and gets a ``ModelRunnerOutput`` back; it knows
nothing else of how tokens are made. ``OpenVINOExecutor`` runs the model, ``SimulatedExecutor``
only takes the time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from headway.core.scheduler_output import SchedulerOutput

__all__ = ["Executor", "ModelRunnerOutput"]


class ModelRunnerOutput(NamedTuple):
    """What a step produced.

    Attributes:
        sampled_token_ids: parallel to the scheduled requests; None where the scheduled tokens
            do not reach the request's last one, so that nothing was sampled.
        swap_ms: of the step's time, what copying between pool and swap space took.
    """

    sampled_token_ids: list[int | None]
    swap_ms: float = 0.0


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
