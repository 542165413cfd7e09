"""The executor with the real model: it answers, and its answers do not depend on the company."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from headway.core.request import Request, SamplingParams
from headway.core.scheduler_output import SchedulerOutput
from headway.executor.openvino import OpenVINOExecutor
from headway.models.registry import resolve

pytestmark = pytest.mark.model

#: "The capital of France is", and " Paris".
PROMPT = [504, 3575, 282, 4649, 314]
PARIS = 7042


@pytest.fixture(scope="module")
def executor() -> Iterator[OpenVINOExecutor]:
    executor = OpenVINOExecutor(resolve("smollm2-135m-instruct"), kv_cache_bytes=200 << 20)
    yield executor
    executor.close()


def generate(
    executor: OpenVINOExecutor, requests: list[Request], steps: int, chunk: int = 1000
) -> list[list[int]]:
    """Run the requests together for so many steps each, prompts in chunks."""
    for _ in range(steps):
        output = SchedulerOutput()
        output.requests = requests
        output.num_scheduled_tokens = [
            min(chunk, request.num_tokens - request.num_computed_tokens) for request in requests
        ]
        tokens = executor.execute(output).sampled_token_ids
        for request, count, token in zip(
            requests, output.num_scheduled_tokens, tokens, strict=True
        ):
            request.num_computed_tokens += count
            if token is not None:
                request.token_ids.append(token)
    return [request.output_token_ids for request in requests]


def request(prompt: list[int], block: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=64)
    one = Request(f"r{block}", prompt=prompt, sampling_params=params)
    one.block_table = list(range(block, block + 8))
    return one


def test_the_capital_of_france(executor: OpenVINOExecutor) -> None:
    ((first, *_),) = generate(executor, [request(PROMPT, 0)], 1)
    assert first == PARIS


def test_batch_invariance_holds(executor: OpenVINOExecutor) -> None:
    assert executor.invariance.checked
    assert executor.invariance.holds, executor.invariance.summary


def test_greedy_output_does_not_depend_on_the_company(executor: OpenVINOExecutor) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, executor.vocab_size, 10 + 9 * n).tolist() for n in range(12)]
    alone = [generate(executor, [request(prompt, 0)], 12)[0] for prompt in prompts]
    together = [request(prompt, 8 * index) for index, prompt in enumerate(prompts)]
    generate(executor, together, 18, chunk=16)
    assert [one.output_token_ids[:12] for one in together] == alone
