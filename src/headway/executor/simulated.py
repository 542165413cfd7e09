"""An executor that computes nothing and takes exactly the time it should, on a clock of its own.

It stands in for a model in simulations and tests: a step advances the clock by a fixed linear cost,
tokens depend on nothing but their place, and the same load therefore gives the same schedule,
latencies and outputs on every machine.

What it can do beyond a real pool is look: with ``verify`` it records what each slot of each block
holds and what each sequence consists of, and refuses the step in which a row's tokens are not its
sequence's next ones, or its block table leads to anything but its sequence's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Final, NamedTuple
from zlib import crc32

from headway.core.cost_model import SMALL_CPU_COSTS, CostModel
from headway.core.errors import ConfigError, InternalError
from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.executor.base import ModelRunnerOutput, PromptLogprobs, TokenLogprobs, accept_drafts

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

#: A sequence's name and the position of its next token → that token. The name is the request's id,
#: and for a request's further choices ``{request_id}#{index}``. An ``InternalError`` that it raises
#: ends that request.
TokenChoice = Callable[[str, int], int]

_VOCAB_SIZE: Final = 32_000


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
    ranked = sorted(window, key=lambda other_id: (other_id != token_id, -other_id))[:num_top]
    return TokenLogprobs(
        token_id,
        math.log(0.5),
        tuple((other_id, math.log(0.5) * rank) for rank, other_id in enumerate(ranked, start=1)),
    )


class SimulatedExecutor:
    """Takes the time of a step, and makes up its tokens.

    A step takes ``c0 + c1·prefill_tokens + c2·decode_seqs + c3·context_tokens`` ms (see
    ``CostModel``), and for each block copied to or from the swap space ``swap_ms_per_block`` more.
    Copies within the pool are free. Steps without rows only pay for swapping. Neither parameters
    nor seeds change what is chosen; log-probabilities are those of ``rate_token``.

    Args:
        clock: advanced by ``execute``.
        num_blocks: KV blocks in the pool.
        block_size: tokens in a block.
        num_swap_blocks: blocks that the swap space can hold.
        max_model_len: the longest context, in tokens.
        cost: c0 … c3, in ms.
        swap_ms_per_block: ms to copy one block one way.
        cost_prior: what the engine is told to expect; by default what it expects where nothing is
            known of a machine, so that it has to learn ``cost``.
        sampler: chooses the tokens. A pure function, so that a request's output shows whether
            anything that happened to it, being preempted for one, changed what it is.
        verify: record the contents of every block and check them in every step, as described
            above. O(context) a row and step, so for tests and short experiments.

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
        cost_prior: Sequence[float] = SMALL_CPU_COSTS,
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
        costs = (*cost, swap_ms_per_block)
        if len(cost) != 4 or not all(0 <= milliseconds < math.inf for milliseconds in costs):
            raise ConfigError(
                f"cost is {tuple(cost)} and {swap_ms_per_block} a swapped block, must be four "
                "numbers and one, none below 0"
            )
        self.clock = clock
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_swap_blocks = num_swap_blocks
        self.max_model_len = max_model_len
        self.cost_prior = tuple(cost_prior)
        #: Steps run.
        self.num_steps = 0
        self._cost = CostModel(cost, swap_ms_per_block)
        self._sampler = sampler
        self._contents = _Contents(num_blocks, block_size, num_swap_blocks) if verify else None
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
        compute_ms = self._cost.predict_ms(output.features) if output.rows else 0.0
        self.clock.advance((compute_ms + swap_ms) / 1e3)
        self.num_steps += 1
        tokens: list[tuple[int, ...]] = [()] * len(output)
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        errors: dict[int, InternalError] = {}
        for index, row in enumerate(output):
            try:
                tokens[index] = self._choose(row)
            except InternalError as error:
                errors[index] = error
                continue
            if self._contents is not None:
                self._contents.expect(row, tokens[index])
            params = row.sampling
            if params.logprobs is not None and row.seeds:
                num_top = params.logprobs
                logprobs[index] = tuple(rate_token(token_id, num_top) for token_id in tokens[index])
            if row.rated is not None:
                num_top = params.prompt_logprobs or 0
                prompt_logprobs[index] = PromptLogprobs(
                    row.rated.start,
                    [rate_token(token_id, num_top) for token_id in row.rated.token_ids],
                )
        return ModelRunnerOutput(tokens, swap_ms, logprobs, prompt_logprobs, errors)

    def _choose(self, row: StepRow) -> tuple[int, ...]:
        position = row.start + len(row.token_ids)
        if len(row.seeds) != 1:
            names = (_name(row, draw) for draw in range(len(row.seeds)))
            return tuple(self._sampler(name, position) for name in names)
        name = _name(row)
        return accept_drafts(
            (self._sampler(name, place) for place in count(position)),
            row.drafts,
        )

    def close(self) -> None:
        """Refuse further steps."""
        self._closed = True


def _name(row: StepRow, draw: int = 0) -> str:
    """What the sampler knows the sequence by that goes on with the row's draw of this number."""
    index = row.index + draw
    return f"{row.request_id}#{index}" if index else row.request_id


class _Slot(NamedTuple):
    """What a slot of the pool holds: a token, and, as attention can tell it, all before it."""

    token_id: int
    #: Chained hash of all tokens of the sequence up to and including this one.
    prefix: int


class _Sequence(NamedTuple):
    """What one sequence is known to consist of.

    A request's id may be used again when the request has ended, which an executor is not told of;
    the next one is told apart by its parameters and its prompt.
    """

    num_prompt_tokens: int
    sampling: SamplingParams
    #: The slots of its tokens from the first on, those that have been sampled last included.
    slots: list[_Slot]


#: Slots, each None until something is written.
_Block = list[_Slot | None]


class _Contents:
    """What the pool and the swap space would hold, slot by slot, and what they should hold.

    A row says of the tokens before it little more than where they are. So the tokens of each
    sequence are remembered as its rows computed them, or the executor chose them. Those that no
    row of the sequence has computed, because the prefix cache had them, are taken from the pool:
    they have to be, without a gap, the beginning of some sequence, and to end as the row's
    ``context`` says. From then on they are remembered like the others.
    """

    def __init__(self, num_blocks: int, block_size: int, num_swap_blocks: int) -> None:
        self._block_size = block_size
        self._pool: list[_Block] = [[None] * block_size for _ in range(num_blocks)]
        self._swap: list[_Block] = [[None] * block_size for _ in range(num_swap_blocks)]
        self._sequences: dict[tuple[str, int], _Sequence] = {}

    def execute(self, output: SchedulerOutput) -> None:
        """Move blocks, write the step's tokens, then read every row's context.

        Raises:
            InternalError: a row's tokens or blocks are not its sequence's.
        """
        for block, slot in output.swap_out:
            self._swap[slot] = self._pool[block].copy()
        for source, destination in output.block_copies:
            self._pool[destination] = self._pool[source].copy()
        for slot, block in output.swap_in:
            self._pool[block] = self._swap[slot].copy()
        contexts = [self._write(row) for row in output]
        # Only now: a slot that two rows write is as wrong as one that no row has written.
        for row, context in zip(output, contexts, strict=True):
            for position, expected in enumerate(context):
                if self._read(row, position) != expected:
                    raise self._misplaced(row, position)

    def expect(self, row: StepRow, tokens: tuple[int, ...]) -> None:
        """Remember what the row's sequences go on with: tokens that no row has computed yet."""
        slots = self._sequences[row.request_id, row.index].slots
        known = slots[: row.start + len(row.token_ids)]
        if len(row.seeds) > 1:
            for draw, token_id in enumerate(tokens):
                self._remember(row, row.index + draw, _extended(known, [token_id]))
        elif row.seeds:
            self._remember(row, row.index, _extended(known, tokens))

    def _write(self, row: StepRow) -> list[_Slot]:
        """Put a row's tokens where its table says; returns what its whole context should be."""
        end = row.start + len(row.token_ids) + len(row.drafts)
        if end > len(row.block_table) * self._block_size:
            raise InternalError(
                f"{end} tokens of request {row.request_id!r} are to be in "
                f"{len(row.block_table)} blocks of {self._block_size}"
            )
        known = self._known(row)
        past = known[: row.start]
        for position in range(len(past), row.start):
            past.append(self._adopt(row, position, past[-1] if past else None))
        for position, token_id in enumerate(row.context, row.start - len(row.context)):
            if past[position].token_id != token_id:
                raise _mistaken(row, position, token_id, past[position])
        context = _extended(past, row.token_ids)
        for position in range(row.start, min(len(context), len(known))):
            if context[position] != known[position]:
                raise _mistaken(row, position, context[position].token_id, known[position])
        self._remember(row, row.index, context + known[len(context) :])
        context = _extended(context, row.drafts)
        for position in range(row.start, end):
            block, offset = self._place(row, position)
            self._pool[block][offset] = context[position]
        return context

    def _known(self, row: StepRow) -> list[_Slot]:
        """What is remembered of the row's sequence, unless it is another under the same id."""
        sequence = self._sequences.get((row.request_id, row.index))
        if sequence is None or sequence[:2] != (row.num_prompt_tokens, row.sampling):
            return []
        if not row.start:
            prompt = row.token_ids[: row.num_prompt_tokens]
            if any(
                slot.token_id != token_id
                for slot, token_id in zip(sequence.slots, prompt, strict=False)
            ):
                return []
        return sequence.slots

    def _remember(self, row: StepRow, index: int, slots: list[_Slot]) -> None:
        self._sequences[row.request_id, index] = _Sequence(
            row.num_prompt_tokens, row.sampling, slots
        )

    def _adopt(self, row: StepRow, position: int, before: _Slot | None) -> _Slot:
        """What the pool holds of a token that none of the sequence's rows has computed."""
        found = self._read(row, position)
        if found is None or found != _next_slot(before, found.token_id):
            raise self._misplaced(row, position)
        return found

    def _read(self, row: StepRow, position: int) -> _Slot | None:
        block, offset = self._place(row, position)
        return self._pool[block][offset]

    def _place(self, row: StepRow, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self._block_size)
        return row.block_table[index], offset

    def _misplaced(self, row: StepRow, position: int) -> InternalError:
        block, offset = self._place(row, position)
        return InternalError(
            f"token {position} of request {row.request_id!r} is not in slot "
            f"{offset} of block {block}, where its block table says"
        )


def _mistaken(row: StepRow, position: int, token_id: int, known: _Slot) -> InternalError:
    return InternalError(
        f"token {position} of request {row.request_id!r} is {known.token_id}, and its row says "
        f"that it is {token_id}"
    )


def _next_slot(before: _Slot | None, token_id: int) -> _Slot:
    return _Slot(token_id, hash((0 if before is None else before.prefix, token_id)))


def _extended(slots: list[_Slot], token_ids: Iterable[int]) -> list[_Slot]:
    """A copy with further tokens behind."""
    extended = slots.copy()
    for token_id in token_ids:
        extended.append(_next_slot(extended[-1] if extended else None, token_id))
    return extended
