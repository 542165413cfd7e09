"""The arrays of one step, from the requests that it consists of.

Split from the executor because it is the part of a step that costs Python time: a fixed number of
numpy calls, and loops over sequences, never over their tokens' context.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from headway.core.request import Request
from headway.executor.base import positions_to_rate

__all__ = ["StepBatch", "StepResult", "build_batch"]

IntArray = npt.NDArray[np.int32]

#: The token of padding rows; any id will do.
_PADDING_TOKEN: Final = 0


class StepBatch(NamedTuple):
    """One forward pass.

    Attributes:
        inputs: the graph's inputs by name (``headway.models.graph`` describes them).
        sampled: indices of the requests that are sampled, in order: row i of the graph's
            outputs belongs to request ``sampled[i]``; rows beyond are prompts' and padding.
        with_logits: of the sampled rows, those that need their logits; row j of the graph's
            logits belongs to the request ``sampled[with_logits[j]]``.
        rated: whose prompt tokens are rated, and which; their logits, one row a token, follow.
        copies: (source, destination) blocks of the pool to copy before the pass.
    """

    inputs: dict[str, IntArray]
    sampled: list[int]
    with_logits: list[int]
    rated: list[tuple[int, range]]
    copies: list[tuple[int, int]]


class StepResult(NamedTuple):
    """What the graph says of a batch (``headway.models.graph``); valid until the next pass."""

    tokens: IntArray
    maxima: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


def build_batch(
    requests: Sequence[Request],
    num_scheduled_tokens: Sequence[int],
    block_size: int,
    scratch_blocks: Sequence[int],
    min_rows: int = 1,
    min_chunk: int = 1,
    rounds_rows: bool = False,
) -> StepBatch:
    """Lay the scheduled tokens of ``requests`` end to end. O(tokens + blocks).

    Args:
        requests: at least one; for each, ``num_scheduled_tokens`` ≥ 1 tokens from
            ``num_computed_tokens`` on are computed, and its block table has room for them.
        num_scheduled_tokens: parallel to ``requests``.
        block_size: tokens in a block.
        scratch_blocks: outside the pool: one for what padding writes, and one for each request of
            a step.
        min_rows: a step of fewer tokens, or of fewer sampled rows, is padded to that many. A
            matrix product of one row runs in another kernel than larger ones, with another order
            of summation; padding makes a request's result independent of its company.
        min_chunk: a chunk of fewer prompt tokens computes some before it once more. Attention for
            one token is another kernel than for several; so a prompt gives the same result even
            where a chunk of one token is left over. At most ``block_size`` + 1.
        rounds_rows: pad to one of few numbers of rows. A step with as many as the last one is
            spared the preparation of every operator for another shape, which takes longer than the
            padding.
    """
    tokens: list[int] = []
    past_lens: list[int] = []
    lengths = list(num_scheduled_tokens)
    blocks: list[int] = []
    block_counts: list[int] = []
    sampled: list[int] = []
    with_logits: list[int] = []
    rated: list[tuple[int, range]] = []
    rated_rows: list[int] = []
    copies: list[tuple[int, int]] = []
    for index, (request, count) in enumerate(zip(requests, num_scheduled_tokens, strict=True)):
        start = request.num_computed_tokens
        end = start + count
        needed = -(-end // block_size)
        table = request.block_table[:needed]
        if count < min_chunk and end <= request.num_prompt_tokens and start:
            first = max(0, end - min_chunk)
            if first // block_size < start // block_size:
                # The block before may be shared, and hold what decoding computed, which differs
                # in the last bits: its other readers must not see it written again.
                scratch = scratch_blocks[1 + len(copies)]
                copies.append((table[first // block_size], scratch))
                table[first // block_size] = scratch
            start = first
            lengths[index] = end - start
        tokens += request.token_ids[start:end]
        past_lens.append(start)
        params = request.sampling_params
        if params.prompt_logprobs is not None and (asked := positions_to_rate(request, count)):
            rated.append((index, asked))
            offset = len(tokens) - end - 1  # from a token to the row before it, which tells of it
            rated_rows += range(asked.start + offset, asked.stop + offset)
        blocks += table
        block_counts.append(needed)
        if end == len(request.token_ids):
            if params.needs_logits:
                with_logits.append(len(sampled))
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
    last = begins[1:] - 1
    rows = last[sampled]
    logit_rows = with_logits
    if rated_rows:
        rows = np.concatenate([rows, np.array(rated_rows, dtype=np.int32)])
        logit_rows = [*with_logits, *range(len(sampled), len(rows))]
    least = max(_rounded(len(rows)) if rounds_rows else len(rows), min_rows)
    if 0 < len(rows) < least:
        rows = np.concatenate([rows, np.repeat(rows[-1:], least - len(rows))])
    return StepBatch(
        inputs={
            "input_ids": np.array(tokens, dtype=np.int32),
            "position_ids": positions,
            "past_lens": past,
            "subsequence_begins": begins,
            "block_indices": np.array(blocks, dtype=np.int32),
            "block_indices_begins": np.array([0, *accumulate(block_counts)], dtype=np.int32),
            "max_context_len": np.array((past + counts).max(), dtype=np.int32),
            "sample_rows": rows,
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
