"""The simulated executor: exact time, reproducible tokens, and a pool that cannot be fooled."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Sequence
from typing import Any

import pytest
from growing_sequence import GrowingSequence
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core import invariants
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import SMALL_CPU_COSTS, StepFeatures
from headway.core.errors import ConfigError, InternalError
from headway.core.request import Request
from headway.core.sampling_params import SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.executor.base import Executor, accept_drafts
from headway.executor.simulated import (
    SimulatedExecutor,
    VirtualClock,
    choose_token,
    rate_token,
)

PLAIN = SamplingParams()


def make_executor(clock: VirtualClock | None = None, **settings: Any) -> SimulatedExecutor:
    defaults = {"num_blocks": 8, "block_size": 4, "num_swap_blocks": 8, "max_model_len": 32}
    return SimulatedExecutor(clock or VirtualClock(), **(defaults | {"verify": True} | settings))


def sequence(
    request_id: str,
    prompt: Sequence[int],
    block_table: Sequence[int] = (),
    params: SamplingParams = PLAIN,
    **place: Any,
) -> GrowingSequence:
    return GrowingSequence(request_id, prompt, params, block_table=block_table, **place)


def step_of(*rows: StepRow, **moves: Any) -> SchedulerOutput:
    return SchedulerOutput(0, rows, **moves)


def run(
    executor: SimulatedExecutor, growing: GrowingSequence, count: int | None = None, **wishes: Any
) -> tuple[int, ...]:
    """A step of one row, which the sequence takes in."""
    row = growing.row(count, **wishes)
    (tokens,) = executor.execute(step_of(row)).tokens
    growing.take(row, tokens)
    return tokens


class TestVirtualClock:
    def test_passes_only_when_told(self) -> None:
        clock = VirtualClock(3.0)
        assert clock() == 3.0
        clock.advance(0.5)
        clock.advance_to(10.0)
        clock.advance_to(4.0)
        assert clock() == 10.0

    @pytest.mark.parametrize("seconds", [-1e-9, math.inf, math.nan])
    def test_never_runs_backwards(self, seconds: float) -> None:
        clock = VirtualClock()
        with pytest.raises(InternalError, match="cannot advance"):
            clock.advance(seconds)
        assert clock() == 0.0


class TestTime:
    def test_a_step_takes_its_linear_cost_and_its_swaps(self) -> None:
        clock = VirtualClock()
        executor = make_executor(
            clock, cost=(100.0, 10.0, 1.0, 0.1), swap_ms_per_block=1000.0, verify=False
        )
        output = step_of(
            sequence("a", [1, 2, 3]).row(),
            features=StepFeatures(prefill_tokens=3, decode_seqs=2, context_tokens=40),
            swap_out=((0, 0),),
            swap_in=((1, 3), (2, 4)),
        )
        assert executor.execute(output).swap_ms == 3000.0
        assert clock() == pytest.approx((100 + 30 + 2 + 4 + 3000) / 1e3)
        assert executor.num_steps == 1

    def test_only_swapping_costs_no_step(self) -> None:
        clock = VirtualClock()
        make_executor(clock, swap_ms_per_block=2.0).execute(step_of(swap_out=((0, 0),)))
        assert clock() == pytest.approx(0.002)

    def test_what_to_expect_of_it_is_a_setting_of_its_own(self) -> None:
        cost = (1.0, 2.0, 3.0, 4.0)
        assert make_executor(cost=cost).cost_prior == SMALL_CPU_COSTS
        assert make_executor(cost=cost, cost_prior=cost).cost_prior == cost


class TestTokens:
    def test_are_a_function_of_request_and_position(self) -> None:
        assert run(make_executor(), sequence("a", [5, 6, 7], [2])) == (choose_token("a", 3),)
        assert choose_token("a", 3) != choose_token("b", 3) != choose_token("b", 4)
        assert all(0 < choose_token("a", position) < 32_000 for position in range(1000))

    def test_come_only_with_the_last_known_token(self) -> None:
        assert run(make_executor(), sequence("a", [5, 6, 7], [2]), 2) == ()

    def test_can_be_chosen(self) -> None:
        executor = make_executor(sampler=lambda request_id, position: position)
        assert run(executor, sequence("a", [5, 6, 7], [0])) == (3,)

    def test_differ_between_the_sequences_of_a_request(self) -> None:
        executor = make_executor()
        parent = sequence("a", [5, 6, 7, 8], [0, 1])
        first = run(executor, parent, seeds=(1, 2, 3))
        assert first == tuple(choose_token(name, 4) for name in ("a", "a#1", "a#2"))
        others = [
            sequence(
                "a", parent.prompt, [0, 1 + index], output=first[index : index + 1], index=index
            )
            for index in range(3)
        ]
        for other in others:
            other.num_computed_tokens = 4
        output = step_of(*(other.row() for other in others))
        assert executor.execute(output).tokens == [
            (choose_token(name, 5),) for name in ("a", "a#1", "a#2")
        ]


class TestDrafts:
    def test_are_accepted_as_far_as_they_are_right(self) -> None:
        executor = make_executor(sampler=lambda request_id, position: 100 + position)
        growing = sequence("a", [5, 6, 7], [0, 1, 2, 3])
        assert run(executor, growing, drafts=(103, 104)) == (103, 104, 105)
        assert run(executor, growing, drafts=(106, 0, 108)) == (106, 107)
        assert run(executor, growing, drafts=(0, 108)) == (108,)
        assert run(executor, growing) == (109,)
        assert growing.output == list(range(103, 110))

    def test_a_fault_behind_a_wrong_one_is_none(self) -> None:
        def choose(name: str, position: int) -> int:
            if position > 4:
                raise InternalError("no")
            return 100 + position

        growing = sequence("a", [5, 6, 7], [0, 1])
        output = make_executor(sampler=choose).execute(step_of(growing.row(drafts=(103, 0, 0))))
        assert (output.tokens, output.errors) == ([(103, 104)], {})
        output = make_executor(sampler=choose).execute(step_of(growing.row(drafts=(103, 104))))
        assert output.tokens == [()]
        assert set(output.errors) == {0}

    @given(
        st.lists(st.integers(0, 2), min_size=1, max_size=5),
        st.lists(st.integers(0, 2), max_size=4),
    )
    def test_acceptance_ends_with_the_first_token_that_is_no_draft(
        self, sampled: list[int], drafts: list[int]
    ) -> None:
        drafts = drafts[: len(sampled) - 1]
        drawn = iter(sampled)
        tokens = accept_drafts(drawn, drafts)
        assert tokens == tuple(sampled[: len(tokens)])
        assert tokens[:-1] == tuple(drafts[: len(tokens) - 1])
        assert len(tokens) == len(drafts) + 1 or tokens[-1] != drafts[len(tokens) - 1]
        # Nothing is drawn in vain.
        assert [*drawn] == sampled[len(tokens) :]


class TestRatings:
    def test_look_like_a_model_s(self) -> None:
        for token_id in (0, 1, 7, 97, 31_999):
            for num_top in (0, 1, 5, 20):
                rated = rate_token(token_id, num_top)
                assert (rated.token_id, rated.logprob) == (token_id, math.log(0.5))
                assert len(rated.top) == len({other_id for other_id, _ in rated.top}) == num_top
                assert all(0 <= other_id <= max(token_id, 20) for other_id, _ in rated.top)
                assert rated.top[:1] == ((token_id, rated.logprob),)[:num_top]
                logprobs = [logprob for _, logprob in rated.top]
                assert logprobs == sorted(logprobs, reverse=True)
                assert sum(map(math.exp, logprobs)) < 1

    def test_come_with_the_tokens_and_with_each_chunk_of_the_prompt(self) -> None:
        executor = make_executor()
        params = SamplingParams(logprobs=2, prompt_logprobs=1)
        growing = sequence("a", [5, 6, 7, 8], [2, 3], params)
        row = growing.row(2)
        first = executor.execute(step_of(row))
        assert first.logprobs == {}
        assert first.prompt_logprobs == {0: (1, [rate_token(6, 1), rate_token(7, 1)])}
        growing.take(row, ())
        second = executor.execute(step_of(growing.row(drafts=(choose_token("a", 4),))))
        assert second.prompt_logprobs == {0: (3, [rate_token(8, 1)])}
        assert second.logprobs == {
            0: (rate_token(choose_token("a", 4), 2), rate_token(choose_token("a", 5), 2))
        }

    def test_a_failing_choice_is_its_request_s_error(self) -> None:
        error = InternalError("no")

        def choose(request_id: str, position: int) -> int:
            if request_id == "bad":
                raise error
            return 4

        rows = [sequence(name, [1, 2], [index]).row() for index, name in enumerate(("good", "bad"))]
        result = make_executor(sampler=choose).execute(step_of(*rows))
        assert result.tokens == [(4,), ()]
        assert result.errors == {1: error}


class TestVerify:
    def test_finds_tokens_that_no_row_computed(self) -> None:
        row = sequence("a", [1, 2, 3], [0], num_computed_tokens=2).row()
        with pytest.raises(InternalError, match="token 0 of request 'a' is not in slot 0"):
            make_executor().execute(step_of(row))

    def test_finds_another_request_s_tokens(self) -> None:
        executor = make_executor()
        mine = sequence("a", [1, 2, 3], [0])
        run(executor, mine, 2)
        run(executor, sequence("b", [9, 2, 3], [0]), 2)
        with pytest.raises(InternalError, match="token 0 of request 'a' is not in slot 0"):
            run(executor, mine)

    def test_finds_a_block_that_two_write_in_one_step(self) -> None:
        rows = [
            sequence(name, prompt, [5]).row() for name, prompt in (("a", [1, 2]), ("b", [3, 4]))
        ]
        with pytest.raises(InternalError, match="request 'a'"):
            make_executor().execute(step_of(*rows))

    def test_finds_too_short_a_table(self) -> None:
        with pytest.raises(InternalError, match="5 tokens of request 'a'"):
            make_executor().execute(step_of(sequence("a", [1, 2, 3, 4, 5], [0]).row()))
        with pytest.raises(InternalError, match="5 tokens of request 'a'"):
            make_executor().execute(step_of(sequence("a", [1, 2, 3], [0]).row(drafts=(4, 5))))

    def test_follows_swaps_and_copies_in_their_order(self) -> None:
        executor = make_executor()
        growing = sequence("a", [1, 2, 3, 4, 5], [0, 1])
        run(executor, growing, 4)
        growing.block_table = [3, 1]
        moves: dict[str, Any] = {
            "swap_out": ((0, 7),),
            "block_copies": ((6, 0),),  # never written: the block's contents are gone
            "swap_in": ((7, 3),),
        }
        executor.execute(step_of(growing.row(), **moves))
        growing.block_table = [0, 1]
        with pytest.raises(InternalError, match="block 0"):
            executor.execute(step_of(growing.row()))

    def test_finds_a_token_that_was_not_the_one_sampled(self) -> None:
        executor = make_executor()
        growing = sequence("a", [1, 2, 3], [0, 1])
        (token_id,) = run(executor, growing)
        growing.token_ids[-1] = token_id + 1
        with pytest.raises(InternalError, match=f"token 3 of request 'a' is {token_id}"):
            run(executor, growing)

    @pytest.mark.parametrize("chunk", [4, 2])
    def test_finds_tokens_that_change_when_they_are_computed_again(self, chunk: int) -> None:
        executor = make_executor()
        growing = sequence("a", [1, 2, 3], [0, 1])
        run(executor, growing)
        run(executor, growing)
        growing.num_computed_tokens = 0
        growing.token_ids[3] += 1
        with pytest.raises(InternalError, match="token 3 of request 'a'"):
            while growing.num_computed_tokens < 4:
                run(executor, growing, chunk)

    def test_finds_a_choice_s_first_token_with_another_choice(self) -> None:
        executor = make_executor()
        first = run(executor, sequence("a", [1, 2, 3, 4], [0]), seeds=(1, 2))
        swapped = sequence("a", [1, 2, 3, 4], [0, 1], output=first[:1], index=1)
        swapped.num_computed_tokens = 4
        with pytest.raises(InternalError, match="token 4 of request 'a'"):
            run(executor, swapped)

    def test_takes_over_what_the_prefix_cache_has_if_it_is_a_whole_beginning(self) -> None:
        executor = make_executor()
        run(executor, sequence("a", [1, 2, 3, 4, 5, 6, 7, 8], [2, 3]))
        hit = sequence("b", [1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 3, 4], num_computed_tokens=8)
        run(executor, hit)
        # From now on, these are the tokens of "b", wherever they are.
        run(executor, sequence("c", [7, 7, 7, 7], [2]))
        with pytest.raises(InternalError, match="token 0 of request 'b' is not in slot 0"):
            run(executor, hit)

    @pytest.mark.parametrize("table", [[3, 2, 4], [3, 3, 4], [2, 5, 4]])
    def test_finds_blocks_that_are_no_beginning_of_any_sequence(self, table: list[int]) -> None:
        executor = make_executor()
        run(executor, sequence("a", [1, 2, 3, 4, 5, 6, 7, 8], [2, 3]))
        hit = sequence("b", [1, 2, 3, 4, 5, 6, 7, 8, 9], table, num_computed_tokens=8)
        with pytest.raises(InternalError, match="of request 'b' is not in slot 0"):
            run(executor, hit)

    def test_finds_a_hit_that_ends_with_another_token_or_differs_from_what_the_row_tells(
        self,
    ) -> None:
        executor = make_executor()
        run(executor, sequence("a", [1, 2, 3, 4], [2]))
        wrong = sequence("b", [1, 2, 3, 9, 5], [2, 3], num_computed_tokens=4)
        with pytest.raises(InternalError, match="token 3 of request 'b' is 4"):
            run(executor, wrong)
        params = SamplingParams(repetition_penalty=2.0)  # its rows tell the whole context
        wrong = sequence("c", [1, 9, 3, 4, 5], [2, 3], params, num_computed_tokens=4)
        with pytest.raises(InternalError, match="token 1 of request 'c' is 2"):
            run(executor, wrong)

    def test_knows_another_request_under_a_used_id(self) -> None:
        executor = make_executor()
        run(executor, sequence("a", [1, 2, 3], [0]))
        run(executor, sequence("a", [4, 5, 6], [0]))
        run(executor, sequence("a", [4, 5, 6, 7], [1]))
        again = sequence("a", [4, 5, 6, 7], [1, 2])
        for _ in range(3):
            run(executor, again)

    def test_wrong_drafts_leave_no_trace(self) -> None:
        executor = make_executor()
        growing = sequence("a", [1, 2, 3], [0, 1, 2])
        run(executor, growing, drafts=(0, 0, 0, 0, 0))
        for _ in range(5):
            run(executor, growing)
        assert growing.output == [choose_token("a", position) for position in range(3, 9)]


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_a_step_that_was_pickled_gives_the_same(seed: int) -> None:
    chance = random.Random(seed)
    original, other = make_executor(num_blocks=20), make_executor(num_blocks=20)
    params = SamplingParams(logprobs=2, prompt_logprobs=1, logit_bias={3: 1.0}, stop=("x",))
    growing = [
        sequence(f"r{index}", range(1, 4 + index), range(4 * index, 4 * index + 4), params)
        for index in range(5)
    ]
    for step in range(6):
        chosen = chance.sample(growing, chance.randint(1, 5))
        rows = [
            each.row(chance.randint(1, each.num_uncomputed_tokens), banned=frozenset({1, 2}))
            for each in chosen
        ]
        output = SchedulerOutput(step, tuple(rows), features=StepFeatures(1, 2, 3))
        copy = pickle.loads(pickle.dumps(output))
        assert copy == output
        result = original.execute(output)
        assert pickle.loads(pickle.dumps(result)) == other.execute(copy)
        assert original.clock() == other.clock()
        for each, row, tokens in zip(chosen, rows, result.tokens, strict=True):
            each.take(row, tokens)


@pytest.mark.parametrize("mode", list(PreemptionMode))
def test_a_scheduler_s_outputs_do_not_depend_on_preemption(mode: PreemptionMode) -> None:
    clock = VirtualClock()
    executor = make_executor(clock, num_blocks=10)
    config = SchedulerConfig(
        max_num_seqs=2,
        max_num_batched_tokens=8,
        num_blocks=executor.num_blocks,
        block_size=executor.block_size,
        num_swap_blocks=executor.num_swap_blocks,
        preemption_mode=mode,
    )
    scheduler = PriorityScheduler(config=config)
    requests = [
        Request(
            f"r{index}",
            priority=-index,
            prompt=[index * 100 + offset for offset in range(9)],
            sampling_params=SamplingParams(max_tokens=8, ignore_eos=True),
        )
        for index in range(4)
    ]

    def step() -> None:
        output = scheduler.schedule(clock())
        result = executor.execute(output)
        scheduler.update_from_output(output, result.tokens, clock())
        invariants.check(scheduler)

    for request in requests:
        scheduler.add_request(request, clock())
        step()
        step()
    while scheduler.has_unfinished_requests:
        step()
    for request in requests:
        expected = [choose_token(request.request_id, position) for position in range(9, 17)]
        assert request.output_token_ids == expected
    took_blocks = scheduler.statistics().preemptions.keys() - {"pause"}
    assert bool(took_blocks) == (mode is not PreemptionMode.NONE)


def test_implements_the_protocol_and_closes() -> None:
    executor: Executor = make_executor()
    executor.close()
    with pytest.raises(InternalError, match="closed"):
        executor.execute(SchedulerOutput())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 0},
        {"num_swap_blocks": -1},
        {"cost": (1.0, 2.0)},
        {"cost": (1.0, 2.0, 3.0, -1.0)},
        {"swap_ms_per_block": math.nan},
    ],
)
def test_refuses_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_executor(**settings)
