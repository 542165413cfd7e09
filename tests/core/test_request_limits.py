"""How long a request may get: refused when it could never be served, capped where it must end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core.config import SchedulerConfig
from headway.core.errors import InvalidRequest, RequestTooLong
from headway.core.request import Request
from headway.core.request_limits import check_fits, token_limit

if TYPE_CHECKING:
    from tests.core.conftest import Lab


def test_the_limit_is_the_least_of_what_is_asked_the_context_and_the_pool() -> None:
    request = Request("a", 0, [1] * 10, 20)
    assert token_limit(request, SchedulerConfig()) == 30
    assert token_limit(request, SchedulerConfig(max_model_len=25)) == 25
    assert token_limit(request, SchedulerConfig(num_blocks=1, block_size=16)) == 16
    pair = Request("a", 0, [1] * 10, 20, n=2)
    config = SchedulerConfig(num_blocks=7, block_size=4)
    assert token_limit(pair, config) == (2 + 2) * 4  # two shared blocks, two of each choice's own


def test_a_refusal_names_value_and_limit() -> None:
    config = SchedulerConfig(num_blocks=4, block_size=4, max_num_seqs=2)
    with pytest.raises(RequestTooLong) as caught:
        check_fits(Request("a", 0, [1] * 16), config)
    assert str(caught.value) == (
        "prompt of request 'a' has 16 tokens, the whole KV pool holds 16 tokens and one must be "
        "left to generate"
    )
    with pytest.raises(InvalidRequest, match=r"^n of request 'a' is 3, a step has room for 2$"):
        check_fits(Request("a", 0, [1], n=3), config)


@settings(max_examples=60)
@given(
    num_blocks=st.integers(1, 10),
    block_size=st.sampled_from([1, 4]),
    num_prompt=st.integers(1, 24),
    max_tokens=st.integers(1, 24),
    n=st.integers(1, 4),
    mode=st.sampled_from(["none", "pause", "tail", "swap", "recompute", "auto"]),
)
def test_what_is_accepted_can_be_served_alone_to_its_limit(
    lab: type[Lab],
    num_blocks: int,
    block_size: int,
    num_prompt: int,
    max_tokens: int,
    n: int,
    mode: str,
) -> None:
    small = lab(num_blocks=num_blocks, block_size=block_size, preemption_mode=mode)
    request = Request("a", 0, list(range(num_prompt)), max_tokens, n=n)
    limit = token_limit(request, small.scheduler.config)
    try:
        small.scheduler.add_request(request)
    except RequestTooLong:
        assert num_prompt >= limit
        return
    small.drain()
    assert [each.num_tokens for each in request.sequences] == [limit] * n
    assert request.num_preemptions == request.num_recomputed_tokens == 0
