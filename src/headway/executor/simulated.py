"""An executor that computes nothing and takes exactly the time it should, on a clock of its own.

It stands in for a model in simulations and tests: a step advances the clock by a fixed linear cost,
tokens depend on nothing but their place, and the same load therefore gives the same schedule,
latencies and outputs on every machine.

What it can do beyond a real pool is look: with ``verify`` it records what each slot of each block
holds, and refuses the step in which a request's block table leads to anything but its own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final
from zlib import crc32

from headway.core.cost_model import CostModel
from headway.core.errors import ConfigError, InternalError
from headway.core.request import Request
from headway.core.scheduler_output import SchedulerOutput
from headway.executor.base import (
    ModelRunnerOutput,
    PromptLogprobs,
    TokenLogprobs,
    positions_to_rate,
)

__all__ = [
    "SMALL_CPU_COST",
    "SimulatedExecutor",
    "TokenChoice",
    "VirtualClock",
    "choose_token",
    "rate_token",
]

#: ms a step, a prefill token, a decoding sequence and a context token: about what SmolLM2-135M
#: takes on two cores with bf16 (9 ms a decode step alone, 12 ms for 8 sequences, 42 ms for 64).
SMALL_CPU_COST: Final = (8.0, 0.4, 0.4, 0.001)

#: A request's id and the position of its next token → that token. An ``InternalError``
#: that it raises ends that request.
TokenChoice = Callable[[str, int], int]

_VOCAB_SIZE: Final = 32_000

#: What the slots of a block hold, as far as attention can tell: for each a chained hash of all
#: tokens up to and including its own, or None while nothing has been written.
_Contents = list[int | None]


class VirtualClock:
    """Seconds that pass only when told to; what a real clock is to the engine otherwise.

    Args:
        start: the time it begins at.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            InternalError: it would run backwards, or stop meaning anything.
        """
        if not 0 <= seconds < math.inf:
            raise InternalError(f"a clock cannot advance by {seconds} s")
        self._now += seconds

    def advance_to(self, time: float) -> None:
        """Let time pass until ``time``; none does if that is over already."""
        self.advance(max(0.0, time - self._now))


def choose_token(request_id: str, position: int) -> int:
    """A token that looks arbitrary and depends on nothing else: below 32,000, never 0."""
    return 1 + crc32(f"{request_id}@{position}".encode()) % (_VOCAB_SIZE - 1)


def rate_token(token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities that look like a model's: the token's is ½, and each next one's half of it.

    The alternatives are the neighbouring ids, the smaller ones as far as there are any: tokens of
    every vocabulary that has ``token_id`` and more than 20 tokens.
    """
    window = range(max(0, token_id + 1 - num_top), max(token_id + 1, num_top))
    ranked = sorted(window, key=lambda one: (one != token_id, -one))[:num_top]
    return TokenLogprobs(
        token_id,
        math.log(0.5),
        tuple((one, math.log(0.5) * rank) for rank, one in enumerate(ranked, start=1)),
    )


class SimulatedExecutor:
    """Takes the time of a step, and makes up its tokens.

    A step takes ``c0 + c1·prefill_tokens + c2·decode_seqs + c3·context_tokens`` ms (see
    ``CostModel``), and for each block copied to or from the swap space ``swap_ms_per_block`` more.
    Copies within the pool are free. Steps without requests only pay for swapping. Parameters do not
    change what is chosen; log-probabilities are those of ``rate_token``.

    Args:
        clock: advanced by ``execute``.
        num_blocks: KV blocks in the pool.
        block_size: tokens in a block.
        num_swap_blocks: blocks that the swap space can hold.
        max_model_len: the longest context, in tokens.
        cost: c0 … c3, in ms.
        swap_ms_per_block: ms to copy one block one way.
        sampler: chooses the tokens. A pure function, so that a request's output shows whether
            anything that happened to it, being preempted for one, changed what it is.
        verify: record the contents of every block and check them in every step, as described
            above. O(context) a request and step, so for tests and short experiments.

    Raises:
        ConfigError: a size or a cost is out of range.
    """

    def __init__(
        self,
        clock: VirtualClock,
        *,
        num_blocks: int,
        block_size: int,
        num_swap_blocks: int = 0,
        max_model_len: int,
        cost: Sequence[float] = SMALL_CPU_COST,
        swap_ms_per_block: float = 0.1,
        sampler: TokenChoice = choose_token,
        verify: bool = False,
    ) -> None:
        for name, size, minimum in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("num_swap_blocks", num_swap_blocks, 0),
            ("max_model_len", max_model_len, 1),
        ):
            if size < minimum:
                raise ConfigError(f"{name} is {size}, must be at least {minimum}")
        if len(cost) != 4 or not all(0 <= one < math.inf for one in (*cost, swap_ms_per_block)):
            raise ConfigError(
                f"cost is {tuple(cost)} and {swap_ms_per_block} a swapped block, must be four "
                "numbers and one, none below 0"
            )
        self.clock = clock
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_swap_blocks = num_swap_blocks
        self.max_model_len = max_model_len
        #: Steps run.
        self.num_steps = 0
        self._cost = CostModel(cost, swap_ms_per_block)
        self._sampler = sampler
        self._contents = _PoolContents(num_blocks, block_size, num_swap_blocks) if verify else None
        self._closed = False

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step; see ``Executor.execute``.

        Raises:
            InternalError: the executor is closed, or, with ``verify``, a block does not hold what
                the step takes it to hold.
        """
        if self._closed:
            raise InternalError("the executor is closed")
        if self._contents is not None:
            self._contents.execute(output)
        swap_ms = output.num_swapped_blocks * self._cost.swap_ms_per_block
        compute_ms = self._cost.predict_ms(output.features) if output.requests else 0.0
        self.clock.advance((compute_ms + swap_ms) / 1e3)
        self.num_steps += 1
        sampled: list[int | None] = [None] * len(output)
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        errors: dict[int, InternalError] = {}
        for index, (request, count) in enumerate(
            zip(output.requests, output.num_scheduled_tokens, strict=True)
        ):
            params = request.sampling_params
            if request.num_computed_tokens + count == request.num_tokens:
                try:
                    token_id = self._sampler(request.request_id, request.num_tokens)
                except InternalError as error:
                    errors[index] = error
                    continue
                sampled[index] = token_id
                if params.logprobs is not None:
                    logprobs[index] = rate_token(token_id, params.logprobs)
            num_top = params.prompt_logprobs
            if num_top is not None and (positions := positions_to_rate(request, count)):
                prompt_logprobs[index] = PromptLogprobs(
                    positions.start,
                    [rate_token(request.token_ids[one], num_top) for one in positions],
                )
        return ModelRunnerOutput(sampled, swap_ms, logprobs, prompt_logprobs, errors)

    def close(self) -> None:
        """Refuse further steps."""
        self._closed = True


class _PoolContents:
    """What the pool and the swap space would hold, slot by slot."""

    def __init__(self, num_blocks: int, block_size: int, num_swap_blocks: int) -> None:
        self._block_size = block_size
        self._pool: list[_Contents] = [[None] * block_size for _ in range(num_blocks)]
        self._swap: list[_Contents] = [[None] * block_size for _ in range(num_swap_blocks)]

    def execute(self, output: SchedulerOutput) -> None:
        """Move blocks, write the step's tokens, then read every request's context."""
        for block, slot in output.swap_out:
            self._swap[slot] = self._pool[block].copy()
        for source, destination in output.block_copies:
            self._pool[destination] = self._pool[source].copy()
        for slot, block in output.swap_in:
            self._pool[block] = self._swap[slot].copy()
        contexts = [
            _prefixes(request, request.num_computed_tokens + count)
            for request, count in zip(output, output.num_scheduled_tokens, strict=True)
        ]
        for request, context in zip(output, contexts, strict=True):
            if len(context) > len(request.block_table) * self._block_size:
                raise InternalError(
                    f"{len(context)} tokens of request {request.request_id!r} are to be in "
                    f"{len(request.block_table)} blocks of {self._block_size}"
                )
            for position in range(request.num_computed_tokens, len(context)):
                block, offset = self._slot(request, position)
                self._pool[block][offset] = context[position]
        # Only now: a slot that two requests write is as wrong as one that nobody did.
        for request, context in zip(output, contexts, strict=True):
            for position, expected in enumerate(context):
                block, offset = self._slot(request, position)
                if self._pool[block][offset] != expected:
                    raise InternalError(
                        f"token {position} of request {request.request_id!r} is not in slot "
                        f"{offset} of block {block}, where its block table says"
                    )

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self._block_size)
        return request.block_table[index], offset


def _prefixes(request: Request, end: int) -> list[int]:
    """Chained hashes of the prefixes that end at the tokens 0 … ``end`` − 1."""
    prefixes, prefix = [], 0
    for token_id in request.token_ids[:end]:
        prefix = hash((prefix, token_id))
        prefixes.append(prefix)
    return prefixes
