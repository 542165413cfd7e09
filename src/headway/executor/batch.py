"""The arrays of one step, from the rows that it consists of.

Split from the executor because it is the part of a step that costs Python time: a fixed number of
numpy calls, and loops over rows, never over their tokens' context.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from headway.core.scheduler_output import StepRow

__all__ = ["StepBatch", "StepResult", "build_batch"]

IntArray = npt.NDArray[np.int32]

#: The token of padding rows; any id will do.
_PADDING_TOKEN: Final = 0


class StepBatch(NamedTuple):
    """One forward pass.

    The graph's outputs have one line for each place where a next token is asked for (after the last
    token of a row that has a seed, and after each of its drafts), in order of the rows; the lines
    of rated prompts follow, then padding.

    Attributes:
        inputs: the graph's inputs by name (``headway.models.graph`` describes them).
        sampled: indices of the rows that are sampled, in order; each has 1 + ``len(drafts)`` lines.
        with_logits: of those lines, the ones that need their logits; line j of the graph's logits
            belongs to line ``with_logits[j]`` of its other outputs.
        rated: indices of the rows whose prompt is rated; their logits, one line a token, follow.
        copies: (source, destination) blocks of the pool to copy before the pass.
    """

    inputs: dict[str, IntArray]
    sampled: list[int]
    with_logits: list[int]
    rated: list[int]
    copies: list[tuple[int, int]]


class StepResult(NamedTuple):
    """What the graph says of a batch (``headway.models.graph``); valid until the next pass."""

    tokens: IntArray
    maxima: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


def build_batch(
    rows: Sequence[StepRow],
    block_size: int,
    scratch_blocks: Sequence[int],
    min_rows: int = 1,
    pairs_lone_tokens: bool = False,
    rounds_rows: bool = False,
) -> StepBatch:
    """Lay the tokens of ``rows`` end to end. O(tokens + blocks).

    Args:
        rows: at least one.
        block_size: tokens in a block.
        scratch_blocks: outside the pool: one for what padding writes, and one for each row of a
            step.
        min_rows: a step of fewer tokens, or of fewer lines of outputs, is padded to that many. A
            matrix product of one line runs in another kernel than larger ones, with another order
            of summation; padding makes a row's result independent of the others.
        pairs_lone_tokens: a prompt chunk of one token computes the token before it, which is the
            last one of the row's ``context``, once more. Attention for one token is another kernel
            than for several; so a prompt gives the same result even where a chunk of one token is
            left over.
        rounds_rows: pad to one of few numbers of lines. A step with as many as the last one is
            spared the preparation of every operator for another shape, which takes longer than the
            padding.
    """
    tokens: list[int] = []
    past_lens: list[int] = []
    lengths: list[int] = []
    blocks: list[int] = []
    block_counts: list[int] = []
    sampled: list[int] = []
    sample_rows: list[int] = []
    with_logits: list[int] = []
    rated: list[int] = []
    rated_rows: list[int] = []
    copies: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        start, drafts = row.start, row.drafts
        end = start + len(row.token_ids)
        needed = -(-(end + len(drafts)) // block_size)
        table: Sequence[int] = row.block_table[:needed]
        begin = len(tokens)
        if pairs_lone_tokens and start and end == start + 1 and end <= row.num_prompt_tokens:
            tokens.append(row.context[-1])
            if not start % block_size:
                # The block before may be shared, and hold what decoding computed, which differs
                # in the last bits: its other readers must not see it written again.
                before = start // block_size - 1
                scratch = scratch_blocks[1 + len(copies)]
                copies.append((table[before], scratch))
                table = (*table[:before], scratch, *table[before + 1 :])
            start -= 1
        past_lens.append(start)
        tokens += row.token_ids
        last = len(tokens) - 1
        tokens += drafts
        lengths.append(len(tokens) - begin)
        blocks += table
        block_counts.append(needed)
        if row.rated is not None:
            rated.append(index)
            # From a position to the line that tells of its token: the one before it.
            first = row.rated.start - 1 - start + begin
            rated_rows += range(first, first + len(row.rated.token_ids))
        if row.seeds:
            num_output_tokens = end - row.num_prompt_tokens
            for place in range(1 + len(drafts)):
                if row.sampling.needs_logits_at(num_output_tokens + place):
                    with_logits.append(len(sample_rows))
                sample_rows.append(last + place)
            sampled.append(index)
    least = _rounded(len(tokens)) if rounds_rows else len(tokens)
    for _ in range(max(least, min_rows) - len(tokens)):
        # A sequence of one token, at the start of its context.
        tokens.append(_PADDING_TOKEN)
        past_lens.append(0)
        lengths.append(1)
        blocks.append(scratch_blocks[0])
        block_counts.append(1)

    begins = np.array([0, *accumulate(lengths)], dtype=np.int32)
    past = np.array(past_lens, dtype=np.int32)
    counts = np.array(lengths, dtype=np.int32)
    positions = np.arange(len(tokens), dtype=np.int32)
    positions += np.repeat(past - begins[:-1], counts)
    num_lines = len(sample_rows) + len(rated_rows)
    logit_rows = [*with_logits, *range(len(sample_rows), num_lines)]
    sample_rows += rated_rows
    if num_lines:
        least = max(_rounded(num_lines) if rounds_rows else num_lines, min_rows)
        sample_rows += [sample_rows[-1]] * (least - num_lines)
    return StepBatch(
        inputs={
            "input_ids": np.array(tokens, dtype=np.int32),
            "position_ids": positions,
            "past_lens": past,
            "subsequence_begins": begins,
            "block_indices": np.array(blocks, dtype=np.int32),
            "block_indices_begins": np.array([0, *accumulate(block_counts)], dtype=np.int32),
            "max_context_len": np.array((past + counts).max(), dtype=np.int32),
            "sample_rows": np.array(sample_rows, dtype=np.int32),
            "logit_rows": np.array(logit_rows, dtype=np.int32),
        },
        sampled=sampled,
        with_logits=with_logits,
        rated=rated,
        copies=copies,
    )


def _rounded(count: int) -> int:
    """The next of 1 … 8, 12, 16, 24, 32, 64, 96, …"""
    for limit, multiple in ((8, 1), (16, 4), (32, 8)):
        if count <= limit:
            return -(-count // multiple) * multiple
    return -(-count // 32) * 32
