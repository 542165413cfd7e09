"""Requests: what is refused, how they may move, how they compare."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from headway.core.errors import InvalidRequest, InvalidTransition
from headway.core.request import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    TRANSITIONS,
    PriorityRequest,
    Request,
    RequestStatus,
    SamplingParams,
)

UNFINISHED = [status for status in RequestStatus if not status.is_finished]
FINISHED = [status for status in RequestStatus if status.is_finished]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"request_id": ""}, "request_id is '', must be a non-empty string"),
        ({"request_id": 7}, "request_id is 7, must be a non-empty string"),
        ({"prompt": ""}, "prompt of request 'a' is empty, needs 1 token"),
        ({"prompt": []}, "prompt of request 'a' is empty, needs 1 token"),
        ({"prompt": "text", "prompt_token_ids": []}, "prompt of request 'a' is empty"),
        ({"prompt": None}, "prompt of request 'a' must be a text or token ids of 0 … 2**63 − 1"),
        ({"prompt": 5}, "prompt of request 'a' must be a text or token ids"),
        ({"prompt": ["a"]}, "prompt of request 'a' must be a text or token ids"),
        ({"prompt": [1, 2.0]}, "prompt of request 'a' must be a text or token ids"),
        ({"prompt": [1, -1]}, "prompt of request 'a' must be a text or token ids"),
        ({"prompt": [2**63]}, "prompt of request 'a' must be a text or token ids"),
        ({"deadline": math.nan}, "deadline of request 'a' is nan, must be finite seconds"),
        ({"deadline": math.inf}, "deadline of request 'a' is inf, must be finite seconds"),
        ({"deadline": "soon"}, "deadline of request 'a' is 'soon', must be finite seconds"),
        ({"arrival_time": math.nan}, "arrival_time of request 'a' is nan, must be finite"),
        ({"arrival_time": True}, "arrival_time of request 'a' is True, must be finite"),
        ({"priority": 2**63}, f"is {2**63}, must be an int64 ({MIN_PRIORITY} … {MAX_PRIORITY})"),
        ({"priority": -(2**63) - 1}, f"is {-(2**63) - 1}, must be an int64"),
        ({"priority": 1.0}, "priority of request 'a' is 1.0, must be an int64"),
        ({"priority": True}, "priority of request 'a' is True, must be an int64"),
        ({"priority": "high"}, "priority of request 'a' is 'high', must be an int64"),
        ({"priority": None}, "priority of request 'a' is None, must be an int64"),
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
        ({"max_tokens": -5}, "max_tokens is -5, must be at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5, must be at least 1"),
        ({"max_tokens": 4, "sampling_params": SamplingParams()}, "not both"),
    ],
)
def test_bad_input_is_refused_with_value_and_limit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request(**({"request_id": "a", "priority": 0, "prompt": "hi"} | arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
        ({"stop_token_ids": [[1]]}, "stop_token_ids is [[1]], must be token ids"),
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
    ],
)
def test_bad_sampling_params_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**arguments)
    assert message in str(caught.value)


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
        ({"logit_bias": {0: 1.0}}, True),
    ],
    ids=str,
)
def test_logits_are_needed_unless_the_likeliest_token_is_all_that_counts(
    arguments: dict[str, Any], expected: bool
) -> None:
    params = SamplingParams(**({"temperature": 0.0} | arguments))
    assert params.needs_logits is expected
    assert replace(params, max_tokens=3).needs_logits is expected


# ---------------------------------------------------------------------- tokens


def test_a_text_counts_its_bytes_until_there_is_a_tokenizer() -> None:
    request = PriorityRequest("a", priority=1, prompt="né", max_tokens=8)
    assert request.token_ids == list("né".encode())
    assert request.num_prompt_tokens == 3
    assert request.prompt == "né"
    assert (request.priority, request.max_tokens) == (1, 8)


def test_half_a_character_is_no_error() -> None:
    """JSON can carry a lone surrogate, which UTF-8 proper has no bytes for."""
    assert Request("a", 0, "\ud800").num_prompt_tokens == 3


def test_token_ids_win_over_the_text() -> None:
    request = Request("a", 0, "text", prompt_token_ids=[5, 6])
    assert (request.prompt, request.token_ids) == ("text", [5, 6])
    given_as_prompt = Request("b", 0, (5, 6))
    assert (given_as_prompt.prompt, given_as_prompt.token_ids) == (None, [5, 6])


def test_the_prompt_is_a_copy() -> None:
    prompt = [1, 2]
    request = Request("a", 0, prompt)
    request.token_ids.append(3)
    assert prompt == [1, 2]
    assert request.prompt_token_ids == [1, 2]
    assert request.output_token_ids == [3]
    assert (request.num_tokens, request.num_output_tokens) == (3, 1)


@pytest.mark.parametrize("priority", [MIN_PRIORITY, -1, 0, MAX_PRIORITY])
def test_every_int64_is_a_priority(priority: int) -> None:
    assert Request("a", priority, [1]).priority == priority


# ---------------------------------------------------------------------- comparing


@given(st.lists(st.integers(MIN_PRIORITY, MAX_PRIORITY)))
def test_requests_sort_by_rank_most_urgent_first(priorities: list[int]) -> None:
    requests = [Request(f"r{i}", priority, [1]) for i, priority in enumerate(priorities)]
    assert [one.priority for one in sorted(requests)] == sorted(priorities)


def test_less_than_is_the_key() -> None:
    a, b = Request("a", 5, [1]), Request("b", 1, [1])
    assert b < a
    a.key, b.key = (0.0, 1), (0.0, 2)
    assert a < b
    assert not b < a


# ---------------------------------------------------------------------- moving

PATHS: dict[RequestStatus, list[RequestStatus]] = {
    RequestStatus.WAITING: [],
    RequestStatus.RUNNING: [RequestStatus.RUNNING],
    RequestStatus.PAUSED: [RequestStatus.RUNNING, RequestStatus.PAUSED],
    RequestStatus.SWAPPED: [RequestStatus.RUNNING, RequestStatus.SWAPPED],
    RequestStatus.PREEMPTED: [RequestStatus.RUNNING, RequestStatus.PREEMPTED],
} | {status: [status] for status in FINISHED}

#: The design's diagram, and WAITING → PAUSED for a fork of a running request.
ALLOWED = {
    ("waiting", "running"),
    ("waiting", "paused"),
    ("running", "paused"),
    ("running", "swapped"),
    ("running", "preempted"),
    ("paused", "running"),
    ("paused", "swapped"),
    ("paused", "preempted"),
    ("swapped", "running"),
    ("swapped", "preempted"),
    ("preempted", "running"),
} | {(start.value, end.value) for start in UNFINISHED for end in FINISHED}


def test_the_table_has_every_status() -> None:
    assert TRANSITIONS.keys() == set(RequestStatus)


@pytest.mark.parametrize("start", RequestStatus, ids=lambda status: status.value)
@pytest.mark.parametrize("end", RequestStatus, ids=lambda status: status.value)
def test_transitions(start: RequestStatus, end: RequestStatus) -> None:
    request = Request("a", 0, [1])
    for i, status in enumerate(PATHS[start]):
        request.transition(status, float(i))
    assert request.status is start
    history = list(request.transitions)
    if (start.value, end.value) in ALLOWED:
        request.transition(end, 9.5)
        assert request.status is end
        assert request.transitions == [*history, (9.5, end)]
        assert request.is_finished is end.is_finished
    else:
        with pytest.raises(InvalidTransition) as caught:
            request.transition(end, 9.5)
        message = str(caught.value)
        assert f"'a' cannot go from {start.value} to {end.value}" in message
        for time, status in history:
            assert f"{status.value}@{time:.3f}" in message
        assert request.status is start
        assert request.transitions == history


def test_every_finished_status_has_a_reason() -> None:
    assert [status.finish_reason for status in FINISHED] == [
        "stop",
        "length",
        "abort",
        "timeout",
        "rejected",
    ]
    assert all(status.finish_reason is None for status in UNFINISHED)


def test_repr_says_where_it_stands() -> None:
    request = Request("a", 3, [1, 2], 9)
    request.token_ids.append(5)
    assert repr(request) == "Request('a', priority=3, waiting, tokens=2+1/9, computed=0)"
