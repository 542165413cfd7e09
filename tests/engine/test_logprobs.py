"""Penalties, biases and log-probabilities through the whole engine, alone and under load."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import TinyModel

from headway.core import invariants
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.errors import InternalError, InvalidRequest
from headway.core.request import Request, RequestStatus, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.engine.async_engine import AsyncEngine
from headway.engine.engine import Engine
from headway.engine.llm import LLM
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.executor.base import TokenLogprobs
from headway.executor.native import NativeExecutor
from headway.executor.simulated import SimulatedExecutor, VirtualClock, choose_token, rate_token

MakeEngine = Callable[..., Engine]
Drain = Callable[[Engine], list[EngineOutput]]


def ask(request_id: str, prompt: str, max_tokens: int = 4, **more: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **more)
    return Request(request_id, prompt_token_ids=list(prompt.encode()), sampling_params=params)


# --- what comes out -------------------------------------------------------------------------------


def test_each_token_comes_with_its_logprobs(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("rated", story[:6], logprobs=2))
    engine.submit(ask("plain", story[:6]))
    for output in drain(engine):
        if output.request_id == "plain":
            assert output.logprobs == ()
        else:
            (token_id,) = output.token_ids
            assert output.logprobs == (rate_token(token_id, 2),)
        assert output.prompt_logprobs is None


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 19])
def test_the_prompt_s_come_with_the_first_token(
    make_engine: MakeEngine, drain: Drain, story: str, length: int, with_tokenizer: bool
) -> None:
    more = {} if with_tokenizer else {"tokenizer": None}
    engine = make_engine(max_num_batched_tokens=5, **more)
    engine.submit(ask("a", story[:length], prompt_logprobs=3))
    first, *others = drain(engine)
    assert first.prompt_logprobs == [
        None,
        *(rate_token(token_id, 3) for token_id in story[1:length].encode()),
    ]
    assert len(others) == 3
    assert all(output.prompt_logprobs is None for output in others)


def test_a_prompt_is_rated_even_if_the_prefix_cache_has_it(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    engine.submit(ask("before", story[:30]))
    drain(engine)
    engine.submit(ask("a", story[:30], prompt_logprobs=0))
    (rated,) = (output.prompt_logprobs for output in drain(engine) if output.prompt_logprobs)
    assert [each and each.token_id for each in rated] == [None, *story[1:30].encode()]
    after = ask("after", story[:30])
    engine.submit(after)
    drain(engine)
    assert after.num_cached_tokens == 28


@pytest.mark.parametrize("mode", ["auto", "tail", "swap", "recompute"])
def test_a_prompt_is_rated_through_preemption(
    make_engine: MakeEngine, drain: Drain, story: str, mode: str
) -> None:
    engine = make_engine(
        num_blocks=12, num_swap_blocks=12, max_num_batched_tokens=7, preemption_mode=mode
    )
    params = SamplingParams(max_tokens=12, prompt_logprobs=1, logprobs=1)
    tokens = list(story[:31].encode())
    request = Request("a", 5, prompt_token_ids=tokens, sampling_params=params)
    engine.submit(request)
    outputs: list[EngineOutput] = []
    for computed in (10, 20, 38):  # in the prompt, there again, and in the output
        while request.num_computed_tokens < computed:
            outputs += engine.step()
        engine.submit(ask(f"urgent {computed}", chr(computed) + story[:43], 2))
        outputs += engine.step()  # it needs every block
    outputs += drain(engine)
    assert request.num_preemptions >= 3
    result = RequestOutput.of(request)
    for output in outputs:
        if output.request_id == "a":
            result.extend(output)
    assert result.prompt_logprobs == [None, *(rate_token(token_id, 1) for token_id in tokens[1:])]
    assert result.outputs[0].logprobs == [
        rate_token(token_id, 1) for token_id in story[31:43].encode()
    ]


def test_streams_hand_out_what_is_new(make_engine: MakeEngine, story: str) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine(max_num_batched_tokens=4)) as engine:
            params = SamplingParams(max_tokens=9, logprobs=0, prompt_logprobs=0)
            text, token_ids, logprobs = "", [], []
            async for output in engine.generate(story[:10], params):
                assert output.prompt_logprobs is not None
                assert len(output.prompt_logprobs) == 10
                assert len(output.new_token_ids) == len(output.new_logprobs)
                text += output.new_text
                token_ids += output.new_token_ids
                logprobs += output.new_logprobs
            (completion,) = output.outputs
            assert text == completion.text == story[10:19]
            assert token_ids == completion.token_ids
            assert (
                logprobs
                == completion.logprobs
                == [rate_token(token_id, 0) for token_id in token_ids]
            )

    asyncio.run(asyncio.wait_for(test(), 60))


# --- what is refused, and what fails --------------------------------------------------------------


def test_a_bias_for_a_token_that_does_not_exist_is_refused(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=r"logit_bias of request 'a' has token id 258, the"):
        engine.submit(ask("a", story[:6], logit_bias={3: 1.0, 258: 1.0}))
    engine.submit(ask("b", story[:6], logit_bias={257: 1.0}))
    assert len(drain(engine)) == 4


def failing(num_blocks: int = 40) -> SimulatedExecutor:
    """Its choice for the request "bad" fails at its third token."""

    def choose(request_id: str, position: int) -> int:
        if request_id == "bad" and position == 8:
            raise InternalError("the largest of 9 logits is nan")
        return choose_token(request_id, position)

    return SimulatedExecutor(
        VirtualClock(),
        num_blocks=num_blocks,
        block_size=4,
        max_model_len=160,
        sampler=choose,
        verify=True,
    )


def test_a_failing_choice_ends_its_own_request_only(make_engine: MakeEngine, drain: Drain) -> None:
    executor = failing()
    engine = make_engine(
        executor=executor, clock=executor.clock, tokenizer=None, num_blocks=40, num_swap_blocks=0
    )
    requests = [ask(name, "prompt", 6, logprobs=0) for name in ("good", "bad", "fine")]
    for request in requests:
        engine.submit(request)
    outputs = drain(engine)
    good, bad, fine = requests
    assert bad.status is RequestStatus.FINISHED_ABORTED
    assert bad.output_token_ids == [choose_token("bad", position) for position in (6, 7)]
    (end,) = (output for output in outputs if output.error is not None)
    assert end.request_id == "bad"
    assert isinstance(end.error, InternalError)
    assert (end.token_ids, end.finish_reason) == ((), "abort")
    for request in (good, fine):
        assert request.output_token_ids == [
            choose_token(request.request_id, position) for position in range(6, 12)
        ]


def test_only_its_own_reader_hears_of_it(make_engine: MakeEngine) -> None:
    executor = failing()
    sound = make_engine(
        executor=executor, clock=executor.clock, tokenizer=None, num_blocks=40, num_swap_blocks=0
    )

    async def read(engine: AsyncEngine, name: str) -> list[int]:
        stream = engine.generate([1] * 6, SamplingParams(max_tokens=6), name)
        return [token_id async for output in stream for token_id in output.new_token_ids]

    async def test() -> None:
        async with AsyncEngine(sound) as engine:
            good, bad = await asyncio.gather(
                read(engine, "good"), read(engine, "bad"), return_exceptions=True
            )
            assert isinstance(bad, InternalError)
            assert good == [choose_token("good", position) for position in range(6, 12)]
            assert len(await read(engine, "later")) == 6

    asyncio.run(asyncio.wait_for(test(), 60))


# --- with a model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeExecutor]:
    home = tmp_path_factory.mktemp("home")
    path = TinyModel("llama", head_dim=32).write(home / "tiny.gguf")
    executor = NativeExecutor(path, home=home, kv_cache_bytes=2 << 20, swap_space_bytes=2 << 20)
    yield executor
    executor.close()


class Answer(NamedTuple):
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None


def serve(
    executor: NativeExecutor, requests: list[tuple[int, Request]], **more: Any
) -> dict[str, Answer]:
    """Submit each request before the step of its number, and serve all of them."""
    defaults = {"num_blocks": executor.num_blocks, "num_swap_blocks": executor.num_swap_blocks}
    config = SchedulerConfig(
        block_size=executor.block_size,
        max_model_len=executor.max_model_len,
        **(defaults | more),
    )
    engine = Engine(executor, PriorityScheduler(config=config))
    results = {request.request_id: RequestOutput.of(request) for _, request in requests}
    waiting = sorted(requests, key=lambda pair: pair[0])
    number = 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= number:
            engine.submit(waiting.pop(0)[1])
        for output in engine.step():
            assert output.error is None
            results[output.request_id].extend(output)
        invariants.check(engine.scheduler)
        number += 1
    assert engine.scheduler.statistics().blocks.held == 0
    return {
        name: Answer(
            result.outputs[0].token_ids, result.outputs[0].logprobs, result.prompt_logprobs
        )
        for name, result in results.items()
    }


PROMPT = [(7 * at + at * at // 5) % 160 for at in range(140)]

params_of_all_kinds = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([0.8, 1.0]),
    top_k=st.sampled_from([0, 20]),
    seed=st.integers(0, 9),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.dictionaries(st.integers(0, 159), st.floats(-5, 5), max_size=3),
    logprobs=st.sampled_from([None, 0, 4]),
    prompt_logprobs=st.sampled_from([None, 0, 4]),
)


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[int, int, int, SamplingParams]]:
    """Requests as (step before which they come, priority, prompt tokens, parameters)."""
    return [
        (
            draw(st.integers(0, 20)),
            draw(st.integers(0, 2)),
            draw(st.integers(1, len(PROMPT))),
            draw(params_of_all_kinds),
        )
        for _ in range(draw(st.integers(1, 5)))
    ]


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    load=loads(),
    mode=st.sampled_from(list(PreemptionMode)),
    budget=st.sampled_from([13, 32, 64]),
    num_seqs=st.integers(1, 3),
)
def test_all_of_an_answer_is_the_same_alone_and_under_load(
    tiny: NativeExecutor,
    load: list[tuple[int, int, int, SamplingParams]],
    mode: PreemptionMode,
    budget: int,
    num_seqs: int,
) -> None:
    def request(index: int) -> Request:
        _, priority, length, params = load[index]
        return Request(f"r{index}", priority, PROMPT[:length], sampling_params=params)

    together = serve(
        tiny,
        [(load[index][0], request(index)) for index in range(len(load))],
        num_blocks=7,
        num_swap_blocks=6,
        preemption_mode=mode,
        max_num_batched_tokens=budget,
        max_num_seqs=num_seqs,
    )
    for index in range(len(load)):
        alone = serve(tiny, [(0, request(index))])
        assert together[f"r{index}"] == alone[f"r{index}"]


def test_logprobs_do_not_depend_on_how_tokens_are_chosen(tiny: NativeExecutor) -> None:
    plain = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)
    other = SamplingParams(
        max_tokens=1, temperature=3.0, seed=1, presence_penalty=2.0, top_k=5, logprobs=5
    )
    first = serve(tiny, [(0, Request("a", prompt=PROMPT, sampling_params=plain))])["a"]
    second = serve(tiny, [(0, Request("a", prompt=PROMPT, sampling_params=other))])["a"]
    assert first.logprobs is not None and second.logprobs is not None
    assert first.logprobs[0].top == second.logprobs[0].top
    assert second.logprobs[0].token_id in dict(first.logprobs[0].top)


def test_a_prompt_s_logprobs_are_those_its_tokens_had_when_they_were_generated(
    tiny: NativeExecutor,
) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, logprobs=2)
    generated = serve(tiny, [(0, Request("a", prompt=PROMPT[:50], sampling_params=params))])["a"]
    echo = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    whole = PROMPT[:50] + generated.token_ids
    echoed = serve(tiny, [(0, Request("b", prompt=whole, sampling_params=echo))])["b"]
    assert generated.logprobs is not None and echoed.prompt_logprobs is not None
    for before, after in zip(generated.logprobs, echoed.prompt_logprobs[50:], strict=True):
        assert after is not None
        assert after.token_id == before.token_id
        # Prefill and decode differ in the last bits.
        assert after.logprob == pytest.approx(before.logprob, abs=0.1)


def test_a_frequency_penalty_ends_a_loop(tiny: NativeExecutor) -> None:
    def repeats(**more: Any) -> int:
        params = SamplingParams(max_tokens=60, temperature=0.0, **more)
        request = Request("a", prompt=PROMPT[:20], sampling_params=params)
        token_ids = serve(tiny, [(0, request)])["a"].token_ids
        return len(token_ids) - len(set(token_ids))

    assert repeats(frequency_penalty=2.0, presence_penalty=2.0) < repeats()


@pytest.mark.model
def test_the_model_finds_sense_likelier_than_nonsense(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, prompt_logprobs=1)
    sense, nonsense = llm.generate(
        ["The capital of France is Paris.", "The capital France Paris of is."], params
    )

    def total(output: RequestOutput) -> float:
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        return sum(rated.logprob for rated in output.prompt_logprobs if rated is not None)

    assert total(sense) > total(nonsense) + 5
    (rated,) = sense.outputs[0].logprobs or []
    assert rated.top[0] == (sense.outputs[0].token_ids[0], rated.logprob)
    assert sum(math.exp(logprob) for _, logprob in rated.top) <= 1 + 1e-6


@pytest.mark.model
def test_an_echo_is_the_same_in_any_company(llm: LLM) -> None:
    text = "Queues form because arrivals and service times vary. " * 12
    params = SamplingParams(
        max_tokens=12, temperature=0.8, seed=1, logprobs=3, prompt_logprobs=3, presence_penalty=0.4
    )
    (alone,) = llm.generate(text, params)
    assert alone.metrics is not None
    together = llm.generate(
        [f"{number} apples" for number in range(5)] + [text] + ["Once upon a time"],
        [SamplingParams(max_tokens=20, temperature=0.0)] * 5 + [params, SamplingParams(seed=4)],
        priority=[0, 1, 2, 0, 1, 3, 0],
    )[5]
    assert together.outputs[0].token_ids == alone.outputs[0].token_ids
    assert together.outputs[0].logprobs == alone.outputs[0].logprobs
    assert together.prompt_logprobs == alone.prompt_logprobs
    assert together.prompt_logprobs is not None
    assert len(together.prompt_logprobs) == len(together.prompt_token_ids) > 100
