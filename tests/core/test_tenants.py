"""Whose blocks a request finds: those of its own tenant, or of its tenant's group, and salt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core.errors import InvalidRequest
from headway.core.request import MAX_CACHE_SALT, Request

if TYPE_CHECKING:
    from tests.core.conftest import Lab

PROMPT = list(range(1, 11))


def num_cached(lab: type[Lab], first: dict[str, Any], second: dict[str, Any]) -> int:
    """How many tokens of an equal prompt the second request finds."""
    pair = lab()
    pair.add("first", prompt=PROMPT, **first)
    pair.step()
    found = pair.add("second", prompt=PROMPT, **second)
    step = pair.step()
    assert step.counts["second"] == len(PROMPT) - found.num_cached_tokens
    pair.drain()
    return found.num_cached_tokens


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"tenant": "a"}, {"tenant": "a"}),
        ({"cache_salt": "s"}, {"cache_salt": "s"}),
        ({"tenant": "a", "cache_salt": "s"}, {"tenant": "a", "cache_salt": "s"}),
        ({"tenant": "a", "cache_group": "g"}, {"tenant": "b", "cache_group": "g"}),
        ({"tenant": "a", "cache_group": ""}, {"tenant": "b", "cache_group": ""}),
    ],
)
def test_what_may_be_shared_is_found(
    lab: type[Lab], first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert num_cached(lab, first, second) == 8


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"tenant": "a"}, {"tenant": "b"}),
        ({"tenant": "a"}, {}),
        ({"cache_salt": "s"}, {}),
        ({"cache_salt": "s"}, {"cache_salt": "t"}),
        ({"tenant": "a", "cache_salt": "s"}, {"tenant": "a"}),
        ({"tenant": "a", "cache_group": "g"}, {"tenant": "a", "cache_group": "h"}),
        ({"tenant": "a", "cache_group": "g"}, {"tenant": "a"}),
        ({"tenant": "a", "cache_group": "g", "cache_salt": "s"}, {"cache_group": "g"}),
        # Where one name ends and the next begins makes a difference.
        ({"tenant": "ab", "cache_salt": "c"}, {"tenant": "a", "cache_salt": "bc"}),
        # A tenant that is called as a group is does not belong to it.
        ({"tenant": "g"}, {"tenant": "b", "cache_group": "g"}),
    ],
)
def test_what_may_not_be_shared_is_not_found(
    lab: type[Lab], first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert num_cached(lab, first, second) == 0
    assert num_cached(lab, second, first) == 0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "a", "b"]),
            st.sampled_from(["", "s"]),
            st.sampled_from([None, "g"]),
            st.integers(1, 12),
        ),
        min_size=2,
        max_size=8,
    ),
)
def test_no_block_is_ever_held_by_requests_that_may_not_share(
    lab: type[Lab], load: list[tuple[str, str, str | None, int]]
) -> None:
    """Preempted and admitted again, too."""
    crowd = lab(num_blocks=9, max_num_seqs=8)
    owners: dict[str, tuple[str, str, bool]] = {}
    for i, (tenant, salt, group, length) in enumerate(load):
        owners[f"r{i}"] = (tenant if group is None else group, salt, group is None)
        crowd.add(
            f"r{i}",
            i % 3,
            prompt=PROMPT[:length],
            tenant=tenant,
            cache_salt=salt,
            cache_group=group,
        )
        crowd.step()
        if i == 3 and crowd.scheduler.resident:
            crowd.scheduler.preempt(crowd.scheduler.resident[-1].request_id)
        holders: dict[int, set[tuple[str, str, bool]]] = {}
        for request in crowd.scheduler.resident:
            for block in request.block_table:
                holders.setdefault(block, set()).add(owners[request.request_id])
        assert all(len(each) == 1 for each in holders.values())
    crowd.drain()


def test_the_tenant_is_named_when_a_request_yields(lab: type[Lab]) -> None:
    small = lab(max_num_seqs=1)
    small.add("batch", 1, tenant="acme")
    small.step()
    small.add("urgent", 0, tenant="other")
    (preemption,) = small.step().output.preemptions
    assert (preemption.request_id, preemption.tenant, preemption.priority) == ("batch", "acme", 1)


def test_a_salt_may_be_256_characters_long() -> None:
    assert MAX_CACHE_SALT == 256
    Request("a", 0, [1], cache_salt="x" * 256)
    with pytest.raises(InvalidRequest, match="has 257 characters, may have at most 256"):
        Request("a", 0, [1], cache_salt="x" * 257)
