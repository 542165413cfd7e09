"""A step on its way through the model: it can be stopped between two layers, and go on later."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headway.executor.base import ModelRunnerOutput
from headway.executor.batch import StepBatch, StepResult
from headway.executor.native_model import NativeModel
from headway.kernels.library import Cache, Step

__all__ = ["Execution"]

_Arrays = npt.NDArray[np.int32] | npt.NDArray[np.float32]


class Execution:
    """One step's progress.

    Between two stages it holds its tokens' activations, and nothing else: other steps of the same
    model may run before it goes on, as long as they write to none of its rows' blocks. What it has
    written to the pool so far is right, and computing it again writes the same bits; so an
    execution is discarded by forgetting it.

    Args:
        model: that computes it.
        cache: the pool.
        batch: its rows' arrays; None for a step without rows, which is complete at once.
        read: makes the output of what was computed.
    """

    def __init__(
        self,
        model: NativeModel,
        cache: Cache,
        batch: StepBatch | None,
        read: Callable[[StepResult], ModelRunnerOutput],
    ) -> None:
        self._model, self._cache, self._read = model, cache, read
        #: The next stage; ``num_stages`` when it is complete.
        self.stage = 0 if batch is not None else self.num_stages
        num_tokens = 0 if batch is None else len(batch.token_ids)
        num_lines = 0 if batch is None else len(batch.sample_rows)
        num_logits = 0 if batch is None else len(batch.logit_rows)
        config = model.config
        #: ``[T, hidden_size]``: of each token, what the layers so far have made of it.
        self.hidden = np.empty((num_tokens, config.hidden_size), np.float32)
        self._result = StepResult(
            np.empty(num_lines, np.int32),
            np.empty(num_lines, np.float32),
            np.empty((num_logits, config.vocab_size), np.float32),
        )
        self._stop = np.zeros(1, np.int32)
        #: Keeps the arrays that the structure has addresses of.
        self._batch = batch
        if batch is not None:
            self._step = Step(
                num_tokens,
                len(batch.past_lens),
                len(batch.block_indices),
                num_lines,
                num_logits,
                0,
                0,
                _address(batch.token_ids),
                _address(batch.past_lens),
                _address(batch.begins),
                _address(batch.block_indices),
                _address(batch.block_begins),
                _address(batch.sample_rows),
                _address(batch.logit_rows),
                _address(self.hidden),
                _address(self._result.tokens),
                _address(self._result.maxima),
                _address(self._result.logits),
                _address(self._stop),
            )

    @property
    def num_stages(self) -> int:
        """Stages that it goes through: one a layer, and the head."""
        return self._model.num_stages

    @property
    def is_complete(self) -> bool:
        """Whether ``output`` may be asked for."""
        return self.stage == self.num_stages

    def advance(self, until: int | None = None) -> bool:
        """Go on until it is complete, until stage ``until`` is next, or until it is stopped.

        At least one stage is computed, if any is left. Returns whether it is complete.

        Raises:
            InternalError: the step does not fit the model, the pool or the scratch space, or the
                model is closed.
        """
        last = self.num_stages if until is None else min(until, self.num_stages)
        if self.stage < last:
            self.stage = self._model.run(self._cache, self._step, self.stage, last)
        self._stop[0] = 0
        return self.is_complete

    def stop(self) -> None:
        """Let ``advance`` return after the stage at hand, or after its first. From any thread."""
        self._stop[0] = 1

    @property
    def result(self) -> StepResult:
        """What the complete step computed."""
        assert self.is_complete, f"stage {self.stage} of {self.num_stages}"
        return self._result

    def output(self) -> ModelRunnerOutput:
        """What the complete step produced."""
        return self._read(self.result)


def _address(values: _Arrays) -> int:
    return int(values.ctypes.data)
