"""Steps of the model without an engine: rows that somebody makes up, and what they compute."""

from __future__ import annotations

from collections.abc import Sequence

from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.executor.batch import StepResult
from headway.executor.native import NativeExecutor
from headway.executor.native_model import BLOCK_SIZE

__all__ = ["compute", "make_rows", "num_blocks"]

_GREEDY = SamplingParams(temperature=0.0)


def make_rows(num_seqs: int, num_tokens: int, context: int) -> list[StepRow]:
    """A step of so many sequences, each of which computes ``num_tokens`` after ``context`` others.

    What is in the pool for those counts as their keys and values. Each sequence has blocks of its
    own, from block 0 on, and samples one token, greedily.
    """
    each = -(-(context + num_tokens) // BLOCK_SIZE)
    return [
        StepRow(
            str(index),
            0,
            tuple(range(100 + index, 100 + index + num_tokens)),
            context,
            tuple(range(index * each, (index + 1) * each)),
            context + num_tokens,
            _GREEDY,
            seeds=(None,),
        )
        for index in range(num_seqs)
    ]


def num_blocks(rows: Sequence[StepRow]) -> int:
    """Blocks that a pool needs for ``make_rows``."""
    return 1 + max(block for row in rows for block in row.block_table)


def compute(executor: NativeExecutor, rows: Sequence[StepRow]) -> StepResult:
    """Run a step to its end; nothing is sampled but what the kernels choose."""
    execution = executor.begin(SchedulerOutput(rows=rows))
    while not execution.advance():
        pass
    return execution.result
