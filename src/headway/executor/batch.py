"""The arrays of one step, from the rows that it consists of.

Split from the executor because it is the part of a step that costs Python time: a fixed number of
numpy calls, and loops over rows, never over their tokens' context.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headway.core.scheduler_output import StepRow

__all__ = ["StepBatch", "StepResult", "build_batch"]

IntArray = npt.NDArray[np.int32]


class StepBatch(NamedTuple):
    """One forward pass of T tokens of S sequences, laid end to end.

    There is one line of results for each place where a next token is asked for (after the last
    token of a row that has a seed, and after each of its drafts), in order of the rows; the lines
    of rated prompts follow.

    Attributes:
        token_ids: ``[T]``.
        past_lens: ``[S]``, the tokens of each sequence that are in the cache.
        begins: ``[S + 1]``, prefix sums of each sequence's tokens.
        block_indices: the block tables, laid end to end.
        block_begins: ``[S + 1]``, prefix sums of their lengths.
        sample_rows: ``[R]``, of each line, the token that it follows, as an index into T.
        logit_rows: the lines whose logits are wanted, ascending.
        sampled: indices of the rows that are sampled, in order; each has 1 + ``len(drafts)`` lines.
        with_logits: of those lines, the ones that need their logits, which come first among the
            logits.
        rated: indices of the rows whose prompt is rated; their logits, one line a token, follow.
    """

    token_ids: IntArray
    past_lens: IntArray
    begins: IntArray
    block_indices: IntArray
    block_begins: IntArray
    sample_rows: IntArray
    logit_rows: IntArray
    sampled: list[int]
    with_logits: list[int]
    rated: list[int]


class StepResult(NamedTuple):
    """What a forward pass says of a batch.

    Attributes:
        tokens: ``[R]``, the likeliest token of each line, the smallest among equals.
        maxima: ``[R]``, its logit; NaN where all logits of the line are.
        logits: ``[L, vocab_size]``, of the lines in ``logit_rows``.
    """

    tokens: IntArray
    maxima: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


def build_batch(rows: Sequence[StepRow], block_size: int) -> StepBatch:
    """Lay the tokens of ``rows``, at least one, end to end. O(tokens + blocks).

    Args:
        rows: of the step.
        block_size: tokens in a block.
    """
    tokens: list[int] = []
    begins: list[int] = [0]
    past_lens: list[int] = []
    blocks: list[int] = []
    block_counts: list[int] = []
    sampled: list[int] = []
    sample_rows: list[int] = []
    with_logits: list[int] = []
    rated: list[int] = []
    rated_rows: list[int] = []
    for index, row in enumerate(rows):
        start, drafts = row.start, row.drafts
        begin = len(tokens)
        tokens += row.token_ids
        last = len(tokens) - 1
        tokens += drafts
        begins.append(len(tokens))
        past_lens.append(start)
        needed = -(-(start + len(tokens) - begin) // block_size)
        blocks += row.block_table[:needed]
        block_counts.append(needed)
        if row.rated is not None:
            rated.append(index)
            # From a position to the line that tells of its token: the one before it.
            first = row.rated.start - 1 - start + begin
            rated_rows += range(first, first + len(row.rated.token_ids))
        if row.seeds:
            num_output_tokens = start + len(row.token_ids) - row.num_prompt_tokens
            for place in range(1 + len(drafts)):
                if row.sampling.needs_logits_at(num_output_tokens + place):
                    with_logits.append(len(sample_rows))
                sample_rows.append(last + place)
            sampled.append(index)
    num_sampled = len(sample_rows)
    sample_rows += rated_rows
    logit_rows = [*with_logits, *range(num_sampled, len(sample_rows))]
    return StepBatch(
        _ints(tokens),
        _ints(past_lens),
        _ints(begins),
        _ints(blocks),
        _ints([0, *accumulate(block_counts)]),
        _ints(sample_rows),
        _ints(logit_rows),
        sampled,
        with_logits,
        rated,
    )


def _ints(values: Sequence[int]) -> IntArray:
    return np.array(values, np.int32)
