"""Requests that have begun elsewhere go on here as if they had never moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from zlib import crc32

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core import invariants
from headway.core.errors import InvalidRequest, RequestTooLong
from headway.core.request import Request, RequestStatus, SamplingParams

if TYPE_CHECKING:
    from tests.core.conftest import Lab

PROMPT = [1, 2, 3, 4, 5, 6]
PARAMS = SamplingParams(max_tokens=8, seed=11)


def token_of(request_id: str, index: int, position: int) -> int:
    return 100 + crc32(f"{request_id}/{index}/{position}".encode()) % 1000


def output_of(index: int, length: int, request_id: str = "a") -> list[int]:
    return [token_of(request_id, index, len(PROMPT) + place) for place in range(length)]


def resumed(outputs: dict[int, list[int]], **others: Any) -> Request:
    arguments = {"sampling_params": PARAMS} | others
    return Request.resume("a", 0, PROMPT, outputs=outputs, **arguments)


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("outputs", "others", "message"),
    [
        (
            {0: list(range(8))},
            {},
            "choice 0 of request 'a' resumes with 8 tokens, must be 1 … 7 (max_tokens is 8)",
        ),
        (
            {0: [1], 1: []},
            {"n": 2},
            "choice 1 of request 'a' resumes with 0 tokens, must be 1 … 7 (max_tokens is 8)",
        ),
        ({}, {}, "request 'a' resumes the choices [], must be one or more of 0 … 0"),
        ({2: [1]}, {"n": 2}, "request 'a' resumes the choices [2], must be one or more of 0 … 1"),
        ({-1: [1]}, {}, "request 'a' resumes the choices [-1], must be one or more of 0 … 0"),
        (
            {0: [1]},
            {"sampling_params": SamplingParams(max_tokens=8)},
            "request 'a' resumes without its seed",
        ),
        ({0: [-5]}, {}, "of request 'a' must be a text or token ids of 0 … 2**63 − 1"),
    ],
)
def test_what_cannot_be_resumed(
    outputs: dict[int, list[int]], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resumed(outputs, **others)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_greedy_request_needs_no_seed() -> None:
    request = resumed({0: [7]}, sampling_params=SamplingParams(max_tokens=8, temperature=0.0))
    assert request.output_token_ids == [7]


def test_without_any_tokens_it_is_a_new_request(lab: type[Lab]) -> None:
    request = resumed({0: [], 1: []}, n=2)
    assert len(request.sequences) == 1
    assert request.awaits_first_token
    fresh = lab()
    fresh.scheduler.add_request(request)
    assert len(fresh.step().output[0].seeds) == 2
    fresh.drain()


def test_what_it_has_so_far_must_fit(lab: type[Lab]) -> None:
    small = lab(num_blocks=3)
    params = SamplingParams(max_tokens=20, seed=1)
    with pytest.raises(RequestTooLong, match="has 12 tokens, the whole KV pool holds 12"):
        small.scheduler.add_request(resumed({0: [1] * 6}, sampling_params=params))


def test_the_prompt_and_the_outputs_are_what_they_were() -> None:
    request = resumed({0: [7, 8], 2: [9]}, n=3, tenant="t", arrival_time=4.0)
    assert request.prompt_token_ids == PROMPT
    assert [each.output_token_ids for each in request.sequences] == [[7, 8], [], [9]]
    assert [each.index for each in request.live] == [0, 2]
    assert request.sequences[1].finish_status is RequestStatus.FINISHED_STOPPED
    assert not request.awaits_first_token
    assert (request.num_output_tokens, request.tenant, request.arrival_time) == (3, "t", 4.0)


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize(("budget", "expected"), [(512, [9]), (4, [4, 4, 1])])
def test_what_it_has_is_computed_again_and_nothing_sampled(
    lab: type[Lab], budget: int, expected: list[int]
) -> None:
    here = lab(max_num_batched_tokens=budget)
    here.token_at = token_of
    request = resumed({0: output_of(0, 3)})
    here.scheduler.add_request(request)
    steps = here.drain()
    assert [step.counts["a"] for step in steps] == expected + [1] * 4
    assert [row.seeds for step in steps for row in step.output] == (
        [()] * (len(expected) - 1) + [(11,)] * 5
    )
    assert request.output_token_ids == output_of(0, 8)
    assert request.num_recomputed_tokens == 0  # it was computed elsewhere


def test_choices_that_have_ended_stay_as_they_are(lab: type[Lab]) -> None:
    here = lab()
    here.token_at = token_of
    request = resumed({1: output_of(1, 2), 2: output_of(2, 5)}, n=3)
    here.scheduler.add_request(request)
    invariants.check(here.scheduler)
    steps = here.drain()
    assert {row.index for step in steps for row in step.output} == {1, 2}
    assert [each.output_token_ids for each in request.sequences] == [
        [],
        output_of(1, 8),
        output_of(2, 8),
    ]
    positions = [
        position
        for step in steps
        for row in step.output
        for position in range(row.start, row.start + len(row.token_ids))
    ]
    # The first of them computes the prompt; the other computes what no full block holds.
    assert sum(position < 4 for position in positions) == 4


def test_log_probabilities_of_the_prompt_are_not_told_again(lab: type[Lab]) -> None:
    params = SamplingParams(max_tokens=8, seed=11, prompt_logprobs=1)
    here = lab(num_blocks=40)
    here.add("before", prompt=[*PROMPT, 7, 8], max_tokens=1)
    here.step()
    request = resumed({0: [7, 8], 1: [9]}, n=2, sampling_params=params)
    here.scheduler.add_request(request)
    steps = here.drain()
    assert all(row.rated is None for step in steps for row in step.output)
    assert request.num_cached_tokens == 4


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    mode=st.sampled_from(["tail", "swap", "recompute", "auto"]),
    caching=st.booleans(),
    urgent=st.integers(1, 30),
    warm_up=st.integers(0, 6),
)
def test_the_rest_is_as_it_would_have_been(
    lab: type[Lab],
    lengths: list[int],
    mode: str,
    caching: bool,
    urgent: int,
    warm_up: int,
) -> None:
    """Choices with a length of 0 have ended; and blocks are taken from the request meanwhile."""
    outputs = {index: output_of(index, length) for index, length in enumerate(lengths) if length}
    if not outputs:
        return
    here = lab(
        num_blocks=14,
        num_swap_blocks=10,
        preemption_mode=mode,
        enable_prefix_caching=caching,
    )
    here.token_at = token_of
    request = resumed(outputs, n=len(lengths))
    request.priority = 1
    here.scheduler.add_request(request)
    here.steps(warm_up)
    if here.scheduler.has_unfinished_requests:
        here.add("urgent", -1, num_prompt=urgent, max_tokens=2)
    here.drain()
    for index, length in enumerate(lengths):
        assert request.sequences[index].output_token_ids == output_of(index, 8 if length else 0)
