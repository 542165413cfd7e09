"""Requests of several choices: one prompt, one rank, one life; outputs of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from zlib import crc32

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core import invariants
from headway.core.config import PreemptionMode
from headway.core.cost_model import CostModel
from headway.core.errors import InvalidRequest, RequestTooLong, UnknownRequest
from headway.core.request import Request, RequestStatus, SamplingParams
from headway.core.slo import SLO

if TYPE_CHECKING:
    from tests.core.conftest import Lab, Step

Mode = PreemptionMode


def token_of(request_id: str, index: int, position: int) -> int:
    return 100 + crc32(f"{request_id}/{index}/{position}".encode()) % 1000


def undisturbed(request: Request) -> list[list[int]]:
    """What each choice is when nothing happens to the request."""
    positions = range(request.num_prompt_tokens, request.num_prompt_tokens + request.max_tokens)
    return [
        [token_of(request.request_id, index, position) for position in positions]
        for index in range(request.n)
    ]


def outputs(request: Request) -> list[list[int]]:
    return [sequence.output_token_ids for sequence in request.sequences]


def grouped(lab: type[Lab], **settings: Any) -> Lab:
    made = lab(**settings)
    made.token_at = token_of
    return made


def computed_positions(steps: list[Step], request_id: str) -> list[int]:
    """Every position that a row of the request computed, as often as it did."""
    return [
        position
        for step in steps
        for row in step.output
        if row.request_id == request_id
        for position in range(row.start, row.start + len(row.token_ids))
    ]


# ---------------------------------------------------------------------- the prompt


def test_a_prompt_is_computed_once_and_its_blocks_are_shared(lab: type[Lab]) -> None:
    """Eight choices over a thousand tokens."""

    def run(n: int) -> tuple[int, list[Step], Request, Lab]:
        made = grouped(
            lab, max_num_seqs=8, num_blocks=200, block_size=16, enable_prefix_caching=False
        )
        request = made.add("a", num_prompt=1024, max_tokens=20, n=n)
        most, steps = 0, []
        while made.scheduler.has_unfinished_requests:
            steps.append(made.step())
            most = max(most, made.scheduler.statistics().blocks.held)
        return most, steps, request, made

    alone, _, _, _ = run(1)
    together, steps, request, _ = run(8)
    positions = computed_positions(steps, "a")
    assert sum(position < 1024 for position in positions) == 1024
    assert sum(position >= 1024 for position in positions) == 8 * 19
    own = 8 * 2  # two blocks for the tokens that each choice generates
    assert together <= 1.15 * alone + own
    assert outputs(request) == undisturbed(request)
    assert request.num_output_tokens == 160
    assert len(steps) == 2 + 19  # two chunks, then a token of each choice in every step


def test_the_last_row_of_the_prompt_samples_a_first_token_for_each_choice(lab: type[Lab]) -> None:
    trio = grouped(lab, max_num_batched_tokens=8)
    params = SamplingParams(max_tokens=3, seed=40)
    trio.add("a", num_prompt=12, max_tokens=None, n=3, sampling_params=params)
    chunk, last, decode = (trio.step().output for _ in range(3))
    assert [(row.index, row.seeds) for row in chunk] == [(0, ())]
    assert [(row.index, row.seeds) for row in last] == [(0, (40, 41, 42))]
    assert [(row.index, row.seeds) for row in decode] == [(0, (40,)), (1, (41,)), (2, (42,))]
    trio.drain()


def test_choices_may_end_at_different_times(lab: type[Lab]) -> None:
    ends = lab(eos_token_ids=frozenset({7}))
    ends.token_at = lambda request_id, index, position: 7 if position == 5 + 2 * index else 1
    group = ends.add("a", num_prompt=4, max_tokens=9, n=3)
    steps = ends.drain()
    assert outputs(group) == [[1, 7], [1, 1, 1, 7], [1, 1, 1, 1, 1, 7]]
    assert [step.finished for step in steps] == [[]] * 5 + [["a"]]
    assert [len(step.output) for step in steps] == [1, 3, 2, 2, 1, 1]
    assert group.status is RequestStatus.FINISHED_STOPPED


def test_a_choice_may_end_with_its_first_token(lab: type[Lab]) -> None:
    ends = lab(eos_token_ids=frozenset({7}))
    ends.token_at = lambda request_id, index, position: 7 if index == 0 else 1
    group = ends.add("a", num_prompt=6, max_tokens=3, n=2)
    ends.step()
    assert [each.is_finished for each in group.sequences] == [True, False]
    assert group.leader is group.sequences[1]
    ends.drain()
    assert outputs(group) == [[7], [1, 1, 1]]


# ---------------------------------------------------------------------- one rank, one life


def test_a_group_is_admitted_as_one(lab: type[Lab]) -> None:
    """With slots for all its choices, or not at all; and the request below it waits, too."""
    four = grouped(lab, max_num_seqs=4)
    for name in ("x", "y"):
        four.add(name, 0, max_tokens=4)
    four.step()
    group = four.add("group", 0, max_tokens=3, n=3)
    four.add("below", 0, max_tokens=3)
    assert four.step().ids == ["x", "y"]
    assert group.status is RequestStatus.WAITING
    four.drain()
    assert outputs(group) == undisturbed(group)


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.NONE])
def test_an_urgent_group_takes_as_many_slots_as_it_has_choices(lab: type[Lab], mode: Mode) -> None:
    four = grouped(lab, max_num_seqs=4, preemption_mode=mode)
    for name in "wxyz":
        four.add(name, 1, max_tokens=9)
    four.step()
    four.add("group", 0, num_prompt=4, max_tokens=3, n=3)
    steps = four.steps(3)
    assert [list(step.counts.items()) for step in steps] == [
        [("group", 4), ("w", 1), ("x", 1), ("y", 1)],  # one row computes the prompt
        [("group", 3), ("w", 1)],
        [("group", 3), ("w", 1)],
    ]
    four.drain()


def test_a_group_is_paused_and_goes_on_as_one(lab: type[Lab]) -> None:
    four = grouped(lab, max_num_seqs=4)
    group = four.add("group", 1, max_tokens=9, n=3)
    four.steps(2)
    for name in "xy":
        four.add(name, 0, max_tokens=2)
    step = four.step()
    assert step.ids == ["x", "y"]
    assert step.yields == [("group", Mode.PAUSE)]
    assert group.status is RequestStatus.PAUSED
    four.step()
    assert four.step().counts == {"group": 3}
    four.drain()
    assert outputs(group) == undisturbed(group)
    assert group.num_recomputed_tokens == 0


def test_a_group_waits_in_the_heap_once(lab: type[Lab]) -> None:
    four = grouped(lab, enable_prefix_caching=False)
    group = four.add("group", num_prompt=6, max_tokens=4, n=3)
    four.steps(2)
    four.scheduler.preempt("group")
    assert len(four.scheduler.waiting_heap) == 1
    assert group.num_preemptions == 1
    four.drain()
    assert outputs(group) == undisturbed(group)


def test_abort_ends_all_choices(lab: type[Lab]) -> None:
    four = grouped(lab)
    group = four.add("group", n=3)
    four.steps(2)
    assert four.scheduler.abort("group") is group
    assert {each.finish_status for each in group.sequences} == {RequestStatus.FINISHED_ABORTED}
    four.assert_idle()


def test_a_request_ends_with_its_last_choice(lab: type[Lab]) -> None:
    four = grouped(lab)
    group = four.add("group", max_tokens=9, n=3)
    four.steps(2)
    for index in (0, 2):
        four.scheduler.stop_sequence("group", index)
        assert not group.is_finished
        assert group.sequences[index].finish_status is RequestStatus.FINISHED_STOPPED
    assert four.step().counts == {"group": 1}
    with pytest.raises(UnknownRequest, match="'group' has no unfinished choice 0"):
        four.scheduler.stop_sequence("group", 0)
    four.scheduler.stop_sequence("group", 1)
    assert group.status is RequestStatus.FINISHED_STOPPED
    four.assert_idle()


@pytest.mark.parametrize("is_in_flight", [False, True])
def test_the_choice_that_computes_the_prompt_for_all_may_end(
    lab: type[Lab], is_in_flight: bool
) -> None:
    """The others hold no blocks then, so the request waits again."""
    pair = grouped(lab, max_num_batched_tokens=4, enable_prefix_caching=False)
    group = pair.add("group", num_prompt=10, max_tokens=5, n=2)
    pair.steps(4)
    pair.scheduler.preempt("group")
    pair.step()
    assert [bool(each.block_table) for each in group.sequences] == [True, False]
    output = pair.scheduler.schedule() if is_in_flight else None
    pair.scheduler.stop_sequence("group", 0)
    assert group.status is RequestStatus.PREEMPTED
    invariants.check(pair.scheduler)
    if output is not None:
        assert pair.scheduler.update_from_output(output, [()]) == []
        invariants.check(pair.scheduler)
    pair.drain()
    assert outputs(group)[1] == undisturbed(group)[1]


def test_the_choice_that_has_all_swapped_blocks_may_end(lab: type[Lab]) -> None:
    pair = grouped(lab, num_blocks=7, num_swap_blocks=9, preemption_mode="swap")
    group = pair.add("group", 1, num_prompt=6, max_tokens=5, n=2)
    pair.steps(2)
    pair.add("urgent", 0, num_prompt=20, max_tokens=2)
    pair.step()
    assert group.status is RequestStatus.SWAPPED
    for index in (0, 1):
        pair.scheduler.stop_sequence("group", index)
        invariants.check(pair.scheduler)
    pair.drain()


def test_statistics_and_priority_are_of_the_whole_group(lab: type[Lab]) -> None:
    four = grouped(lab)
    group = four.add("group", 3, num_prompt=6, n=3)
    assert four.scheduler.statistics().num_queued_tokens == 6
    assert four.scheduler.statistics().num_waiting == 1
    four.steps(2)
    four.scheduler.set_priority("group", -1)
    assert (group.priority, four.scheduler.statistics().num_running) == (-1, 1)
    four.drain()
    assert four.scheduler.statistics().num_finished == 1


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "settings", [{"max_num_seqs": 3}, {"max_num_seqs": 8, "max_num_batched_tokens": 3}]
)
def test_more_choices_than_a_step_has_room_for_are_refused(
    lab: type[Lab], settings: dict[str, int]
) -> None:
    small = lab(**settings)
    with pytest.raises(InvalidRequest) as caught:
        small.add("a", n=4)
    assert str(caught.value) == "n of request 'a' is 4, a step has room for 3"
    small.assert_idle()
    small.add("a", n=3)
    small.drain()


def test_choices_that_do_not_fit_into_the_pool_together_are_refused(lab: type[Lab]) -> None:
    """The full blocks of the prompt are shared; each choice has its own after that."""
    small = lab(num_blocks=8)
    with pytest.raises(RequestTooLong) as caught:
        small.add("a", num_prompt=24, n=3)
    assert str(caught.value) == (
        "prompt of request 'a' has 24 tokens, the whole KV pool holds 24 tokens for each of "
        "3 choices and one must be left to generate"
    )
    fits = small.add("a", num_prompt=23, max_tokens=99, n=3)
    small.drain()
    assert [each.num_tokens for each in fits.sequences] == [24] * 3


# ---------------------------------------------------------------------- blocks taken and given back


@pytest.mark.parametrize("mode", ["tail", "swap", "recompute", "auto"])
@pytest.mark.parametrize("num_swap_blocks", [0, 20])
def test_a_group_comes_back_with_all_its_tokens(
    lab: type[Lab], mode: str, num_swap_blocks: int
) -> None:
    crowd = grouped(
        lab,
        num_blocks=10,
        num_swap_blocks=num_swap_blocks,
        preemption_mode=mode,
        cost_model=CostModel((1.0, 1.0, 1.0, 0.0), swap_ms_per_block=1e-3),
    )
    group = crowd.add("group", 1, num_prompt=10, max_tokens=6, n=3)
    crowd.steps(4)
    crowd.add("urgent", 0, num_prompt=26, max_tokens=2)
    step = crowd.step()
    assert step.ids[0] == "urgent"
    victims = [each for each in step.output.preemptions if each.num_blocks]
    assert {each.request_id for each in victims} == {"group"}
    assert len(victims) == 1
    if num_swap_blocks and mode in {"swap", "auto"}:
        assert victims[0].mode is Mode.SWAP
    assert group.num_preemptions == 1
    crowd.drain()
    assert outputs(group) == undisturbed(group)


@pytest.mark.parametrize("max_step_ms", [None, 40.0])
def test_what_a_group_has_lost_is_computed_in_chunks(
    lab: type[Lab], max_step_ms: float | None
) -> None:
    """Also beside a more urgent request that decodes, for which it sits out no step."""
    crowd = grouped(
        lab,
        enable_prefix_caching=False,
        max_num_batched_tokens=64,
        num_blocks=200,
        max_step_ms=max_step_ms,
        cost_model=CostModel((1.0, 0.5, 1.0, 0.0)),
    )
    group = crowd.add("group", 1, num_prompt=8, max_tokens=60, n=3)
    crowd.steps(40)
    assert group.num_output_tokens == 3 * 40
    crowd.add("urgent", 0, max_tokens=50)
    crowd.step()
    crowd.scheduler.preempt("group")
    steps = []
    while group.num_output_tokens < 3 * 42:
        steps.append(crowd.step())
    assert all(step.ids == ["urgent", "group"] for step in steps)
    # 8 tokens of the prompt and 41 generated ones of each choice, at most 63 a step.
    assert len(steps) <= 5
    assert len(computed_positions(steps, "group")) <= 8 + 3 * 42
    if max_step_ms is not None:
        assert max(step.output.predicted_ms for step in steps) <= max_step_ms
    crowd.drain()
    assert outputs(group) == undisturbed(group)


def test_time_bounds_what_the_first_of_all_computes_again(lab: type[Lab]) -> None:
    timed = grouped(
        lab,
        enable_prefix_caching=False,
        num_blocks=200,
        max_step_ms=11.0,
        cost_model=CostModel((1.0, 0.5, 1.0, 0.0)),
    )
    group = timed.add("group", 0, num_prompt=8, max_tokens=60, n=2)
    timed.steps(50)
    timed.scheduler.preempt("group")
    steps = timed.drain()
    assert max(step.output.predicted_ms for step in steps) <= 11.0
    assert outputs(group) == undisturbed(group)


def test_a_choice_that_has_lost_its_tail_catches_up_at_once(lab: type[Lab]) -> None:
    """Its sibling waits for it that long."""
    crowd = grouped(lab, num_blocks=18, preemption_mode="tail", enable_prefix_caching=False)
    group = crowd.add("group", 1, num_prompt=4, max_tokens=30, n=2)
    crowd.steps(20)
    crowd.add("urgent", 0, num_prompt=36, max_tokens=1)  # nine blocks; the group holds eleven
    step = crowd.step()
    (victim,) = step.output.preemptions
    assert (victim.request_id, victim.mode, victim.num_tokens) == ("group", Mode.TAIL, 7)
    assert step.finished == ["urgent"]
    assert [each.num_output_tokens for each in group.sequences] == [20, 20]
    step = crowd.step()
    assert [(row.index, len(row.token_ids)) for row in step.output] == [(1, 8)]
    assert [each.num_output_tokens for each in group.sequences] == [20, 21]
    assert [len(row.token_ids) for row in crowd.step().output] == [1, 1]
    crowd.drain()
    assert outputs(group) == undisturbed(group)


@settings(max_examples=60)
@given(
    mode=st.sampled_from(["none", "pause", "tail", "swap", "recompute", "auto"]),
    caching=st.booleans(),
    block_size=st.sampled_from([1, 4]),
    load=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3)),
        min_size=2,
        max_size=6,
    ),
    stopped=st.sets(st.integers(0, 20), max_size=3),
)
def test_outputs_are_those_of_an_undisturbed_group(
    lab: type[Lab],
    mode: str,
    caching: bool,
    block_size: int,
    load: list[tuple[int, int, int, int]],
    stopped: set[int],
) -> None:
    crowd = grouped(
        lab,
        num_blocks=45 if block_size == 1 else 11,
        block_size=block_size,
        num_swap_blocks=12,
        preemption_mode=mode,
        enable_prefix_caching=caching,
    )
    requests, cut_off = [], set()
    for number, (priority, num_prompt, max_tokens, n) in enumerate(load):
        requests.append(
            crowd.add(f"r{number}", priority, max_tokens=max_tokens, n=n, prompt=[5] * num_prompt)
        )
        crowd.steps(2)
        if number in stopped and requests[0].live:
            sequence = requests[0].live[-1]
            crowd.scheduler.stop_sequence("r0", sequence.index)
            cut_off.add(sequence.index)
    crowd.drain()
    for request in requests:
        for sequence, expected in zip(request.sequences, undisturbed(request), strict=False):
            if request is requests[0] and sequence.index in cut_off:
                assert sequence.output_token_ids == expected[: sequence.num_output_tokens]
            else:
                assert sequence.output_token_ids == expected


# ---------------------------------------------------------------------- time


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_group_has_its_turn_when_time_is_short(lab: type[Lab], block_size: int) -> None:
    """Also where it lacks blocks when shares of the time are worked out."""
    timed = grouped(
        lab,
        cost_model=CostModel((1.0, 1.0, 2.0, 0.0)),
        slos=(SLO(0, ttft_ms=200.0, tpot_ms=12.0),),
        max_num_seqs=8,
        max_step_ms=8.0,
        block_size=block_size,
        num_blocks=60,
    )
    groups = [timed.add(name, 0, num_prompt=3, max_tokens=8, n=3) for name in "ab"]
    timed.drain(at_most=80)
    for group in groups:
        assert outputs(group) == undisturbed(group)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_groups_take_turns_whether_or_not_they_lack_blocks(lab: type[Lab], block_size: int) -> None:
    """A step has time for two groups of three; the first of all is always one of them."""
    timed = grouped(
        lab,
        cost_model=CostModel((1.0, 0.1, 1.0, 0.0)),
        max_step_ms=9.0,
        max_num_seqs=12,
        block_size=block_size,
        num_blocks=2000,
    )
    for name in "abcd":
        timed.add(name, 0, num_prompt=16, max_tokens=200, n=3)
    timed.steps(10)
    turns = dict.fromkeys("abcd", 0)
    for step in timed.steps(60):
        for name in step.ids:
            turns[name] += 1
    assert turns["a"] == 60
    assert all(turns[name] >= 18 for name in "bcd")
