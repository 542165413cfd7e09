"""From what was placed in a step to the rows that the executor reads: values, no live requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from headway.core.request import Request
from headway.core.scheduler_output import QuietRow, RatedPrompt, StepRow
from headway.core.sequence import Sequence

__all__ = ["DecodeCounts", "StepRows", "make_row", "num_logit_rows"]

_NONE: Final[tuple[int, ...]] = ()
_NO_IDS: Final[frozenset[int]] = frozenset()


def make_row(sequence: Sequence, count: int) -> StepRow:
    """The row of a sequence that computes ``count`` tokens, its drafts if it has any included.

    O(tokens of the row), and O(tokens of the sequence) where a penalty looks at them.
    """
    request, token_ids = sequence.request, sequence.token_ids
    params, drafts = request.sampling_params, sequence.draft_token_ids
    start = sequence.num_computed_tokens
    end = min(start + count, len(token_ids))
    drafts = drafts[: start + count - end]
    seeds: tuple[int | None, ...] = _NONE
    banned = _NO_IDS
    if end == len(token_ids):
        seeds = sequence.facts.seeds
        if len(request.sequences) < request.n:
            seeds = tuple(request.seed_of(index) for index in range(request.n))
        if len(token_ids) - sequence.num_prompt_tokens < params.min_tokens:
            banned = request.stop_token_ids
    context_start = 0 if params.needs_history else max(0, start - 1)
    rated = None
    if params.prompt_logprobs is not None and not sequence.num_output_tokens:
        # Computing a token says how likely each is to follow it. So the first token of a prompt
        # has no log-probability, and what is computed again has been rated before.
        first = max(start, sequence.peak_computed_tokens) + 1
        last = min(end + 1, sequence.num_prompt_tokens)
        if first < last:
            rated = RatedPrompt(first, tuple(token_ids[first:last]))
    return StepRow(
        request.request_id,
        sequence.index,
        tuple(token_ids[start:end]),
        start,
        sequence.block_table,
        sequence.num_prompt_tokens,
        params,
        seeds,
        drafts,
        tuple(token_ids[context_start:start]),
        banned,
        rated,
    )


def num_logit_rows(row: StepRow) -> int:
    """Rows of logits that the executor reads for a row."""
    num_rated = 0 if row.rated is None else len(row.rated.token_ids)
    num_output = row.start + len(row.token_ids) - row.num_prompt_tokens
    if not row.seeds or not row.sampling.needs_logits_at(num_output):
        return num_rated
    return num_rated + len(row.seeds) + len(row.drafts)


class DecodeCounts(NamedTuple):
    """Decoding sequences, the tokens that they attend to, and the rows of logits read for them."""

    num_seqs: int
    num_context_tokens: int
    num_logit_rows: int


class StepRows:
    """The rows of a step that is being filled, and the sequences that they are of."""

    __slots__ = ("fields", "sequences")

    def __init__(self) -> None:
        #: Parallel to ``fields``.
        self.sequences: list[Sequence] = []
        #: The rows, as ``SchedulerOutput`` takes them.
        self.fields: list[StepRow | QuietRow] = []

    def add(self, sequence: Sequence, count: int) -> StepRow:
        """Add the row of a sequence that computes ``count`` tokens."""
        row = make_row(sequence, count)
        sequence.num_scheduled_tokens = count
        sequence.drafts_in_flight = row.drafts
        self.sequences.append(sequence)
        self.fields.append(row)
        return row

    def add_quiet(
        self, requests: Iterable[Request], append_block: Callable[[Sequence], bool]
    ) -> DecodeCounts:
        """Add the rows of quiet sequences, each of which computes its last known token.

        It stops at the first request that is not quiet (``Sequence.quiet_until``), unless all that
        it lacks is a block, and there is one. Most rows of most steps are made here, so without
        looking at what they cannot have.

        Args:
            requests: residents, in rank order.
            append_block: ``KVCacheManager.append_block``.
        """
        add_sequence, add_fields = self.sequences.append, self.fields.append
        num_seqs = num_context = num_logits = 0
        for request in requests:
            sequence = request.leader
            computed = sequence.num_computed_tokens
            if computed >= sequence.quiet_until and not (
                sequence.quiet_until and append_block(sequence)
            ):
                break
            add_sequence(sequence)
            add_fields((sequence.facts, sequence.last_token_ids, computed, sequence.block_table))
            num_seqs += 1
            num_context += computed
            num_logits += sequence.num_logit_rows
        return DecodeCounts(num_seqs, num_context, num_logits)
