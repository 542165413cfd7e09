"""The executor with the real model: it answers, and its answers do not depend on the company."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from growing_sequence import GrowingSequence

from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import SchedulerOutput
from headway.executor.native import NativeExecutor
from headway.models.registry import resolve

pytestmark = pytest.mark.model

#: "The capital of France is", and " Paris".
PROMPT = [504, 3575, 282, 4649, 314]
PARIS = 7042


@pytest.fixture(scope="module")
def executor() -> Iterator[NativeExecutor]:
    executor = NativeExecutor(resolve("smollm2-135m-instruct"), kv_cache_bytes=200 << 20)
    yield executor
    executor.close()


def generate(
    executor: NativeExecutor, sequences: list[GrowingSequence], steps: int, chunk: int = 1000
) -> list[list[int]]:
    """Run the sequences together for so many steps each, prompts in chunks."""
    for step in range(steps):
        rows = tuple(
            sequence.row(min(chunk, sequence.num_uncomputed_tokens)) for sequence in sequences
        )
        result = executor.execute(SchedulerOutput(step, rows))
        for sequence, row, tokens in zip(sequences, rows, result.tokens, strict=True):
            sequence.take(row, tokens)
    return [sequence.output for sequence in sequences]


def sequence(prompt: list[int], block: int) -> GrowingSequence:
    params = SamplingParams(temperature=0.0, max_tokens=64)
    return GrowingSequence(f"r{block}", prompt, params, block_table=range(block, block + 8))


def test_the_capital_of_france(executor: NativeExecutor) -> None:
    ((first, *_),) = generate(executor, [sequence(PROMPT, 0)], 1)
    assert first == PARIS


def test_greedy_output_does_not_depend_on_the_company(executor: NativeExecutor) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, executor.vocab_size, 10 + 9 * n).tolist() for n in range(12)]
    alone = [generate(executor, [sequence(prompt, 0)], 12)[0] for prompt in prompts]
    together = [sequence(prompt, 8 * index) for index, prompt in enumerate(prompts)]
    generate(executor, together, 18, chunk=16)
    assert [beside.output[:12] for beside in together] == alone
