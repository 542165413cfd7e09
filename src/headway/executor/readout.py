"""From the numbers of a step to tokens, request by request.

A request whose logits are no numbers, or whose choice fails in any other way, gets an error, and
the others their tokens. What is not seen: a NaN beside finite logits, where the choice is greedy
and nothing else is asked of the row; the graph's choice passes over it. A NaN in the activations,
which is what a fault of the model leads to, makes all logits of its row NaN, and is seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headway.core.errors import InternalError
from headway.core.request import Request
from headway.executor.base import ModelRunnerOutput, PromptLogprobs, TokenLogprobs
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
        requests: Sequence[Request],
        batch: StepBatch,
        result: StepResult,
        swap_ms: float = 0.0,
    ) -> ModelRunnerOutput:
        """The tokens of ``batch``, which was built from ``requests``, and what they ask beside.

        O(requests), and O(vocabulary) for each row of logits.
        """
        sampled: list[int | None] = [None] * len(requests)
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        errors: dict[int, InternalError] = {}
        for index, token_id in zip(batch.sampled, result.tokens.tolist(), strict=False):
            sampled[index] = token_id
        is_number = np.isfinite(result.maxima[: len(batch.sampled)])
        if not is_number.all():
            for row in np.flatnonzero(~is_number).tolist():
                index = batch.sampled[row]
                errors[index] = _failure(
                    requests[index], f"its largest logit is {result.maxima[row]}"
                )
        for logits, row in zip(result.logits, batch.with_logits, strict=False):
            index = batch.sampled[row]
            try:
                sampled[index], rating = self._choose(requests[index], logits)
                if rating is not None:
                    logprobs[index] = rating
            except Exception as error:  # whatever it is, it is this request's alone
                errors[index] = _failure(requests[index], error)
        first = len(batch.with_logits)
        for index, positions in batch.rated:
            rows = result.logits[first : first + len(positions)]
            first += len(positions)
            try:
                prompt_logprobs[index] = self._rate(requests[index], positions, rows)
            except Exception as error:
                errors[index] = _failure(requests[index], error)
        for index in errors:
            sampled[index] = None
            logprobs.pop(index, None)
            prompt_logprobs.pop(index, None)
        return ModelRunnerOutput(sampled, swap_ms, logprobs, prompt_logprobs, errors)

    def _choose(self, request: Request, logits: FloatArray) -> tuple[int, TokenLogprobs | None]:
        params = request.sampling_params
        token_id = self._sampler.sample(
            logits, params, request.num_tokens, request.output_token_ids
        )
        if params.logprobs is None:
            return token_id, None
        return token_id, self._logprobs.read(logits, token_id, params.logprobs)

    def _rate(self, request: Request, positions: range, rows: FloatArray) -> PromptLogprobs:
        num_top = request.sampling_params.prompt_logprobs
        assert num_top is not None
        token_ids = request.token_ids[positions.start : positions.stop]
        return PromptLogprobs(
            positions.start,
            [
                self._logprobs.read(logits, token_id, num_top)
                for logits, token_id in zip(rows, token_ids, strict=True)
            ],
        )


def _failure(request: Request, cause: Exception | str) -> InternalError:
    error = InternalError(f"request {request.request_id!r} cannot go on: {cause}")
    error.__cause__ = cause if isinstance(cause, Exception) else None
    return error
