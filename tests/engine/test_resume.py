"""Requests that begin in one engine and go on in another as if they had never moved."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

from headway.core.config import SchedulerConfig
from headway.core.errors import InvalidRequest, RequestTooLong
from headway.core.request import Request, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.engine.async_engine import AsyncEngine
from headway.engine.engine import Engine
from headway.engine.llm import LLM
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import Executor
from headway.executor.simulated import SimulatedExecutor, VirtualClock

MakeEngine = Callable[..., Engine]
Drain = Callable[[Engine], list[EngineOutput]]


class Asked(NamedTuple):
    """What a client asked: a request can be made of it in each engine."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    n: int = 1
    priority: int = 0

    def begin(self) -> Request:
        return Request(
            self.request_id, self.priority, self.prompt, sampling_params=self.params, n=self.n
        )

    def resume(self, outputs: Mapping[int, Sequence[int]]) -> Request:
        return Request.resume(
            self.request_id,
            self.priority,
            self.prompt,
            outputs=outputs,
            sampling_params=self.params,
            n=self.n,
        )


class Choice(NamedTuple):
    """Everything that a client gets of a choice, in whatever pieces it came."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None


class Reader:
    """Collects what engines say of requests; goes on with another engine where it stands."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.results = {each.request_id: RequestOutput.of(each.begin()) for each in asked}

    def read(self, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            assert output.error is None
            self.results[output.request_id].extend(output)

    def unfinished(self, request_id: str) -> dict[int, list[int]]:
        """What another engine has to know: the tokens of each choice that goes on."""
        choices = self.results[request_id].outputs
        return {
            choice.index: list(choice.token_ids)
            for choice in choices
            if choice.finish_reason is None
        }

    def choices(self) -> dict[str, list[Choice]]:
        return {
            request_id: [
                Choice(each.text, each.token_ids, each.finish_reason, each.stop_reason)
                for each in result.outputs
            ]
            for request_id, result in self.results.items()
        }


def undisturbed(engine: Engine, asked: Sequence[Asked], drain: Drain) -> dict[str, list[Choice]]:
    """What the requests get in one engine."""
    reader = Reader(asked)
    for each in asked:
        engine.submit(each.begin())
    reader.read(drain(engine))
    return reader.choices()


def moved(
    first: Engine, second: Engine, asked: Sequence[Asked], num_steps: int, drain: Drain
) -> tuple[dict[str, list[Choice]], int]:
    """What they get if all that are unfinished after some steps go on in another engine.

    Also: how many of them had begun.
    """
    reader = Reader(asked)
    for each in asked:
        first.submit(each.begin())
    for _ in range(num_steps):
        reader.read(first.step())
    first.abort_all()
    num_begun = 0
    for each in asked:
        if reader.results[each.request_id].finished:
            continue
        unfinished = reader.unfinished(each.request_id)
        num_begun += any(unfinished.values())
        second.submit(each.resume(unfinished))
    reader.read(drain(second))
    return reader.choices(), num_begun


# --- many, simulated ------------------------------------------------------------------------------

#: Characters of one to four bytes, so that half of the time a request moves inside of one.
_BYTES = "naïve — 日本 🚗🚕 end. ".encode()


def _draws(request_id: str, position: int) -> int:
    """What a byte model with a seed of its own for each choice would say."""
    return _BYTES[(position + 3 * len(request_id)) % len(_BYTES)]


def _make_asked(count: int) -> list[Asked]:
    chance = random.Random(3)
    asked = []
    for index in range(count):
        max_tokens = chance.randint(5, 40)
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=chance.choice([0, 0, max_tokens // 2, max_tokens]),
            temperature=chance.choice([0.0, 1.0]),
            seed=index,
            stop=chance.choice([(), (), ("end",), ("日本", "🚕 e"), (" — 本", "d. n")]),
            stop_token_ids=chance.choice([frozenset(), frozenset({ord(".")})]),
            logprobs=chance.choice([None, 2]),
            prompt_logprobs=chance.choice([None, None, 1]),
            frequency_penalty=chance.choice([0.0, 0.5]),
        )
        prompt = [chance.randrange(256) for _ in range(chance.randint(1, 30))]
        n = chance.choice([1, 1, 1, 2, 5])
        asked.append(Asked(f"r{index}" + "x" * (index % 7), prompt, params, n, index % 4))
    return asked


def _simulated(tokenizer: Tokenizer, **settings: Any) -> Engine:
    """An engine with an executor of its own that checks every block's contents."""
    config = SchedulerConfig(
        **{"num_blocks": 400, "block_size": 4, "eos_token_ids": frozenset({256})} | settings
    )
    clock = VirtualClock()
    executor = SimulatedExecutor(
        clock,
        num_blocks=config.num_blocks,
        block_size=4,
        num_swap_blocks=config.num_swap_blocks,
        max_model_len=config.max_request_tokens,
        sampler=_draws,
        verify=True,
    )
    return Engine(executor, PriorityScheduler(config=config), tokenizer, clock=clock)


@pytest.mark.parametrize("num_steps", [1, 4, 9, 17, 30])
def test_a_hundred_requests_move_and_get_what_they_would_have_got(
    byte_tokenizer: Tokenizer, drain: Drain, num_steps: int
) -> None:
    """Small pools, so that they are preempted on both sides as well."""
    asked = _make_asked(100)
    expected = undisturbed(_simulated(byte_tokenizer, max_num_seqs=64), asked, drain)
    first = _simulated(byte_tokenizer, max_num_seqs=48)
    second = _simulated(
        byte_tokenizer, num_blocks=60, num_swap_blocks=60, max_num_seqs=9, max_num_batched_tokens=31
    )
    found, num_begun = moved(first, second, asked, num_steps, drain)
    assert found == expected
    assert num_begun > (10 if num_steps > 1 else 0)
    assert sum(second.statistics.preemptions.values()) > 0
    reasons = {choice.finish_reason for choices in found.values() for choice in choices}
    assert reasons == {"stop", "length"}


def test_a_group_goes_on_with_the_choices_that_have_not_ended(
    make_engine: MakeEngine, byte_tokenizer: Tokenizer, drain: Drain
) -> None:
    def choose(name: str, position: int) -> int:
        index = int(name.partition("#")[2] or 0)
        return ord(".") if (index, position) == (1, 12) else ord("a") + index

    def engine() -> Engine:
        clock = VirtualClock()
        executor = SimulatedExecutor(
            clock, num_blocks=200, block_size=4, max_model_len=800, sampler=choose, verify=True
        )
        return make_engine(executor=executor, clock=clock)

    params = SamplingParams(max_tokens=20, stop=(".",), seed=5, prompt_logprobs=0)
    asked = [Asked("g", [65] * 9, params, n=3)]
    found, _ = moved(engine(), engine(), asked, 7, drain)
    assert [(choice.text, choice.finish_reason) for choice in found["g"]] == [
        ("a" * 20, "length"),
        ("bbb", "stop"),
        ("c" * 20, "length"),
    ]


def test_a_reader_of_the_second_engine_has_the_whole_text(
    make_engine: MakeEngine, story: str
) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            dash = story.index("—")
            done = list(story[6 : dash + 1].encode())[:-1]  # the dash lacks its last byte
            params = SamplingParams(max_tokens=len(done) + 20, temperature=0.0)
            outputs = [
                (output.new_text, output.outputs[0].text, list(output.outputs[0].token_ids))
                async for output in engine.generate(story[:6], params, "moved", outputs={0: done})
            ]
        new_texts, texts, tokens = zip(*outputs, strict=True)
        assert "".join(new_texts).startswith("— ")
        assert texts[-1] == story[6:dash] + "".join(new_texts)
        assert tokens[-1][: len(done)] == done
        assert len(tokens[-1]) == len(done) + 20
        assert bytes(tokens[-1]).decode() == texts[-1]

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize(
    ("outputs", "more", "error", "message"),
    [
        ({0: [65] * 8}, {}, InvalidRequest, r"resumes with 8 tokens, must be 1 … 7 \(max_tokens"),
        ({0: []}, {"n": 2}, InvalidRequest, r"resumes the choices|resumes with 0 tokens"),
        ({}, {}, InvalidRequest, r"resumes the choices \[\], must be one or more of 0 … 0"),
        ({2: [65]}, {"n": 2}, InvalidRequest, r"the choices \[2\], must be one or more of 0 … 1"),
        ({0: [65, 999]}, {}, InvalidRequest, r"has token id 999, the vocabulary is 0 … 257"),
        ({0: [65] * 7}, {"prompt": "x" * 34}, RequestTooLong, r"has 41 tokens, the context is 40"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(
    make_engine: MakeEngine,
    outputs: dict[int, list[int]],
    more: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    async def test() -> None:
        params = SamplingParams(max_tokens=8, temperature=0.0)
        prompt = more.pop("prompt", "abc")
        async with AsyncEngine(make_engine(max_model_len=40)) as engine:
            with pytest.raises(error, match=message) as caught:
                async for _ in engine.generate(prompt, params, outputs=outputs, **more):
                    pass
        assert "\n" not in str(caught.value)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_request_that_draws_resumes_with_its_seed_or_not_at_all() -> None:
    with pytest.raises(InvalidRequest, match="'r' resumes without its seed"):
        Asked("r", [1], SamplingParams(temperature=1.0)).resume({0: [5]})


# --- with a model ---------------------------------------------------------------------------------


@pytest.mark.model
def test_requests_of_the_real_model_move(llm: LLM, drain: Drain) -> None:
    """Greedy and sampled ones, a group, a penalty that looks at the whole output."""
    questions = ["The capital of France is", "Once upon a time", "日本の首都は", "Emoji: 🚗🚕"]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 11, "top_p": 0.95},
        {"temperature": 1.3, "seed": 12, "repetition_penalty": 1.2, "min_p": 0.01},
        {"temperature": 1.0, "seed": 13, "min_tokens": 12, "stop": ("e", "の")},
    ]
    asked = [
        Asked(
            f"{index}",
            llm.tokenizer.encode(questions[index % 4]),
            SamplingParams(max_tokens=14, **kinds[index // 4 % 4]),
            n=3 if index % 5 == 0 else 1,
        )
        for index in range(8)
    ]
    expected = undisturbed(_model_engine(llm), asked, drain)
    found, num_begun = moved(
        _model_engine(llm), _model_engine(llm, max_num_batched_tokens=19), asked, 6, drain
    )
    assert found == expected
    assert num_begun >= 4


def _model_engine(llm: LLM, **settings: Any) -> Engine:
    executor: Executor = llm.engine.executor
    llm.engine.scheduler.block_manager.reset_prefix_cache()  # another writes into its pool
    config = SchedulerConfig(
        **{"max_num_seqs": 8, "max_num_batched_tokens": 64} | settings,
        num_blocks=executor.num_blocks,
        block_size=executor.block_size,
        eos_token_ids=llm.tokenizer.eos_token_ids,
    )
    return Engine(executor, PriorityScheduler(config=config), llm.tokenizer)
