"""What is in the blocks: prefixes found, tails cut and swapped, forks copied, tokens recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headway.core import invariants
from headway.core.config import PreemptionMode
from headway.core.cost_model import CostModel
from headway.core.request import Request, RequestStatus, SamplingParams

if TYPE_CHECKING:
    from tests.core.conftest import Lab, Step

Mode = PreemptionMode

#: Swapping is cheaper than recomputing, or dearer.
SWAP_IS_CHEAP = CostModel((1.0, 1.0, 1.0, 0.0), swap_ms_per_block=1e-3)
SWAP_IS_DEAR = CostModel((1.0, 1.0, 1.0, 0.0), swap_ms_per_block=1e3)


# ---------------------------------------------------------------------- prefixes


def test_an_equal_prefix_is_computed_once(lab: type[Lab]) -> None:
    pair = lab()
    first = pair.add("first", prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], max_tokens=9)
    pair.step()
    second = pair.add("second", prompt=[1, 2, 3, 4, 5, 6, 7, 8, 99, 98], max_tokens=9)
    assert pair.step().counts == {"first": 1, "second": 2}
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    pair.drain()


def test_a_prefix_outlives_its_request_until_reused(lab: type[Lab]) -> None:
    small = lab(num_blocks=4)
    prompt = [1, 2, 3, 4, 5, 6]
    small.add("first", prompt=prompt, max_tokens=1)
    small.drain()
    again = small.add("again", prompt=prompt, max_tokens=1)
    assert small.step().counts == {"again": 2}
    assert again.num_cached_tokens == 4
    small.add("big", num_prompt=15, max_tokens=1)  # takes all four blocks
    small.drain()
    third = small.add("third", prompt=prompt, max_tokens=1)
    assert small.step().counts == {"third": 6}
    assert third.num_cached_tokens == 0


def test_something_is_always_left_to_compute(lab: type[Lab]) -> None:
    """One token at least, to sample from."""
    one = lab()
    one.add("a", prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
    one.drain()
    one.add("b", prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
    assert one.step().counts == {"b": 1}


def test_a_prompt_of_whole_blocks_leaves_its_last_block(lab: type[Lab]) -> None:
    one = lab()
    for name, expected in (("a", 8), ("b", 4)):
        one.add(name, prompt=[1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
        assert one.step().counts == {name: expected}


def test_who_wants_its_prompt_rated_computes_it_itself(lab: type[Lab]) -> None:
    one = lab(num_blocks=20)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    one.add("a", prompt=prompt, max_tokens=1)
    one.drain()
    rated = Request("b", 0, prompt, sampling_params=SamplingParams(max_tokens=9, prompt_logprobs=0))
    one.scheduler.add_request(rated)
    assert one.step().counts == {"b": 10}
    assert rated.num_cached_tokens == 0
    # What it has computed once, it need not compute again.
    one.scheduler.preempt("b")
    assert one.step().counts == {"b": 3}
    assert rated.num_computed_tokens == 11
    one.add("c", prompt=prompt, max_tokens=1)
    assert one.step().counts == {"b": 1, "c": 2}
    one.drain()


def test_what_it_has_computed_before_it_was_preempted_is_found_and_no_more(lab: type[Lab]) -> None:
    one = lab(num_blocks=20, max_num_batched_tokens=6)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    one.add("a", prompt=prompt, max_tokens=1)
    one.drain()
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    one.scheduler.add_request(Request("b", 0, prompt, sampling_params=params))
    assert one.step().counts == {"b": 6}
    one.scheduler.preempt("b")
    assert one.step().counts == {"b": 6}  # from the fifth on: the cache has eight
    one.drain()


def test_without_prefix_caching_nothing_is_found(lab: type[Lab]) -> None:
    one = lab(enable_prefix_caching=False)
    for name in "ab":
        request = one.add(name, prompt=[1, 2, 3, 4, 5, 6], max_tokens=1)
        assert one.step().counts == {name: 6}
        assert request.num_cached_tokens == 0


def test_the_next_turn_of_a_conversation_finds_the_answer(lab: type[Lab]) -> None:
    one = lab()
    first = one.add("first", prompt=[1, 2, 3, 4], max_tokens=7)
    one.drain()
    turn = one.add("second", prompt=[*first.token_ids, 50, 51], max_tokens=1)
    assert one.step().counts == {"second": 5}
    assert turn.num_cached_tokens == 8


def test_a_prompt_finds_what_another_is_generating(lab: type[Lab]) -> None:
    """Wherever its own prompt ends: in the middle of the other's answer, or behind it."""
    trio = lab(max_num_seqs=9)
    first = trio.add("first", prompt=[1, 2, 3, 4, 5], max_tokens=20)
    trio.steps(13)  # 17 tokens computed: 4 full blocks, three of them with generated tokens
    within = trio.add("within", prompt=first.token_ids[:14], max_tokens=3)
    behind = trio.add("behind", prompt=[*first.token_ids, 9], max_tokens=3)
    assert trio.step().counts == {"first": 1, "within": 2, "behind": 3}
    assert (within.num_cached_tokens, behind.num_cached_tokens) == (12, 16)
    assert within.block_table[:3] == first.block_table[:3]
    assert behind.block_table[:4] == first.block_table[:4]
    trio.drain()


def test_an_answer_finds_a_prompt_of_the_same_tokens(lab: type[Lab]) -> None:
    """Blocks that a prompt filled continue a request that has generated their tokens."""
    pair = lab()
    pair.add("prompt", prompt=[5, 6, 7, 1, 1, 1, 1, 1, 1], max_tokens=1)
    pair.drain()
    request = pair.add("a", prompt=[5, 6], max_tokens=12)
    pair.step(token=7)
    pair.steps(6)  # it has the prompt's tokens, in blocks of its own
    pair.scheduler.preempt("a")
    assert pair.step().counts == {"a": 1}
    assert request.num_recomputed_tokens == 0
    pair.drain()


# ---------------------------------------------------------------------- recomputing


@pytest.mark.parametrize(("budget", "expected"), [(512, [10]), (4, [4, 4, 2])])
def test_generated_tokens_are_recomputed_like_a_prompt(
    lab: type[Lab], budget: int, expected: list[int]
) -> None:
    alone = lab(enable_prefix_caching=False, max_num_batched_tokens=budget)
    request = alone.add("a", num_prompt=6, max_tokens=6)
    while request.num_output_tokens < 4:
        alone.step()
    alone.scheduler.preempt("a")
    assert [alone.step().counts["a"] for _ in expected] == expected
    assert request.num_output_tokens == 5
    assert request.num_recomputed_tokens == 9
    alone.drain()


def test_a_preempted_request_finds_its_own_blocks(lab: type[Lab]) -> None:
    one = lab()
    request = one.add("a", num_prompt=6, max_tokens=9)
    one.steps(4)  # 9 tokens computed: two full blocks, the second holds generated ones
    one.scheduler.preempt("a")
    assert request.num_computed_tokens == 0
    one.step()
    assert request.num_recomputed_tokens == 1
    one.drain()
    assert request.num_output_tokens == 9


def test_what_was_overwritten_meanwhile_is_recomputed(lab: type[Lab]) -> None:
    crowd, b = crowded(lab, preemption_mode="recompute")
    crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    crowd.drain()
    # Of its two full blocks the later was reused first; the partial third was lost with it.
    assert b.num_recomputed_tokens == 6


# ---------------------------------------------------------------------- swap


def crowded(lab: type[Lab], **settings: Any) -> tuple[Lab, Request]:
    """Two batch requests that hold three blocks of eight each; the last-ranked one is returned.

    An urgent one of four blocks then lacks two. The first never grows.
    """
    crowd = lab(**({"num_blocks": 8} | settings))
    crowd.add("a", 1, num_prompt=10, max_tokens=3)
    b = crowd.add("b", 1, num_prompt=10, max_tokens=5)
    crowd.step()
    return crowd, b


def run_urgent(crowd: Lab) -> list[Step]:
    crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    return crowd.drain()


def test_swap_moves_a_whole_victim_out_and_back(lab: type[Lab]) -> None:
    crowd, b = crowded(lab, preemption_mode="swap", num_swap_blocks=10)
    table = b.block_table
    crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    out = crowd.step()
    assert out.output.preemptions == (("b", Mode.SWAP, "urgent", 3, 10, 1, ""),)
    assert tuple(block for block, _ in out.output.swap_out) == table
    assert out.output.swap_in == ()
    assert out.output.num_swapped_blocks == 3
    assert (b.status, b.num_computed_tokens) == (RequestStatus.SWAPPED, 0)
    assert b.leader.num_swapped_tokens == 10
    assert crowd.scheduler.statistics().num_swap_blocks_used == 3
    crowd.step()
    back = crowd.step()
    assert back.counts == {"b": 1}
    # What the pool's prefix cache still has (its first block) is not copied.
    slots = [slot for _, slot in out.output.swap_out]
    assert back.output.swap_in == tuple(zip(slots[1:], b.block_table[1:], strict=True))
    assert b.leader.swap_table == ()
    crowd.drain()
    assert b.num_recomputed_tokens == 0


def test_without_a_prefix_cache_all_of_it_is_copied_back(lab: type[Lab]) -> None:
    crowd, b = crowded(lab, preemption_mode="swap", num_swap_blocks=3, enable_prefix_caching=False)
    steps = run_urgent(crowd)
    moved = [(len(step.output.swap_out), len(step.output.swap_in)) for step in steps]
    assert [one for one in moved if one != (0, 0)] == [(3, 0), (0, 3)]
    assert b.num_recomputed_tokens == 0


@pytest.mark.parametrize("num_swap_blocks", [0, 2])
def test_a_full_swap_space_falls_back_to_recomputing(lab: type[Lab], num_swap_blocks: int) -> None:
    crowd, b = crowded(lab, preemption_mode="swap", num_swap_blocks=num_swap_blocks)
    steps = run_urgent(crowd)
    assert ("b", Mode.RECOMPUTE) in steps[0].yields
    assert not any(step.output.num_swapped_blocks for step in steps)
    assert b.num_recomputed_tokens > 0


def test_auto_swaps_just_the_tail_if_that_is_cheaper(lab: type[Lab]) -> None:
    crowd, b = crowded(lab, cost_model=SWAP_IS_CHEAP, num_swap_blocks=10)
    table = b.block_table
    crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    step = crowd.step()
    assert step.output.preemptions[0] == ("b", Mode.SWAP, "urgent", 2, 6, 1, "")
    assert tuple(block for block, _ in step.output.swap_out) == table[1:]
    assert b.status is RequestStatus.PAUSED  # its first block stays in the pool
    assert b.block_table == table[:1]
    steps = crowd.drain()
    assert sum(len(one.output.swap_in) for one in steps) == 2
    assert b.num_recomputed_tokens == 0


def test_auto_recomputes_the_tail_if_that_is_cheaper(lab: type[Lab]) -> None:
    crowd, b = crowded(lab, cost_model=SWAP_IS_DEAR, num_swap_blocks=10)
    steps = run_urgent(crowd)
    assert steps[0].output.preemptions[0] == ("b", Mode.TAIL, "urgent", 2, 6, 1, "")
    assert not any(step.output.num_swapped_blocks for step in steps)
    assert b.num_recomputed_tokens == 6


def test_a_tail_swapped_twice_comes_back_in_order(lab: type[Lab]) -> None:
    """The slots of the second cut go before those of the first."""
    deep = lab(SWAP_IS_CHEAP, num_blocks=8, num_swap_blocks=10, enable_prefix_caching=False)
    victim = deep.add("victim", 1, num_prompt=22, max_tokens=9)
    deep.step()
    table = victim.block_table
    first = deep.add("first", 0, num_prompt=10, max_tokens=9)  # lacks 1
    out_1 = deep.step().output.swap_out
    assert tuple(block for block, _ in out_1) == table[5:]
    deep.add("second", 0, num_prompt=6, max_tokens=9)  # lacks 2
    out_2 = deep.step().output.swap_out
    assert tuple(block for block, _ in out_2) == table[3:5]
    assert victim.leader.swap_table == tuple(slot for _, slot in (*out_2, *out_1))
    deep.scheduler.abort("first")
    deep.scheduler.abort("second")
    assert first.is_finished
    back = deep.step().output.swap_in
    assert [slot for slot, _ in back] == [slot for _, slot in (*out_2, *out_1)]
    assert tuple(block for _, block in back) == victim.block_table[3:]
    deep.drain()
    assert victim.num_recomputed_tokens == 0


@pytest.mark.parametrize("call", ["abort", "preempt"])
def test_leaving_gives_the_swap_space_back(lab: type[Lab], call: str) -> None:
    crowd, b = crowded(lab, cost_model=SWAP_IS_CHEAP, num_swap_blocks=2)
    crowd.add("urgent", 0, num_prompt=14, max_tokens=2)
    crowd.step()
    assert crowd.scheduler.statistics().num_swap_blocks_used == 2
    getattr(crowd.scheduler, call)("b")
    invariants.check(crowd.scheduler)
    assert crowd.scheduler.statistics().num_swap_blocks_used == 0
    crowd.drain()
    assert b.is_finished


def test_a_slot_read_in_a_step_is_not_written_in_it(lab: type[Lab]) -> None:
    """The executor copies out before it copies in."""
    tight = lab(
        max_num_seqs=2,
        preemption_mode="swap",
        num_blocks=8,
        num_swap_blocks=3,
        enable_prefix_caching=False,
    )
    tight.add("back", 5, num_prompt=10, max_tokens=9)
    tight.step()
    tight.add("urgent", 0, num_prompt=22, max_tokens=1)
    assert len(tight.step().output.swap_out) == 3
    tight.add("grows", 2, num_prompt=6, max_tokens=9)
    tight.add("yields", 3, num_prompt=10, max_tokens=9)
    assert [step.ids for step in tight.steps(3)] == [["grows", "yields"]] * 3
    tight.scheduler.set_priority("back", 1)
    step = tight.step()  # "back" fills the pool, then "grows" needs a block of "yields"
    assert step.ids == ["back", "grows"]
    assert len(step.output.swap_in) == 3
    assert step.output.swap_out == ()  # its slots are free from the next step on
    assert ("yields", Mode.RECOMPUTE) in step.yields
    tight.drain()


def test_blocks_that_are_swapped_in_are_found_after_the_step_that_copies_them(
    lab: type[Lab],
) -> None:
    """Until then nothing says that the step will succeed."""
    trio = lab(preemption_mode="swap", num_blocks=9, num_swap_blocks=9)
    prompt = list(range(1, 11))
    trio.add("swapped", 1, prompt=prompt, max_tokens=6)
    trio.step()
    trio.add("urgent", 0, num_prompt=32, max_tokens=2)
    assert len(trio.step().output.swap_out) == 3
    assert trio.step().finished == ["urgent"]
    trio.scheduler.block_manager.reset_prefix_cache()
    same_step = trio.add("same step", 2, prompt=prompt, max_tokens=2)
    step = trio.step()
    assert len(step.output.swap_in) == 3
    assert step.counts == {"swapped": 1, "same step": 10}
    assert same_step.num_cached_tokens == 0
    trio.scheduler.abort("same step")
    next_step = trio.add("next step", 2, prompt=prompt, max_tokens=2)
    trio.step()
    assert next_step.num_cached_tokens == 8
    assert next_step.block_table[:2] == trio.scheduler.requests["swapped"].block_table[:2]
    trio.drain()


@settings(max_examples=50)
@given(
    mode=st.sampled_from(["tail", "swap", "recompute", "auto"]),
    cost_model=st.sampled_from([SWAP_IS_CHEAP, SWAP_IS_DEAR]),
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=4),
    urgent=st.integers(1, 23),
)
def test_a_victim_comes_back_with_all_its_tokens(
    lab: type[Lab],
    mode: str,
    cost_model: CostModel,
    lengths: list[tuple[int, int]],
    urgent: int,
) -> None:
    crowd = lab(cost_model, num_blocks=6, num_swap_blocks=5, preemption_mode=mode)
    requests = [crowd.add(f"r{i}", 1, *length) for i, length in enumerate(lengths)]
    crowd.steps(2)
    crowd.add("urgent", 0, num_prompt=urgent, max_tokens=1)
    crowd.drain()
    for request, (num_prompt, max_tokens) in zip(requests, lengths, strict=True):
        assert request.num_output_tokens == min(max_tokens, 24 - num_prompt)


# ---------------------------------------------------------------------- forks


def forked(lab: type[Lab], num_prompt: int = 6, **settings: Any) -> tuple[Lab, Request]:
    """A request of two choices whose prompt has just been computed."""
    twins = lab(**settings)
    request = twins.add("twins", num_prompt=num_prompt, max_tokens=5, n=2)
    assert twins.step().counts == {"twins": num_prompt}
    return twins, request


def test_a_fork_computes_nothing_twice(lab: type[Lab]) -> None:
    twins, request = forked(lab)
    first, second = request.sequences
    assert (first.num_computed_tokens, second.num_computed_tokens) == (6, 6)
    assert second.block_table == first.block_table
    source = first.block_table[1]
    step = twins.step()
    assert [(row.index, len(row.token_ids)) for row in step.output] == [(0, 1), (1, 1)]
    # The first of the two copies the partial block, then the second has it to itself.
    assert step.output.block_copies == ((source, first.block_table[1]),)
    assert second.block_table[1] == source
    assert second.block_table[0] == first.block_table[0]
    assert all(not step.output.block_copies for step in twins.drain())
    assert first.num_output_tokens == second.num_output_tokens == 5
    assert request.num_recomputed_tokens == 0


def test_a_fork_at_a_block_boundary_copies_nothing(lab: type[Lab]) -> None:
    twins, request = forked(lab, num_prompt=8)
    steps = twins.drain()
    assert not any(step.output.block_copies for step in steps)
    assert [sequence.num_output_tokens for sequence in request.sequences] == [5, 5]


@pytest.mark.parametrize("mode", ["tail", "swap", "recompute", "auto"])
def test_a_block_is_taken_for_the_copy(lab: type[Lab], mode: str) -> None:
    """No block is free for the copy, so the request that ranks below gives one up."""
    full = lab(num_blocks=6, num_swap_blocks=4, preemption_mode=mode)
    low = full.add("low", 1, num_prompt=12, max_tokens=4)
    full.step()
    twins = full.add("twins", 0, num_prompt=6, max_tokens=2, n=2)
    step = full.step()  # two blocks for the prompt, one is kept for the copy
    assert step.ids[0] == "twins"
    assert full.scheduler.block_manager.num_available <= 1
    step = full.step()
    assert len(step.output.block_copies) == 1
    full.drain()
    assert twins.num_preemptions == twins.num_recomputed_tokens == 0
    assert [sequence.num_output_tokens for sequence in twins.sequences] == [2, 2]
    assert low.num_output_tokens == 4


@pytest.mark.parametrize("index", [0, 1])
def test_a_choice_outlives_its_sibling_without_a_copy(lab: type[Lab], index: int) -> None:
    twins, request = forked(lab)
    twins.scheduler.stop_sequence("twins", index)
    invariants.check(twins.scheduler)
    steps = twins.drain()
    assert not any(step.output.block_copies for step in steps)
    assert request.sequences[1 - index].num_output_tokens == 5
    assert request.sequences[index].num_output_tokens == 1
    assert request.num_recomputed_tokens == 0


@pytest.mark.parametrize("mode", ["tail", "auto"])
def test_a_request_that_shares_all_its_blocks_has_nothing_to_give(
    lab: type[Lab], mode: str
) -> None:
    """Taking its share of blocks that a more urgent request keeps would gain nothing."""
    trio = lab(num_blocks=10, preemption_mode=mode, max_num_seqs=5)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    keeps = trio.add("keeps", 0, prompt=[*prompt, 9], max_tokens=9)
    trio.step()
    other = trio.add("other", 2, num_prompt=10, max_tokens=4)
    shares = trio.add("shares", 3, prompt=[*prompt, 8], max_tokens=3)
    trio.step()
    assert trio.scheduler.block_manager.num_available == 3
    trio.add("urgent", 0, num_prompt=14, max_tokens=9)  # takes the last block of "shares"
    step = trio.step()
    assert [(each.request_id, each.num_blocks) for each in step.output.preemptions] == [
        ("shares", 1)
    ]
    assert shares.block_table == keeps.block_table[:2]
    trio.add("more", 0, num_prompt=3, max_tokens=2)
    step = trio.step()
    assert [each.request_id for each in step.output.preemptions if each.num_blocks] == ["other"]
    assert (keeps.num_preemptions, other.num_preemptions, shares.num_preemptions) == (0, 1, 1)
    trio.drain()
