"""From the numbers of a step to tokens, row by row.

A row whose logits are no numbers, or whose choice fails in any other way, gets an error, and the
others their tokens. What is not seen: a NaN beside finite logits, where the choice is greedy and
nothing else is asked of the row; the kernels' choice passes over it. A NaN in the activations,
which is what a fault of the model leads to, makes all logits of its row NaN, and is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import isfinite

import numpy as np
import numpy.typing as npt

from headway.core.errors import InternalError
from headway.core.scheduler_output import RatedPrompt, StepRow
from headway.executor.base import ModelRunnerOutput, PromptLogprobs, TokenLogprobs, accept_drafts
from headway.executor.batch import StepBatch, StepResult
from headway.executor.logprobs import LogprobReader
from headway.executor.sampler import Sampler

__all__ = ["Readout"]

FloatArray = npt.NDArray[np.float32]


class Readout:
    """Reads the results of steps over one vocabulary; for one thread."""

    def __init__(self, vocab_size: int) -> None:
        self._sampler = Sampler(vocab_size)
        self._logprobs = LogprobReader(vocab_size)

    def read(
        self,
        rows: Sequence[StepRow],
        batch: StepBatch,
        result: StepResult,
        swap_ms: float = 0.0,
    ) -> ModelRunnerOutput:
        """The tokens of ``batch``, which was built from ``rows``, and what the rows ask beside.

        O(rows), and O(vocabulary) for each line of logits that is read.
        """
        tokens: list[tuple[int, ...]] = [()] * len(rows)
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        errors: dict[int, InternalError] = {}
        lines = _Lines(batch, result)
        first = 0
        for index in batch.sampled:
            row = rows[index]
            try:
                tokens[index] = self._choose(row, lines, first)
                if row.sampling.logprobs is not None:
                    logprobs[index] = self._report(row, lines, first, tokens[index])
            except Exception as error:  # whatever it is, it is this row's alone
                errors[index] = _failure(row, error)
            first += 1 + len(row.drafts)
        first = len(batch.with_logits)
        for index in batch.rated:
            row = rows[index]
            assert row.rated is not None
            end = first + len(row.rated.token_ids)
            try:
                prompt_logprobs[index] = self._rate(row, row.rated, result.logits[first:end])
            except Exception as error:
                errors[index] = _failure(row, error)
            first = end
        for index in errors:
            tokens[index] = ()
            logprobs.pop(index, None)
            prompt_logprobs.pop(index, None)
        return ModelRunnerOutput(tokens, swap_ms, logprobs, prompt_logprobs, errors)

    def _choose(self, row: StepRow, lines: _Lines, first: int) -> tuple[int, ...]:
        """What the row's sequences go on with; ``first`` is the first of its lines."""
        history = row.context + row.token_ids if row.sampling.needs_history else ()
        if not row.drafts:
            return tuple([self._draw(row, lines, first, 0, seed, history) for seed in row.seeds])
        (seed,) = row.seeds
        return accept_drafts(
            (
                self._draw(row, lines, first + place, place, seed, history + row.drafts[:place])
                for place in count()
            ),
            row.drafts,
        )

    def _draw(
        self,
        row: StepRow,
        lines: _Lines,
        line: int,
        place: int,
        seed: int | None,
        history: tuple[int, ...],
    ) -> int:
        """The token after the row's tokens and its first ``place`` drafts.

        ``history`` is what penalties depend on: the tokens up to there, if there are penalties.
        """
        maximum = lines.maxima[line]
        if not isfinite(maximum):
            raise InternalError(f"its largest logit is {maximum}")
        logits = lines.logits.get(line)
        if logits is None:
            return lines.tokens[line]
        params = row.sampling
        position = row.start + len(row.token_ids) + place
        is_early = position - row.num_prompt_tokens < params.min_tokens
        return self._sampler.sample(
            logits,
            params,
            position,
            seed,
            row.num_prompt_tokens,
            history,
            row.banned if is_early else (),
        )

    def _report(
        self, row: StepRow, lines: _Lines, first: int, tokens: Sequence[int]
    ) -> tuple[TokenLogprobs, ...]:
        """How likely the model found each of the row's new tokens."""
        num_top = row.sampling.logprobs
        assert num_top is not None
        are_alternatives = len(row.seeds) > 1  # all of them after the row's last token
        return tuple(
            self._logprobs.read(
                lines.logits[first if are_alternatives else first + place], token_id, num_top
            )
            for place, token_id in enumerate(tokens)
        )

    def _rate(self, row: StepRow, rated: RatedPrompt, logits: FloatArray) -> PromptLogprobs:
        num_top = row.sampling.prompt_logprobs
        assert num_top is not None
        return PromptLogprobs(
            rated.start,
            [
                self._logprobs.read(line, token_id, num_top)
                for line, token_id in zip(logits, rated.token_ids, strict=True)
            ],
        )


class _Lines:
    """The outputs of a step, line by line; see ``StepBatch``."""

    def __init__(self, batch: StepBatch, result: StepResult) -> None:
        self.tokens: list[int] = result.tokens.tolist()
        self.maxima: list[float] = result.maxima.tolist()
        #: Of the lines that need them.
        self.logits: dict[int, FloatArray] = dict(
            zip(batch.with_logits, result.logits, strict=False)
        )


def _failure(row: StepRow, cause: Exception) -> InternalError:
    error = InternalError(f"request {row.request_id!r} cannot go on: {cause}")
    error.__cause__ = cause
    return error
