"""The simulated executor: exact time, reproducible tokens, and a pool that cannot be fooled."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headway.core import invariants
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import StepFeatures
from headway.core.errors import ConfigError, InternalError
from headway.core.request import Request, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.engine import Engine
from headway.executor.base import Executor
from headway.executor.simulated import (
    SimulatedExecutor,
    VirtualClock,
    choose_token,
    rate_token,
)


def make_executor(clock: VirtualClock | None = None, **settings: Any) -> SimulatedExecutor:
    defaults = {"num_blocks": 8, "block_size": 4, "num_swap_blocks": 8, "max_model_len": 32}
    return SimulatedExecutor(clock or VirtualClock(), **(defaults | {"verify": True} | settings))


def step_of(request: Request, count: int) -> SchedulerOutput:
    output = SchedulerOutput()
    output.requests.append(request)
    output.num_scheduled_tokens.append(count)
    output.num_batched_tokens = count
    return output


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
        output = step_of(Request("a", prompt=[1, 2, 3]), 3)
        output.features = StepFeatures(prefill_tokens=3, decode_seqs=2, context_tokens=40)
        output.swap_out = [(0, 0)]
        output.swap_in = [(1, 3), (2, 4)]
        assert executor.execute(output).swap_ms == 3000.0
        assert clock() == pytest.approx((100 + 30 + 2 + 4 + 3000) / 1e3)
        assert executor.num_steps == 1

    def test_only_swapping_costs_no_step(self) -> None:
        clock = VirtualClock()
        output = SchedulerOutput()
        output.swap_out = [(0, 0)]
        make_executor(clock, swap_ms_per_block=2.0).execute(output)
        assert clock() == pytest.approx(0.002)


class TestTokens:
    def test_are_a_function_of_request_and_position(self) -> None:
        executor = make_executor()
        request = Request("a", prompt=[5, 6, 7])
        request.block_table = [2]
        assert executor.execute(step_of(request, 3)).sampled_token_ids == [choose_token("a", 3)]
        assert choose_token("a", 3) != choose_token("b", 3) != choose_token("b", 4)
        assert all(0 < choose_token("a", position) < 32_000 for position in range(1000))

    def test_come_only_with_the_last_known_token(self) -> None:
        request = Request("a", prompt=[5, 6, 7])
        request.block_table = [2]
        assert make_executor().execute(step_of(request, 2)).sampled_token_ids == [None]

    def test_can_be_chosen(self) -> None:
        executor = make_executor(sampler=lambda request_id, position: position)
        request = Request("a", prompt=[5, 6, 7])
        request.block_table = [0]
        assert executor.execute(step_of(request, 3)).sampled_token_ids == [3]


class TestRatings:
    def test_look_like_a_model_s(self) -> None:
        for token_id in (0, 1, 7, 97, 31_999):
            for num_top in (0, 1, 5, 20):
                rated = rate_token(token_id, num_top)
                assert (rated.token_id, rated.logprob) == (token_id, math.log(0.5))
                assert len(rated.top) == len({one for one, _ in rated.top}) == num_top
                assert all(0 <= one <= max(token_id, 20) for one, _ in rated.top)
                assert rated.top[:1] == ((token_id, rated.logprob),)[:num_top]
                logprobs = [logprob for _, logprob in rated.top]
                assert logprobs == sorted(logprobs, reverse=True)
                assert sum(map(math.exp, logprobs)) < 1

    def test_come_with_the_token_and_with_each_chunk_of_the_prompt(self) -> None:
        executor = make_executor()
        params = SamplingParams(logprobs=2, prompt_logprobs=1)
        request = Request("a", prompt=[5, 6, 7, 8], sampling_params=params)
        request.block_table = [2]
        first = executor.execute(step_of(request, 2))
        assert first.logprobs == {}
        assert first.prompt_logprobs == {0: (1, [rate_token(6, 1), rate_token(7, 1)])}
        request.num_computed_tokens = 2
        second = executor.execute(step_of(request, 2))
        assert second.prompt_logprobs == {0: (3, [rate_token(8, 1)])}
        assert second.logprobs == {0: rate_token(choose_token("a", 4), 2)}

    def test_a_failing_choice_is_its_request_s_error(self) -> None:
        error = InternalError("no")

        def choose(request_id: str, position: int) -> int:
            if request_id == "bad":
                raise error
            return 4

        output = SchedulerOutput()
        for index, request_id in enumerate(("good", "bad")):
            request = Request(request_id, prompt=[1, 2])
            request.block_table = [index]
            output.requests.append(request)
            output.num_scheduled_tokens.append(2)
        result = make_executor(sampler=choose).execute(output)
        assert result.sampled_token_ids == [4, None]
        assert result.errors == {1: error}


class TestVerify:
    def test_finds_tokens_that_nobody_computed(self) -> None:
        request = Request("a", prompt=[1, 2, 3])
        request.block_table = [0]
        request.num_computed_tokens = 2
        with pytest.raises(InternalError, match="token 0 of request 'a' is not in slot 0"):
            make_executor().execute(step_of(request, 1))

    def test_finds_another_request_s_tokens(self) -> None:
        executor = make_executor()
        mine, other = Request("a", prompt=[1, 2, 3]), Request("b", prompt=[9, 2, 3])
        mine.block_table = other.block_table = [0]
        executor.execute(step_of(mine, 2))
        executor.execute(step_of(other, 2))
        mine.num_computed_tokens = 2
        with pytest.raises(InternalError, match="request 'a'"):
            executor.execute(step_of(mine, 1))

    def test_finds_a_block_that_two_write_in_one_step(self) -> None:
        output = SchedulerOutput()
        for request_id, prompt in (("a", [1, 2]), ("b", [3, 4])):
            request = Request(request_id, prompt=prompt)
            request.block_table = [5]
            output.requests.append(request)
            output.num_scheduled_tokens.append(2)
        with pytest.raises(InternalError, match="request 'a'"):
            make_executor().execute(output)

    def test_finds_too_short_a_table(self) -> None:
        request = Request("a", prompt=[1, 2, 3, 4, 5])
        request.block_table = [0]
        with pytest.raises(InternalError, match="5 tokens of request 'a'"):
            make_executor().execute(step_of(request, 5))

    def test_follows_swaps_and_copies_in_their_order(self) -> None:
        executor = make_executor()
        request = Request("a", prompt=[1, 2, 3, 4, 5])
        request.block_table = [0, 1]
        executor.execute(step_of(request, 4))
        request.num_computed_tokens = 4
        output = step_of(request, 1)
        output.swap_out = [(0, 7)]
        output.block_copies = [(6, 0)]  # never written: the block's contents are gone
        output.swap_in = [(7, 3)]
        request.block_table = [3, 1]
        executor.execute(output)
        request.block_table = [0, 1]
        with pytest.raises(InternalError, match="block 0"):
            executor.execute(step_of(request, 1))


@pytest.mark.parametrize("mode", list(PreemptionMode))
def test_an_engine_s_outputs_do_not_depend_on_preemption(mode: PreemptionMode) -> None:
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
    engine = Engine(executor, scheduler, clock=clock)
    engine.observers.append(lambda step: invariants.check(scheduler))
    requests = [
        Request(
            f"r{index}",
            priority=-index,
            prompt=[index * 100 + offset for offset in range(9)],
            sampling_params=SamplingParams(max_tokens=8, ignore_eos=True),
        )
        for index in range(4)
    ]
    for request in requests:
        engine.submit(request)
        engine.step()
        engine.step()
    while engine.has_work:
        engine.step()
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
