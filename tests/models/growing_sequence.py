"""A sequence to test executors with, kept as a scheduler would keep it."""

from __future__ import annotations

from collections.abc import Sequence

from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import RatedPrompt, StepRow


class GrowingSequence:
    """Makes rows of its next tokens, and takes in what an executor answers to them."""

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        output: Sequence[int] = (),
        num_computed_tokens: int = 0,
        block_table: Sequence[int] = (),
        index: int = 0,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.token_ids = [*prompt, *output]
        self.num_prompt_tokens = len(prompt)
        self.num_computed_tokens = num_computed_tokens
        self.block_table = list(block_table)
        #: Below it, tokens that are computed again have been rated before.
        self.peak_computed_tokens = 0

    @property
    def prompt(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def row(
        self,
        count: int | None = None,
        *,
        seeds: tuple[int | None, ...] | None = None,
        drafts: tuple[int, ...] = (),
        banned: frozenset[int] = frozenset(),
    ) -> StepRow:
        """The next ``count`` tokens, or all; with the sequence's own seed behind the last one."""
        start = self.num_computed_tokens
        end = start + (self.num_uncomputed_tokens if count is None else count)
        if seeds is None:
            seeds = (self.params.seed,) if end == len(self.token_ids) else ()
        first_context = 0 if self.params.needs_history else max(0, start - 1)
        rated = None
        if self.params.prompt_logprobs is not None:
            first = max(start, self.peak_computed_tokens) + 1
            told = self.prompt[first : end + 1]
            rated = RatedPrompt(first, tuple(told)) if told else None
        return StepRow(
            self.request_id,
            self.index,
            tuple(self.token_ids[start:end]),
            start,
            tuple(self.block_table),
            self.num_prompt_tokens,
            self.params,
            seeds=seeds,
            drafts=drafts,
            context=tuple(self.token_ids[first_context:start]),
            banned=banned,
            rated=rated,
        )

    def take(self, row: StepRow, tokens: tuple[int, ...]) -> None:
        """Take in what ``row`` gave: with drafts, the accepted ones are computed already."""
        self.num_computed_tokens += len(row.token_ids) + max(0, len(tokens) - 1)
        self.token_ids += tokens
