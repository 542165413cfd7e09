"""From a step's numbers to tokens: everybody gets what they asked for, and only their own faults.

The graph is replaced by a table: the logits after a token depend on nothing but the token and its
position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.errors import InternalError
from headway.core.request import Request, SamplingParams
from headway.executor.base import ModelRunnerOutput, TokenLogprobs
from headway.executor.batch import StepResult, build_batch
from headway.executor.logprobs import LogprobReader
from headway.executor.readout import Readout

VOCAB = 50
BLOCK = 4
READOUT = Readout(VOCAB)
GREEDY = SamplingParams(temperature=0)

#: One of each kind of row: what the graph chose, what is drawn, adjusted, reported and rated.
KINDS = (
    GREEDY,
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=0, presence_penalty=1.5, logit_bias={7: 2.0}),
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=1.5, seed=4, logprobs=0, prompt_logprobs=3),
)


def logits_after(token_id: int, position: int) -> np.ndarray:
    random = np.random.default_rng((token_id, position))
    return random.normal(scale=3, size=VOCAB).astype(np.float32)


def request(
    name: str, params: SamplingParams, tokens: Sequence[int], num_prompt: int, computed: int
) -> Request:
    one = Request(name, prompt=list(tokens[:num_prompt]), sampling_params=params)
    one.token_ids += tokens[num_prompt:]
    one.num_computed_tokens = computed
    one.block_table = list(range(len(tokens) // BLOCK + 1))
    return one


def step(
    requests: list[Request],
    counts: list[int] | None = None,
    broken: dict[str, float] | None = None,
    min_rows: int = 2,
) -> ModelRunnerOutput:
    """Compute so many tokens of each, or all; the logits after the last one of the broken are so.

    ``broken``: request id → the value of all its logits.
    """
    counts = counts or [one.num_tokens - one.num_computed_tokens for one in requests]
    batch = build_batch(requests, counts, BLOCK, range(100, 120), min_rows, min_chunk=2)
    inputs = batch.inputs
    table = np.array(
        [
            logits_after(*pair)
            for pair in zip(inputs["input_ids"], inputs["position_ids"], strict=True)
        ]
    )
    for index, one in enumerate(requests):
        if broken and one.request_id in broken:
            table[inputs["subsequence_begins"][index + 1] - 1] = broken[one.request_id]
    rows = table[inputs["sample_rows"]].reshape(-1, VOCAB)
    result = StepResult(
        rows.argmax(1).astype(np.int32), rows.max(1), rows[inputs["logit_rows"]].reshape(-1, VOCAB)
    )
    return READOUT.read(requests, batch, result, 1.5)


def everybody() -> list[Request]:
    random = np.random.default_rng(0)
    return [
        request(f"r{index}", params, random.integers(0, VOCAB, 9 + index).tolist(), 6, 6 + index)
        for index, params in enumerate(KINDS)
    ]


@settings(deadline=None)
@given(st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=8), st.sampled_from([1, 2, 8]))
def test_nobody_notices_the_others(chosen: list[int], min_rows: int) -> None:
    requests = everybody()
    alone = [step([one], min_rows=2) for one in requests]
    together = step([requests[index] for index in chosen], min_rows=min_rows)
    assert together.swap_ms == 1.5
    for at, index in enumerate(chosen):
        assert together.sampled_token_ids[at] == alone[index].sampled_token_ids[0]
        assert together.logprobs.get(at) == alone[index].logprobs.get(0)
        assert together.prompt_logprobs.get(at) == alone[index].prompt_logprobs.get(0)


def test_each_gets_what_it_asked_for() -> None:
    output = step(everybody())
    assert None not in output.sampled_token_ids
    assert set(output.logprobs) == {3, 4}
    assert [len(output.logprobs[index].top) for index in (3, 4)] == [2, 0]
    for index in (3, 4):
        assert output.logprobs[index].token_id == output.sampled_token_ids[index]
    assert output.logprobs[3].top[0] == output.logprobs[3][:2]
    assert not output.errors
    assert not output.prompt_logprobs  # those prompts have been computed before


def test_a_penalised_choice_is_reported_as_the_model_saw_it() -> None:
    tokens = list(range(8))
    plain = request("a", SamplingParams(temperature=0, logprobs=3), tokens, 8, 4)
    token_id = step([plain]).sampled_token_ids[0]
    assert token_id is not None
    banned = SamplingParams(temperature=0, logprobs=3, logit_bias={token_id: -100})
    (other,) = step([request("a", banned, tokens, 8, 4)]).logprobs.values()
    (first, _), second, _ = step([plain]).logprobs[0].top
    assert first == token_id
    assert other == TokenLogprobs(*second, step([plain]).logprobs[0].top)


@settings(deadline=None)
@given(
    num_prompt=st.integers(1, 14),
    num_output=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 13), max_size=4),
    num_top=st.integers(0, 5),
)
def test_a_prompt_is_rated_whatever_its_chunks(
    num_prompt: int, num_output: int, cuts: list[int], num_top: int
) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, num_prompt + num_output).tolist()
    params = SamplingParams(temperature=0, prompt_logprobs=num_top)
    one = request("a", params, tokens, num_prompt, 0)
    other = request("b", SamplingParams(seed=1), [3, 4, 5], 3, 0)
    rated: list[TokenLogprobs] = []
    while one.num_computed_tokens < one.num_tokens:
        left = one.num_tokens - one.num_computed_tokens
        count = min(left, cuts.pop()) if cuts else left
        output = step([other, one], [3, count])
        if 1 in output.prompt_logprobs:
            assert output.prompt_logprobs[1].start == len(rated) + 1
            rated += output.prompt_logprobs[1].tokens
        one.num_computed_tokens += count
    reader = LogprobReader(VOCAB)
    assert rated == [
        reader.read(logits_after(tokens[at - 1], at - 1), tokens[at], num_top)
        for at in range(1, num_prompt)
    ]


def test_what_is_computed_again_is_not_rated_again() -> None:
    one = request("a", SamplingParams(prompt_logprobs=0, seed=1), range(10), 10, 4)
    one.peak_computed_tokens = 6
    assert step([one], [1]).prompt_logprobs == {}
    rated = step([one], [4]).prompt_logprobs[0]
    assert (rated.start, [one.token_id for one in rated.tokens]) == (7, [7, 8])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("victim", range(len(KINDS)))
def test_broken_logits_end_only_their_own_request(victim: int, value: float) -> None:
    requests = everybody()
    sound = step(requests)
    output = step(requests, broken={f"r{victim}": value})
    assert set(output.errors) == {victim}
    assert isinstance(output.errors[victim], InternalError)
    assert str(output.errors[victim]).startswith(f"request 'r{victim}' cannot go on: ")
    assert str(output.errors[victim]).endswith(f" is {value}")
    assert output.sampled_token_ids[victim] is None
    assert victim not in output.logprobs
    for index in {*range(len(KINDS))} - {victim}:
        assert output.sampled_token_ids[index] == sound.sampled_token_ids[index]
        assert output.logprobs.get(index) == sound.logprobs.get(index)


def test_broken_logits_in_a_prompt_that_is_rated() -> None:
    rated = request("a", SamplingParams(temperature=0, prompt_logprobs=1), range(9), 9, 0)
    other = request("b", GREEDY, range(5), 5, 0)
    output = step([rated, other], [5, 5], broken={"a": np.nan})
    assert output.sampled_token_ids == [None, step([other]).sampled_token_ids[0]]
    assert set(output.errors) == {0}
    assert output.prompt_logprobs == {}


def test_any_other_fault_of_a_choice_is_its_own_request_s_too() -> None:
    # Without a tokenizer, nobody knows the vocabulary before this.
    outside = SamplingParams(temperature=0, logit_bias={VOCAB: 1.0})
    requests = [request("a", outside, range(5), 5, 0), request("b", KINDS[1], range(5), 5, 0)]
    output = step(requests)
    assert set(output.errors) == {0}
    assert "request 'a' cannot go on" in str(output.errors[0])
    assert output.sampled_token_ids == [None, step(requests[1:]).sampled_token_ids[0]]
