"""What ``PriorityScheduler.schedule`` decided: the one message from scheduler to executor.

Values only. A step says all that the executor needs to know, nothing in it changes after it was
made, and it can be pickled: the executor may run in another thread, process or machine, and after
the scheduler has gone on to something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, cast, overload

from headway.core.config import PreemptionMode
from headway.core.cost_model import StepFeatures

if TYPE_CHECKING:
    from headway.core.sampling_params import SamplingParams

__all__ = ["Preemption", "QuietRow", "RatedPrompt", "RowFacts", "SchedulerOutput", "StepRow"]

_NOTHING: Final = StepFeatures(0, 0, 0)


class RatedPrompt(NamedTuple):
    """Prompt tokens of a row whose log-probabilities are asked for.

    Attributes:
        start: position in the sequence of the first of them, at least 1: the first token of a
            prompt follows nothing, so it has no probability.
        token_ids: the tokens from there on. The logits after position p − 1 tell of the token at
            position p, so the row computes the positions ``start`` − 1 … ``start`` +
            ``len(token_ids)`` − 2.
    """

    start: int
    token_ids: tuple[int, ...]


class StepRow(NamedTuple):
    """What one sequence computes in a step.

    Attributes:
        request_id: the request that the sequence belongs to; a request of several choices has
            several rows.
        index: which of the request's sequences it is, 0 … n − 1.
        token_ids: tokens that are computed in this step, at least one.
        start: position of the first of them: as many tokens of the sequence are in the pool.
        block_table: pool blocks of the positions 0 … ``start`` + ``len(token_ids)`` +
            ``len(drafts)`` − 1, in order of position; there may be more of them.
        num_prompt_tokens: length of the prompt.
        sampling: how tokens are chosen, and what is reported of them.
        seeds: () where the row ends before the sequence's last known token: nothing is sampled.
            (seed,): one token is sampled after the row's last token. (s0, …, sn − 1), in the last
            row of a prompt that n sequences share: the first token of each, one draw by each
            seed. None is the seed of a choice that draws nothing.
        drafts: a proposed continuation of ``token_ids``, computed in this step as well; only where
            there is one seed.
        context: tokens before ``start``: all of them where ``sampling.needs_history``; else the
            last one or none, which computes nothing and tells sequences apart.
        banned: tokens that must not be sampled before ``sampling.min_tokens`` are generated.
        rated: prompt tokens that the row's logits are to tell of.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing calls
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    seeds: tuple[int | None, ...] = ()
    drafts: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    banned: frozenset[int] = frozenset()
    rated: RatedPrompt | None = None


class RowFacts(NamedTuple):
    """What all rows of a decoding sequence have in common; see ``StepRow``."""

    request_id: str
    index: int  # type: ignore[assignment]
    num_prompt_tokens: int
    sampling: SamplingParams
    seeds: tuple[int | None, ...]


#: The row of a sequence that computes one token and samples the next, with nothing out of the
#: ordinary: its facts, its ``token_ids``, ``start`` and ``block_table``.
QuietRow: TypeAlias = tuple[RowFacts, tuple[int, ...], int, tuple[int, ...]]


class Preemption(NamedTuple):
    """One request that had to yield.

    Attributes:
        request_id: the request that yielded.
        mode: PAUSE, TAIL (the request keeps a prefix and recomputes the rest), SWAP (in whole or
            its tail) or RECOMPUTE.
        beneficiary_id: the request that it yielded to; None if no single request is the cause (a
            pause), or the caller asked for it.
        num_blocks: blocks that left its tables.
        num_tokens: computed tokens that left the pool.
        priority: of the request that yielded.
        tenant: of the request that yielded.
    """

    request_id: str
    mode: PreemptionMode
    beneficiary_id: str | None = None
    num_blocks: int = 0
    num_tokens: int = 0
    priority: int = 0
    tenant: str = ""


class SchedulerOutput(Sequence[StepRow]):
    """The rows of one step, most urgent first, and what else the step has to do.

    No output may be dropped, and outputs run in the order of ``step``: block operations are told
    once. The block operations come before the forward pass, in this order: ``swap_out``,
    ``block_copies``, ``swap_in``; a block that one of them reads may be written by a later one or
    by the pass.

    An output is falsy when it has no rows; ``is_empty`` asks for block operations, too.

    Args:
        step: number of the step; later ones have larger numbers.
        rows: the rows of one request are neighbours, by ``index``. A ``QuietRow`` becomes a
            ``StepRow`` when the rows are first looked at.
        swap_out: (pool block, swap slot) pairs to copy out.
        block_copies: (source, destination) pairs of pool blocks to copy, one after the other.
        swap_in: (swap slot, pool block) pairs to copy in.
        preemptions: the requests that yielded in this step, in order of the decisions.
        features: what the step's time is predicted from.
        predicted_ms: what the cost model expects the step to take.
    """

    __slots__ = (
        "_are_made",
        "_rows",
        "block_copies",
        "features",
        "predicted_ms",
        "preemptions",
        "step",
        "swap_in",
        "swap_out",
    )

    def __init__(
        self,
        step: int = 0,
        rows: Iterable[StepRow | QuietRow] = (),
        swap_out: tuple[tuple[int, int], ...] = (),
        block_copies: tuple[tuple[int, int], ...] = (),
        swap_in: tuple[tuple[int, int], ...] = (),
        preemptions: tuple[Preemption, ...] = (),
        features: StepFeatures = _NOTHING,
        predicted_ms: float = 0.0,
    ) -> None:
        self.step = step
        self._rows: tuple[StepRow | QuietRow, ...] = tuple(rows)
        self._are_made = False
        self.swap_out = swap_out
        self.block_copies = block_copies
        self.swap_in = swap_in
        self.preemptions = preemptions
        self.features = features
        self.predicted_ms = predicted_ms

    @property
    def rows(self) -> tuple[StepRow, ...]:
        """What is computed; O(rows) when it is first looked at."""
        if not self._are_made:
            self._rows = tuple(
                row if isinstance(row, StepRow) else _whole_row(*row) for row in self._rows
            )
            self._are_made = True
        return cast("tuple[StepRow, ...]", self._rows)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for the executor to do."""
        return not (self._rows or self.swap_out or self.block_copies or self.swap_in)

    @property
    def num_batched_tokens(self) -> int:
        """Tokens that the step computes, drafts included. O(rows)."""
        return sum(len(row.token_ids) + len(row.drafts) for row in self.rows)

    @property
    def num_swapped_blocks(self) -> int:
        """Blocks copied between pool and swap space."""
        return len(self.swap_out) + len(self.swap_in)

    @overload
    def __getitem__(self, index: int) -> StepRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StepRow, ...]: ...
    def __getitem__(self, index: int | slice) -> StepRow | tuple[StepRow, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[StepRow]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SchedulerOutput):
            return NotImplemented
        names = ("rows", *self.__slots__[2:])
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def __hash__(self) -> int:
        return hash((self.step, len(self._rows)))

    def __repr__(self) -> str:
        scheduled = ", ".join(
            f"{row.request_id}{f'#{row.index}' if row.index else ''}:"
            f"{len(row.token_ids) + len(row.drafts)}"
            for row in self.rows
        )
        return f"SchedulerOutput({self.step}, [{scheduled}], preemptions={self.preemptions})"


def _whole_row(
    facts: RowFacts, token_ids: tuple[int, ...], start: int, block_table: tuple[int, ...]
) -> StepRow:
    request_id, index, num_prompt_tokens, sampling, seeds = facts
    return StepRow(
        request_id, index, token_ids, start, block_table, num_prompt_tokens, sampling, seeds
    )
