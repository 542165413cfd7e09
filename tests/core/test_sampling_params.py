"""Sampling parameters: what is refused, and what the choice of a token takes."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.errors import InvalidRequest
from headway.core.sampling_params import SamplingParams, choice_seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, must be 0 … 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0.0}, "top_p is 0.0, must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -2}, "top_k is -2, must be −1, 0 (all) or positive"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"seed": -1}, "seed is -1, must be 0 … 2**64 − 1"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, must be −2 … 2"),
        ({"presence_penalty": "no"}, "presence_penalty is 'no'"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1, must be −2 … 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"frequency_penalty": None}, "frequency_penalty is None"),
        ({"logprobs": 21}, "logprobs is 21, must be 0 … 20"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": True}, "logprobs is True"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21, must be 0 … 20"),
        ({"prompt_logprobs": 1.0}, "prompt_logprobs is 1.0"),
        ({"logit_bias": [1, 2]}, "logit_bias is of type list, must map token ids to numbers"),
        ({"logit_bias": None}, "logit_bias is of type NoneType"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias is for token '5', must be for ids from 0 on"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias is for token -1"),
        ({"logit_bias": {5: 100.5}}, "logit_bias of token 5 is 100.5, must be −100 … 100"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 is nan"),
        ({"logit_bias": {5: "1"}}, "logit_bias of token 5 is '1'"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"stop": ""}, "stop is '', must be texts of at least one character"),
        ({"stop": ("a", "")}, "must be texts of at least one character"),
        ({"stop": (1,)}, "must be texts of at least one character"),
        ({"stop": None}, "stop is None, must be texts of at least one character"),
        ({"stop": 5}, "stop is 5, must be texts of at least one character"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5, must be token ids"),
        ({"stop_token_ids": [[1]]}, "stop_token_ids has [1], must be token ids from 0 on"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids has -1, must be token ids from 0 on"),
        ({"stop_token_ids": "1"}, "stop_token_ids has '1', must be token ids from 0 on"),
        ({"min_tokens": -1}, "min_tokens is -1, must be 0 … 16 (max_tokens)"),
        ({"min_tokens": 17}, "min_tokens is 17, must be 0 … 16 (max_tokens)"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens is 4, must be 0 … 3 (max_tokens)"),
        ({"min_tokens": True}, "min_tokens is True"),
        ({"min_tokens": 1.0}, "min_tokens is 1.0"),
        ({"min_p": -0.01}, "min_p is -0.01, must be 0 … 1"),
        ({"min_p": 1.01}, "min_p is 1.01, must be 0 … 1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"min_p": None}, "min_p is None"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, must be finite and above 0"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1, must be finite and above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf, must be finite"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"repetition_penalty": 10**309}, "must be finite and above 0"),
        ({"repetition_penalty": "2"}, "repetition_penalty is '2'"),
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
    ],
)
def test_bad_sampling_params_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sampling_params_are_normalised() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[1, 2, 2])  # type: ignore[arg-type]
    assert params.stop == ("END",)
    assert params.stop_token_ids == frozenset({1, 2})
    assert hash(params) == hash(SamplingParams(stop=("END",), stop_token_ids=frozenset({1, 2})))


def test_a_logit_bias_is_copied_compared_and_pickled() -> None:
    biases = {5: 1.5, 7: -100}
    params = SamplingParams(logit_bias=biases)
    biases[5] = 3.0
    assert params.logit_bias == {5: 1.5, 7: -100}
    assert params == SamplingParams(logit_bias={7: -100.0, 5: 1.5}) != SamplingParams()
    assert hash(params) == hash(SamplingParams(logit_bias={7: -100.0, 5: 1.5}))
    assert pickle.loads(pickle.dumps(params)) == params == replace(params)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, False),
        ({"top_p": 0.5, "prompt_logprobs": 3, "presence_penalty": 0}, False),
        ({"temperature": 1.0}, True),
        ({"temperature": 1.0, "top_k": 1}, False),
        ({"logprobs": 0}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"min_p": 0.5}, False),
        ({"logit_bias": {0: 1.0}}, True),
    ],
    ids=str,
)
def test_logits_are_needed_unless_the_likeliest_token_is_all_that_counts(
    arguments: dict[str, Any], expected: bool
) -> None:
    params = SamplingParams(**({"temperature": 0.0} | arguments))
    assert params.needs_logits is expected
    assert params.needs_logits_at(0) is params.needs_logits_at(9) is expected
    assert replace(params, max_tokens=3).needs_logits is expected


def test_min_tokens_need_logits_until_they_are_generated() -> None:
    params = SamplingParams(temperature=0, min_tokens=3)
    assert params.needs_logits
    assert [params.needs_logits_at(count) for count in range(5)] == [True] * 3 + [False] * 2
    params = SamplingParams(temperature=0, min_tokens=3, repetition_penalty=1.1)
    assert params.needs_logits_at(5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, False),
        ({"min_tokens": 2, "min_p": 0.5, "logit_bias": {0: 1.0}, "logprobs": 1}, False),
        ({"repetition_penalty": 1}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
    ],
    ids=str,
)
def test_history_is_needed_for_penalties_only(arguments: dict[str, Any], expected: bool) -> None:
    assert SamplingParams(**arguments).needs_history is expected


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(min_tokens=16, min_p=1, repetition_penalty=2, stop_token_ids=frozenset({0}))
    SamplingParams(min_tokens=0, min_p=0, repetition_penalty=1e-300, max_tokens=1)


@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**64))
def test_every_choice_of_a_prompt_has_a_seed_of_its_own(seed: int, index: int) -> None:
    assert choice_seed(seed, 0) == seed
    assert SamplingParams(seed=choice_seed(seed, index)).seed == (seed + index) % 2**64
    assert choice_seed(seed, index) != choice_seed(seed, index + 1)
