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
    A sibling that only lacks a block for its next token has the prompt, and does not. Where some
    sequences have lost more tokens than their siblings, they catch up while the siblings wait.
    """
    live = request.live
    if len(live) == 1:
        return live
    shared = request.num_prompt_tokens // block_size * block_size
    if any(each.lacks_blocks and each.num_computed_tokens < shared for each in live):
        return live[:1]
    return [each for each in live if each.num_tokens - each.num_computed_tokens > 1] or live


def want_of(request: Request, config: SchedulerConfig) -> Want:
    """What a resident could compute in a step. O(its sequences).

    A group's sequences compute equally many tokens, so that they stay together.
    """
    sequences = ready_sequences(request, config.block_size)
    if len(sequences) == 1:
        sequence = sequences[0]
        count = min(_wanted(sequence), config.max_num_batched_tokens)
        num_drafts = len(sequence.draft_token_ids)
        return Want(request, count, 1, _num_logit_rows(sequence, count), num_drafts)
    count = min(_wanted(sequence) for sequence in sequences)
    count = min(count, config.max_num_batched_tokens // len(sequences))
    return Want(
        request,
        count * len(sequences),
        len(sequences),
        sum(_num_logit_rows(sequence, count) for sequence in sequences),
        sum(len(sequence.draft_token_ids) for sequence in sequences),
    )


def _wanted(sequence: Sequence) -> int:
    """Tokens that a sequence could compute: uncomputed ones, and drafts after the last one."""
    count = len(sequence.token_ids) - sequence.num_computed_tokens
    return count + len(sequence.draft_token_ids) if count == 1 else count


def _num_logit_rows(sequence: Sequence, count: int) -> int:
    """Rows of logits that are read if a sequence computes ``count`` tokens, rated ones aside."""
    num_after = sequence.num_computed_tokens + count - len(sequence.token_ids)
    if num_after < 0 or not sequence.facts.sampling.needs_logits:
        return 0
    request = sequence.request
    return request.n if len(request.sequences) < request.n else 1 + num_after
