"""Requests of several choices, from end to end: one prefill, and outputs that are their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from headway.core.config import SchedulerConfig
from headway.core.errors import InvalidRequest
from headway.core.request import Request, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.engine.async_engine import AsyncEngine
from headway.engine.client import StepReport
from headway.engine.engine import Engine
from headway.engine.llm import LLM
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.executor.simulated import SimulatedExecutor, TokenChoice, VirtualClock, rate_token

MakeEngine = Callable[..., Engine]
Drain = Callable[[Engine], list[EngineOutput]]

PROMPT = list(b"a prompt of many")


def letter(name: str, position: int) -> int:
    """A letter that tells the choice, in upper case at every fourth position."""
    index = int(name.partition("#")[2] or 0)
    return ord("Aa"[position % 4 != 0]) + index


def simulated(
    make_engine: MakeEngine, sampler: TokenChoice = letter, num_blocks: int = 200, **more: Any
) -> Engine:
    """An engine whose choices differ."""
    clock = VirtualClock()
    executor = SimulatedExecutor(
        clock,
        num_blocks=num_blocks,
        block_size=4,
        num_swap_blocks=more.get("num_swap_blocks", 0),
        max_model_len=800,
        sampler=sampler,
        verify=True,
    )
    return make_engine(executor=executor, clock=clock, num_blocks=num_blocks, **more)


def group(
    request_id: str, n: int, max_tokens: int = 8, priority: int = 0, **params: Any
) -> Request:
    sampling_params = SamplingParams(max_tokens=max_tokens, **params)
    return Request(request_id, priority, PROMPT, sampling_params=sampling_params, n=n)


def result_of(request: Request, outputs: Sequence[EngineOutput]) -> RequestOutput:
    """What the outputs of the request come to."""
    result = RequestOutput.of(request)
    for output in outputs:
        if output.request_id == request.request_id:
            result.extend(output)
    return result


def expected_text(index: int, count: int = 8, start: int = len(PROMPT)) -> str:
    return "".join(chr(letter(f"#{index}", start + place)) for place in range(count))


# --- one prefill, n outputs -----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [5, 16, 64])
def test_the_prompt_is_computed_once_and_each_choice_goes_its_own_way(
    make_engine: MakeEngine, drain: Drain, budget: int
) -> None:
    engine = simulated(make_engine, max_num_batched_tokens=budget)
    computed: list[int] = []
    engine.listeners.append(lambda step, _: computed.append(step.output.num_batched_tokens))
    request = group("g", 4)
    engine.submit(request)
    result = result_of(request, drain(engine))
    assert [choice.text for choice in result.outputs] == [expected_text(n) for n in range(4)]
    assert {choice.finish_reason for choice in result.outputs} == {"length"}
    # The prompt, and of each choice all tokens but the last.
    assert sum(computed) == len(PROMPT) + 4 * 7
    assert result.finished
    assert result.metrics is not None
    assert result.metrics.num_output_tokens == 32


def test_the_first_tokens_of_all_choices_come_in_one_step(make_engine: MakeEngine) -> None:
    engine = simulated(make_engine, max_num_batched_tokens=8)
    engine.submit(group("g", 3))
    assert engine.step() == []
    outputs = engine.step()
    assert [output.index for output in outputs] == [0, 1, 2]
    assert [output.text for output in outputs] == [expected_text(n, 1) for n in range(3)]
    assert [output.metrics is not None for output in outputs] == [True, False, False]
    engine.abort_all()


@pytest.mark.parametrize("n", [1, 3, 8])
def test_choices_are_what_requests_with_seeds_that_follow_each_other_get(
    make_engine: MakeEngine, drain: Drain, n: int
) -> None:
    """Of the seeds that the rows are given; the tokens are those of the real model, below."""

    def seeds_of(engine: Engine) -> dict[tuple[str, int], set[int | None]]:
        seeds: dict[tuple[str, int], set[int | None]] = {}

        def note(step: StepReport, _: object) -> None:
            for row in step.output:
                for place, seed in enumerate(row.seeds):
                    index = row.index if len(row.seeds) == 1 else place
                    seeds.setdefault((row.request_id, index), set()).add(seed)

        engine.listeners.append(note)
        return seeds

    together, apart = (simulated(make_engine, max_num_seqs=8) for _ in range(2))
    of_group, of_requests = seeds_of(together), seeds_of(apart)
    together.submit(group("g", n, seed=2**64 - 2))
    for index in range(n):
        apart.submit(group(f"{index}", 1, seed=(2**64 - 2 + index) % 2**64))
    drain(together)
    drain(apart)
    for index in range(n):
        assert of_group["g", index] == of_requests[f"{index}", 0]
        assert len(of_group["g", index]) == 1


@pytest.mark.parametrize("mode", ["pause", "tail", "swap", "recompute", "auto"])
def test_preemption_changes_no_choice(make_engine: MakeEngine, drain: Drain, mode: str) -> None:
    engine = simulated(
        make_engine,
        num_blocks=22,
        num_swap_blocks=40,
        max_num_seqs=4,
        max_num_batched_tokens=9,
        preemption_mode=mode,
    )
    requests = [group(f"g{n}", 1 + n % 4, 12, priority=-(n % 5)) for n in range(10)]
    outputs: list[EngineOutput] = []
    for request in requests:
        engine.submit(request)
        outputs += [output for _ in range(5) for output in engine.step()]
    outputs += drain(engine)
    for request in requests:
        result = result_of(request, outputs)
        assert [choice.text for choice in result.outputs] == [
            expected_text(index, 12) for index in range(request.n)
        ]
    assert sum(engine.statistics.preemptions.values()) > 0


# --- ends -----------------------------------------------------------------------------------------


def test_a_stop_text_ends_one_choice_and_the_others_go_on(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = simulated(make_engine)
    request = group("g", 3, 9, stop=("bB",))
    engine.submit(request)
    outputs = drain(engine)
    result = result_of(request, outputs)
    assert [choice.text for choice in result.outputs] == [
        expected_text(0, 9),
        "Bbb",
        expected_text(2, 9),
    ]
    assert [choice.finish_reason for choice in result.outputs] == ["length", "stop", "length"]
    assert [choice.stop_reason for choice in result.outputs] == [None, "bB", None]
    assert [output.is_last for output in outputs if output.finish_reason] == [False, False, True]
    assert engine.statistics.kv_cache_usage == 0


def test_choices_that_end_in_the_same_step_end_the_request(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = simulated(make_engine)
    request = group("g", 3, 9, stop=("aA", "bB", "cC"))
    engine.submit(request)
    outputs = drain(engine)
    result = result_of(request, outputs)
    assert [choice.text for choice in result.outputs] == ["Aaa", "Bbb", "Ccc"]
    assert [choice.stop_reason for choice in result.outputs] == ["aA", "bB", "cC"]
    assert result.finished and outputs[-1].is_last
    assert sum(output.is_last for output in outputs) == 1
    assert result.metrics is not None and result.metrics.status == "finished_stopped"


def test_a_stop_token_and_an_end_token_end_their_choices(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = simulated(make_engine, eos_token_ids=frozenset({ord("C")}))
    request = group("g", 4, 9, stop_token_ids=frozenset({ord("b")}))
    engine.submit(request)
    outputs = drain(engine)
    result = result_of(request, outputs)
    assert [choice.text for choice in result.outputs] == [
        expected_text(0, 9),
        "B",
        "",
        expected_text(3, 9),
    ]
    assert [choice.stop_reason for choice in result.outputs] == [None, ord("b"), None, None]
    ended = [output.index for output in outputs if output.finish_reason]
    assert ended == [2, 1, 0, 3], "in the order in which they did"


def test_abort_ends_all_choices_that_have_not_ended(make_engine: MakeEngine, drain: Drain) -> None:
    engine = simulated(make_engine)
    request = group("g", 3, 50, stop=("Bbb",))
    engine.submit(request)
    outputs = [output for _ in range(6) for output in engine.step()]
    engine.abort("g")
    ends = engine.step()
    assert [(output.index, output.finish_reason, output.is_last) for output in ends] == [
        (0, "abort", False),
        (2, "abort", True),
    ]
    result = result_of(request, outputs + ends)
    assert [choice.finish_reason for choice in result.outputs] == ["abort", "stop", "abort"]
    assert [len(choice.token_ids) for choice in result.outputs] == [6, 3, 6]
    assert not engine.has_work


def test_more_choices_than_a_step_has_slots_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=4)
    message = r"^n of request 'g' is 5, a step has room for 4$"
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(group("g", 5))
    assert engine.description.max_num_choices == 4


# --- what is reported -----------------------------------------------------------------------------


def test_each_choice_has_logprobs_and_the_prompt_s_come_once(
    make_engine: MakeEngine, drain: Drain
) -> None:
    engine = simulated(make_engine, max_num_batched_tokens=7)
    request = group("g", 3, 5, logprobs=2, prompt_logprobs=1)
    engine.submit(request)
    outputs = drain(engine)
    assert sum(output.prompt_logprobs is not None for output in outputs) == 1
    result = result_of(request, outputs)
    assert result.prompt_logprobs == [None, *(rate_token(token, 1) for token in PROMPT[1:])]
    for choice in result.outputs:
        assert choice.logprobs == [rate_token(token, 2) for token in choice.token_ids]
        assert len(choice.token_ids) == 5


def test_streams_tell_which_choices_have_something_new(make_engine: MakeEngine) -> None:
    async def test() -> None:
        engine = simulated(make_engine)
        params = SamplingParams(max_tokens=12, stop=("bB", "cccC"), logprobs=0)
        texts = ["", "", ""]
        ends: list[int] = []
        async with AsyncEngine(engine) as client:
            async for output in client.generate(PROMPT, params, n=3):
                assert output.changed
                for choice in output.outputs:
                    is_changed = choice.index in output.changed
                    assert is_changed or (not choice.new_text and not choice.new_token_ids)
                    assert len(choice.new_logprobs) == len(choice.new_token_ids)
                    texts[choice.index] += choice.new_text
                    if is_changed and choice.finish_reason is not None:
                        ends.append(choice.index)
            assert output.finished
            assert [choice.text for choice in output.outputs] == texts
            assert texts == [expected_text(0, 12), "Bbb", "C"]
            assert sorted(ends) == [0, 1, 2], "each end is told once"

    asyncio.run(asyncio.wait_for(test(), 60))


# --- with a model ---------------------------------------------------------------------------------


def model_engine(llm: LLM, **settings: Any) -> Engine:
    executor = llm.engine.executor
    llm.engine.scheduler.block_manager.reset_prefix_cache()  # another writes into its pool
    defaults = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "num_blocks": executor.num_blocks,
        "num_swap_blocks": executor.num_swap_blocks,
    }
    config = SchedulerConfig(
        **(defaults | settings),
        block_size=executor.block_size,
        eos_token_ids=llm.tokenizer.eos_token_ids,
    )
    return Engine(executor, PriorityScheduler(config=config), llm.tokenizer)


@pytest.fixture(scope="module")
def question(llm: LLM) -> list[int]:
    return llm.tokenizer.encode("Once upon a time, in a town by the sea, there was a " * 3)


def sampled(seed: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=12, temperature=1.1, seed=seed, logprobs=2, **more)


@pytest.fixture(scope="module")
def apart(llm: LLM, question: list[int]) -> list[RequestOutput]:
    """Five requests with seeds that follow each other."""
    return [llm.generate([question], sampled(40 + index))[0] for index in range(5)]


@pytest.mark.model
def test_choices_of_the_real_model_are_those_of_separate_requests(
    llm: LLM, question: list[int], apart: list[RequestOutput]
) -> None:
    (together,) = llm.generate([question], sampled(40), n=5)
    assert len({tuple(choice.token_ids) for choice in together.outputs}) > 1
    for choice, alone in zip(together.outputs, apart, strict=True):
        assert choice.token_ids == alone.outputs[0].token_ids
        assert choice.text == alone.outputs[0].text
        assert choice.logprobs == alone.outputs[0].logprobs


@pytest.mark.model
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_preemption_changes_no_choice_of_the_real_model(
    llm: LLM, question: list[int], apart: list[RequestOutput], mode: str, drain: Drain
) -> None:
    """Urgent requests take the pool away in the middle, again and again."""
    engine = model_engine(llm, num_blocks=9, max_num_batched_tokens=37, preemption_mode=mode)
    request = Request("g", 5, question, sampling_params=sampled(40), n=5)
    engine.submit(request)
    outputs: list[EngineOutput] = []
    for number in range(3):
        outputs += [output for _ in range(4) for output in engine.step()]
        urgent = SamplingParams(max_tokens=2, temperature=0.0)
        prompt = [1000 + number] * 200
        engine.submit(Request(f"urgent{number}", 0, prompt, sampling_params=urgent))
    outputs += drain(engine)
    result = result_of(request, outputs)
    assert result.metrics is not None and result.metrics.num_preemptions > 0
    for choice, alone in zip(result.outputs, apart, strict=True):
        assert choice.token_ids == alone.outputs[0].token_ids
        assert choice.logprobs == alone.outputs[0].logprobs


@pytest.mark.model
def test_greedy_choices_are_all_alike(llm: LLM, question: list[int]) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=1)
    (together,) = llm.generate([question], params, n=3)
    (alone,) = llm.generate([question], params)
    assert {tuple(choice.token_ids) for choice in together.outputs} == {
        tuple(alone.outputs[0].token_ids)
    }
    assert together.prompt_logprobs == alone.prompt_logprobs
