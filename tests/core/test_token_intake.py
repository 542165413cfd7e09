"""What a computed step changes, and what an executor must not say of it."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from headway.core import invariants
from headway.core.errors import InternalError, InvalidRequest
from headway.core.policy import Key
from headway.core.request import Request, RequestStatus, SamplingParams

if TYPE_CHECKING:
    from tests.core.conftest import Lab

# ---------------------------------------------------------------------- which step


def test_a_step_is_given_back_once(lab: type[Lab]) -> None:
    pair = lab()
    pair.add("a")
    first = pair.scheduler.schedule()
    pair.scheduler.update_from_output(first, [(5,)])
    with pytest.raises(InvalidRequest) as caught:
        pair.scheduler.update_from_output(first, [(5,)])
    assert str(caught.value) == (
        "step 1 has been given back, the latest is 1: it can be given back once"
    )
    assert pair.scheduler.requests["a"].output_token_ids == [5]
    pair.drain()


def test_an_older_step_is_refused(lab: type[Lab]) -> None:
    pair = lab()
    request = pair.add("a")
    older = pair.scheduler.schedule()
    latest = pair.scheduler.schedule()
    with pytest.raises(InvalidRequest, match=r"^step 1 .* the latest is 2: .*") as caught:
        pair.scheduler.update_from_output(older, [(5,)])
    assert "\n" not in str(caught.value)
    assert request.output_token_ids == []
    pair.scheduler.update_from_output(latest, [(5,)])
    assert request.output_token_ids == [5]
    invariants.check(pair.scheduler)


def test_a_step_of_another_scheduler_is_refused(lab: type[Lab]) -> None:
    here, there = lab(), lab()
    here.add("a")
    there.add("a")
    here.step()
    there.step()
    with pytest.raises(InvalidRequest, match="step 2 is unknown, the latest is 1"):
        here.scheduler.update_from_output(there.scheduler.schedule(), [(5,)])


# ---------------------------------------------------------------------- what left meanwhile


def test_a_request_that_was_stopped_beside_the_step_is_finished_once(lab: type[Lab]) -> None:
    pair = lab()
    group = pair.add("group", max_tokens=2, n=3)
    pair.step()
    output = pair.scheduler.schedule()
    pair.scheduler.stop_sequence("group", 2)
    finished = pair.scheduler.update_from_output(output, [(5,), (6,), (7,)])
    assert finished == [group]
    assert [each.output_token_ids for each in group.sequences] == [[1, 5], [1, 6], [1]]
    pair.assert_idle()


def test_a_group_aborted_while_the_step_ran_is_not_finished_by_it(lab: type[Lab]) -> None:
    pair = lab()
    pair.add("group", n=3)
    pair.step()
    output = pair.scheduler.schedule()
    pair.scheduler.abort("group")
    assert pair.scheduler.update_from_output(output, [(5,), (6,), (7,)]) == []
    pair.assert_idle()


def test_a_new_request_of_the_same_id_gets_nothing_of_the_step(lab: type[Lab]) -> None:
    pair = lab()
    pair.add("a")
    pair.step()
    output = pair.scheduler.schedule()
    pair.scheduler.abort("a")
    again = pair.add("a")
    assert pair.scheduler.update_from_output(output, [(5,)]) == []
    assert again.output_token_ids == []
    assert again.status is RequestStatus.WAITING
    pair.drain()


# ---------------------------------------------------------------------- what an executor may say


@pytest.mark.parametrize(
    ("drafts", "sampled"),
    [
        ((), (5, 6)),
        ((5,), (6, 7)),
        ((5, 6), (5, 7, 8)),
        ((5, 6), (5, 6, 7, 8)),
    ],
    ids=["without drafts", "another draft", "the second differs", "more than there are"],
)
def test_tokens_that_are_no_accepted_drafts_are_refused(
    lab: type[Lab], drafts: tuple[int, ...], sampled: tuple[int, ...]
) -> None:
    lone = lab()
    lone.add("a", max_tokens=20)
    lone.steps(2)
    lone.scheduler.propose("a", 0, drafts)
    output = lone.scheduler.schedule()
    assert output[0].drafts == drafts
    with pytest.raises(InternalError, match=r"request 'a' was given the tokens .* must be drafts"):
        lone.scheduler.update_from_output(output, [sampled])


def test_drafts_that_were_not_in_the_row_cannot_be_accepted(lab: type[Lab]) -> None:
    """The step had room for one of them: the keys and values of the other were not computed."""
    lone = lab(max_num_batched_tokens=2)
    lone.add("a", num_prompt=2, max_tokens=20)
    lone.step()
    lone.scheduler.propose("a", 0, (5, 6))
    output = lone.scheduler.schedule()
    assert output[0].drafts == (5,)
    with pytest.raises(InternalError, match=r"was given the tokens \(5, 6, 7\) for the drafts"):
        lone.scheduler.update_from_output(output, [(5, 6, 7)])


@pytest.mark.parametrize("sampled", [(5,), (5, 6), (5, 6, 7, 8)])
def test_a_group_has_one_first_token_for_each_choice(
    lab: type[Lab], sampled: tuple[int, ...]
) -> None:
    trio = lab()
    trio.add("group", n=3)
    output = trio.scheduler.schedule()
    assert len(output[0].seeds) == 3
    with pytest.raises(InternalError, match="must be one for each of 3 choices"):
        trio.scheduler.update_from_output(output, [sampled])


# ---------------------------------------------------------------------- policies that count


class Fair:
    """First come, first served; counts what each request has been served."""

    name = "fair"

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()

    def key(self, request: Request) -> Key:
        return (request.arrival_time,)

    def threshold(self, request: Request) -> Key:
        return (math.inf,)

    def serve(self, request: Request, num_tokens: int) -> None:
        self.served[request.request_id] += num_tokens


def test_a_policy_is_told_what_each_request_has_been_served(lab: type[Lab]) -> None:
    policy = Fair()
    shared = lab(policy=policy, max_num_batched_tokens=12, enable_prefix_caching=False)
    shared.add("long", num_prompt=20, max_tokens=5)
    shared.add("group", num_prompt=6, max_tokens=4, n=2)
    expected: Counter[str] = Counter()
    while shared.scheduler.has_unfinished_requests:
        step = shared.step()
        expected.update(step.counts)
        assert policy.served == expected
    assert policy.served == {"long": 20 + 4, "group": 6 + 2 * 3}


def test_drafts_and_recomputed_tokens_are_service_too(lab: type[Lab]) -> None:
    policy = Fair()
    lone = lab(policy=policy, enable_prefix_caching=False)
    lone.add("a", num_prompt=6, max_tokens=9)
    lone.step()
    lone.scheduler.propose("a", 0, (5, 5))
    lone.step()
    assert policy.served == {"a": 6 + 3}
    lone.scheduler.preempt("a")
    lone.step()
    assert policy.served == {"a": 6 + 3 + 8}


# ---------------------------------------------------------------------- ends


def test_a_stop_token_counts_from_the_least_number_of_tokens_on(lab: type[Lab]) -> None:
    ends = lab(eos_token_ids=frozenset({7}))
    params = SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=frozenset({8}))
    request = ends.add("a", max_tokens=None, sampling_params=params)
    banned = []
    for token in (8, 7, 8):
        banned.append(ends.step(token).output[0].banned)
    assert banned == [frozenset({7, 8})] * 3
    assert request.output_token_ids == [8, 7, 8]
    assert request.status is RequestStatus.FINISHED_STOPPED
    ends.assert_idle()
