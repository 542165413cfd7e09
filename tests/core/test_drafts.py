"""Proposed tokens: a sequence is the same with drafts and without, only sooner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core.errors import InvalidRequest, UnknownRequest
from headway.core.request import RequestStatus, SamplingParams

if TYPE_CHECKING:
    from tests.core.conftest import Lab


def counting(request_id: str, index: int, position: int) -> int:
    """The token at each position is ten more than the position."""
    return 10 + position


def drafting(lab: type[Lab], **settings: Any) -> Lab:
    """A request "a" of four prompt tokens and one generated token, 14; the next ones are 15 …"""
    lone = lab(**({"num_blocks": 40} | settings))
    lone.token_at = counting
    lone.add("a", num_prompt=4, max_tokens=12)
    lone.step()
    return lone


@pytest.mark.parametrize(
    ("drafts", "accepted"),
    [
        ((15, 16, 17), (15, 16, 17, 18)),
        ((15, 16, 99), (15, 16, 17)),
        ((15, 99, 17), (15, 16)),
        ((99, 16, 17), (15,)),
        ((), (15,)),
    ],
    ids=["all", "two of three", "one of three", "none of three", "no drafts"],
)
def test_the_right_drafts_are_accepted_up_to_the_first_wrong_one(
    lab: type[Lab], drafts: tuple[int, ...], accepted: tuple[int, ...]
) -> None:
    lone = drafting(lab)
    request = lone.scheduler.requests["a"]
    lone.scheduler.propose("a", 0, drafts)
    step = lone.step()
    assert step.output[0].drafts == drafts
    assert step.counts == {"a": 1 + len(drafts)}
    assert tuple(request.output_token_ids[1:]) == accepted
    assert request.num_computed_tokens == request.num_tokens - 1
    following = lone.step().output[0]
    assert (following.drafts, following.token_ids) == ((), accepted[-1:])
    assert following.start == 4 + len(accepted)
    lone.drain()
    assert request.output_token_ids == list(range(14, 26))


def test_new_drafts_replace_the_old_ones(lab: type[Lab]) -> None:
    lone = drafting(lab)
    lone.scheduler.propose("a", 0, (99, 99))
    lone.scheduler.propose("a", 0, [15])
    assert lone.step().output[0].drafts == (15,)


def test_drafts_stop_short_of_the_longest_output(lab: type[Lab]) -> None:
    """The last token that may be generated is sampled behind the drafts."""
    lone = drafting(lab)
    request = lone.scheduler.requests["a"]
    lone.scheduler.propose("a", 0, list(range(15, 60)))
    step = lone.step()
    assert step.output[0].drafts == tuple(range(15, 25))
    assert step.finished == ["a"]
    assert request.output_token_ids == list(range(14, 26))
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    lone.assert_idle()


def test_a_stop_token_among_accepted_drafts_ends_the_output(lab: type[Lab]) -> None:
    lone = lab(eos_token_ids=frozenset({17}))
    lone.token_at = counting
    request = lone.add("a", num_prompt=4, max_tokens=12)
    lone.step()
    lone.scheduler.propose("a", 0, (15, 16, 17, 18))
    assert lone.step().finished == ["a"]
    assert request.output_token_ids == [14, 15, 16, 17]
    assert request.status is RequestStatus.FINISHED_STOPPED
    lone.assert_idle()


def test_a_stop_token_among_the_first_tokens_does_not(lab: type[Lab]) -> None:
    """As without drafts, where it could not be sampled before ``min_tokens``."""
    lone = lab(eos_token_ids=frozenset({16, 19}))
    lone.token_at = counting
    params = SamplingParams(max_tokens=12, min_tokens=5)
    request = lone.add("a", num_prompt=4, max_tokens=None, sampling_params=params)
    lone.step()
    lone.scheduler.propose("a", 0, (15, 16, 17))
    assert lone.step().output[0].banned == frozenset({16, 19})
    assert request.output_token_ids == [14, 15, 16, 17, 18]
    lone.scheduler.propose("a", 0, (19, 20))
    assert lone.step().finished == ["a"]
    assert request.output_token_ids == [14, 15, 16, 17, 18, 19]


def test_drafts_take_no_more_tokens_than_the_step_has(lab: type[Lab]) -> None:
    lone = drafting(lab, max_num_batched_tokens=4)
    lone.scheduler.propose("a", 0, (15, 16, 17, 18, 19))
    assert lone.step().output[0].drafts == (15, 16, 17)


def test_wrong_drafts_are_not_found_by_others(lab: type[Lab]) -> None:
    """A block is findable once it is full of tokens that the sequence has."""
    lone = drafting(lab)
    prompt = lone.scheduler.requests["a"].prompt_token_ids
    lone.scheduler.propose("a", 0, (15, 98, 97))
    lone.step()
    wrong = lone.add("wrong", prompt=[*prompt, 14, 15, 98, 97, 1], max_tokens=1)
    lone.step()
    assert wrong.num_cached_tokens == 4
    lone.step()
    right = lone.add("right", prompt=[*prompt, 14, 15, 16, 17, 1], max_tokens=1)
    lone.step()
    assert right.num_cached_tokens == 8
    lone.drain()


def test_choices_of_a_group_have_drafts_of_their_own(lab: type[Lab]) -> None:
    """They go on together: with as many tokens as the choice with the fewest."""
    pair = lab()
    pair.token_at = lambda request_id, index, position: 100 * index + position
    group = pair.add("group", num_prompt=4, max_tokens=9, n=2)
    pair.scheduler.propose("group", 0, (5, 6))  # the choices have no first tokens yet
    assert pair.step().output[0].drafts == ()
    pair.scheduler.propose("group", 0, (5, 6))
    pair.scheduler.propose("group", 1, (105, 9, 9))
    assert [row.drafts for row in pair.step().output] == [(5, 6), (105, 9)]
    assert [each.output_token_ids for each in group.sequences] == [[4, 5, 6, 7], [104, 105, 106]]
    pair.scheduler.propose("group", 1, (107,))
    assert [row.drafts for row in pair.step().output] == [(), ()]
    pair.drain()
    assert group.sequences[1].output_token_ids == list(range(104, 113))


def test_drafts_for_what_cannot_have_them(lab: type[Lab]) -> None:
    pair = lab()
    pair.add("group", n=2)
    pair.steps(2)
    propose = pair.scheduler.propose
    with pytest.raises(UnknownRequest, match="no unfinished request has the id 'x'"):
        propose("x", 0, (5,))
    for index in (2, -1):
        with pytest.raises(UnknownRequest, match=f"'group' has no unfinished choice {index}"):
            propose("group", index, (5,))
    pair.scheduler.stop_sequence("group", 0)
    with pytest.raises(UnknownRequest, match="'group' has no unfinished choice 0"):
        propose("group", 0, (5,))
    pair.drain()


def test_drafts_that_come_while_the_step_is_computed_are_refused(lab: type[Lab]) -> None:
    """They could not continue a token that is not known; and the step's own would be lost."""
    lone = drafting(lab)
    lone.scheduler.propose("a", 0, (15, 16))
    output = lone.scheduler.schedule()
    with pytest.raises(InvalidRequest, match="'a' come while step 2 is being computed"):
        lone.scheduler.propose("a", 0, (99,))
    lone.scheduler.update_from_output(output, [(15, 16, 17)])
    assert lone.scheduler.requests["a"].output_token_ids == [14, 15, 16, 17]


@settings(max_examples=40)
@given(
    mode=st.sampled_from(["none", "pause", "tail", "swap", "recompute", "auto"]),
    right=st.lists(st.lists(st.booleans(), max_size=4), min_size=40, max_size=40),
    urgent=st.integers(1, 20),
)
def test_the_output_is_the_same_whatever_is_proposed(
    lab: type[Lab], mode: str, right: list[list[bool]], urgent: int
) -> None:
    crowd = lab(num_blocks=8, num_swap_blocks=6, preemption_mode=mode)
    crowd.token_at = counting
    requests = [crowd.add(name, 1, num_prompt=6, max_tokens=14) for name in "ab"]
    for number, guesses in enumerate(right):
        if number == 3:
            crowd.add("urgent", 0, num_prompt=urgent, max_tokens=3)
        for request in requests:
            if not request.is_finished:
                drafts = [
                    10 + request.num_tokens + place if is_right else 999
                    for place, is_right in enumerate(guesses)
                ]
                crowd.scheduler.propose(request.request_id, 0, drafts)
        if crowd.scheduler.has_unfinished_requests:
            crowd.step()
    crowd.drain()
    assert [request.output_token_ids for request in requests] == [list(range(16, 30))] * 2
