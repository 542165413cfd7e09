"""What a resident could compute in a step, if there were room for all of it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from headway.core.config import SchedulerConfig
from headway.core.request import Request
from headway.core.sequence import Sequence
from headway.core.time_sharing import Want

__all__ = ["ready_sequences", "want_of"]


def ready_sequences(request: Request, block_size: int) -> Seq[Sequence]:
    """The sequences of a resident that can compute something, once it has blocks for its tokens.

    While the leader of a group computes the prompt (again), its siblings have no blocks, and wait.
    A sibling that only lacks a block for its next token has the prompt, and does not.
    """
    live = request.live
    if len(live) == 1:
        return live
    shared = request.num_prompt_tokens // block_size * block_size
    if all(not each.lacks_blocks or each.num_computed_tokens >= shared for each in live):
        return live
    return live[:1]


def want_of(request: Request, config: SchedulerConfig) -> Want:
    """What a resident could compute in a step. O(its sequences).

    A group's sequences compute equally many tokens, so that they stay together.
    """
    sequences = ready_sequences(request, config.block_size)
    if len(sequences) == 1:
        sequence = sequences[0]
        count = _wanted(sequence, config.deterministic)
        if len(request.live) > 1:  # siblings wait for the prompt, and go no further without it
            left = sequence.num_prompt_tokens - sequence.num_computed_tokens
            count = min(count, max(1, left))
        count = min(count, config.max_num_batched_tokens)
        num_drafts = len(sequence.draft_token_ids)
        return Want(request, count, 1, _num_logit_rows(sequence, count), num_drafts)
    count = min(_wanted(sequence, config.deterministic) for sequence in sequences)
    count = min(count, config.max_num_batched_tokens // len(sequences))
    return Want(
        request,
        count * len(sequences),
        len(sequences),
        sum(_num_logit_rows(sequence, count) for sequence in sequences),
        sum(len(sequence.draft_token_ids) for sequence in sequences),
    )


def _wanted(sequence: Sequence, is_deterministic: bool) -> int:
    """Tokens that a sequence could compute: uncomputed ones, and drafts after the last one."""
    computed = sequence.num_computed_tokens
    count = len(sequence.token_ids) - computed
    if count == 1:
        return 1 + len(sequence.draft_token_ids)
    if is_deterministic:
        # A generated token is computed again as it was computed first: one a step.
        left = sequence.num_prompt_tokens - computed
        return min(count, left) if left > 0 else 1
    return count


def _num_logit_rows(sequence: Sequence, count: int) -> int:
    """Rows of logits that are read if a sequence computes ``count`` tokens, rated ones aside."""
    num_after = sequence.num_computed_tokens + count - len(sequence.token_ids)
    if num_after < 0 or not sequence.facts.sampling.needs_logits:
        return 0
    request = sequence.request
    return request.n if len(request.sequences) < request.n else 1 + num_after
