"""Requests: what is refused, what they consist of, how they compare."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from headway.core.errors import InvalidRequest
from headway.core.request import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    PriorityRequest,
    Request,
    SamplingParams,
)

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
        ({"n": 0}, "n of request 'a' is 0, must be at least 1"),
        ({"n": True}, "n of request 'a' is True, must be at least 1"),
        ({"n": 2.0}, "n of request 'a' is 2.0, must be at least 1"),
        (
            {"cache_salt": "x" * 257},
            "cache_salt of request 'a' has 257 characters, may have at most 256",
        ),
    ],
)
def test_bad_input_is_refused_with_value_and_limit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request(**({"request_id": "a", "priority": 0, "prompt": "hi"} | arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
    assert [request.priority for request in sorted(requests)] == sorted(priorities)


def test_less_than_is_the_key() -> None:
    a, b = Request("a", 5, [1]), Request("b", 1, [1])
    assert b < a
    a.key, b.key = (0.0, 1), (0.0, 2)
    assert a < b
    assert not b < a


# ---------------------------------------------------------------------- reading


def test_repr_says_where_it_stands() -> None:
    request = Request("a", 3, [1, 2], 9)
    request.token_ids.append(5)
    assert repr(request) == "Request('a', priority=3, waiting, tokens=2+1/9, computed=0)"
