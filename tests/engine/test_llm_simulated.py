"""Offline use without a model: requests that fail, a short queue, chat templates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest

from headway.core.errors import InternalError, InvalidRequest, QueueFull
from headway.core.request import Request, RequestStatus, SamplingParams
from headway.engine.config import ExecutorSettings, Progress
from headway.engine.llm import LLM
from headway.executor.base import Executor
from headway.executor.simulated import SimulatedExecutor, TokenChoice, VirtualClock

MakeLLM = Callable[..., LLM]


def alphabet(request_id: str, position: int) -> int:
    return ord("a") + position % 26


@pytest.fixture
def make_llm(byte_model: Path) -> Iterator[MakeLLM]:
    """``make_llm(sampler, **settings)``: every request goes on with the alphabet."""
    llms: list[LLM] = []

    def make(sampler: TokenChoice = alphabet, **settings: Any) -> LLM:
        def executor(settings: ExecutorSettings, progress: Progress | None) -> Executor:
            return SimulatedExecutor(
                VirtualClock(), num_blocks=200, block_size=4, max_model_len=400, sampler=sampler
            )

        llm = LLM(str(byte_model), executor=executor, **settings)
        llms.append(llm)
        return llm

    yield make
    for llm in llms:
        assert not llm.engine.has_work
        assert llm.engine.scheduler.block_manager.statistics().held == 0
        llm.close()


def greedy(max_tokens: int = 4, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)


# --- requests that fail ---------------------------------------------------------------------------


def test_a_request_that_fails_costs_the_others_nothing(make_llm: MakeLLM) -> None:
    def fails_once(request_id: str, position: int) -> int:
        if (request_id, position) == ("llm-3", 7):
            raise InternalError("the logits are not numbers")
        return alphabet(request_id, position)

    llm = make_llm(fails_once, max_num_seqs=4)
    outputs = llm.generate(["12345"] * 10, greedy(5))
    failed = outputs.pop(3)
    assert [output.outputs[0].text for output in outputs] == ["fghij"] * 9
    assert all(
        output.error is None and output.outputs[0].finish_reason == "length" for output in outputs
    )
    assert (failed.finished, failed.outputs[0].finish_reason) == (True, "abort")
    assert failed.outputs[0].text == "fg"
    assert isinstance(failed.error, InternalError)
    assert str(failed.error) == "the logits are not numbers"
    # The engine goes on.
    assert llm.generate("12345", greedy(3))[0].outputs[0].text == "fgh"


def test_a_request_that_others_displace_has_the_refusal_beside_it(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_seqs=1, max_num_queued_reqs=2)

    def submitted(index: int) -> Request:
        return Request(f"rival{index}", -1, [1, 2], sampling_params=greedy(2))

    rivals = [submitted(index) for index in range(3)]
    for request in rivals:
        llm.engine.submit(request)
    (output,) = llm.generate("12345", greedy(2), priority=5)
    assert isinstance(output.error, QueueFull)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "rejected")
    while llm.engine.has_work:
        llm.engine.step()
    assert all(rival.status is RequestStatus.FINISHED_LENGTH_CAPPED for rival in rivals)


def test_what_is_wrong_with_a_prompt_is_said_before_anything_runs(make_llm: MakeLLM) -> None:
    sampled: list[str] = []

    def note(request_id: str, position: int) -> int:
        sampled.append(request_id)
        return alphabet(request_id, position)

    llm = make_llm(note)
    with pytest.raises(InvalidRequest, match="has token id 999"):
        llm.generate(["fine", [1, 999]], greedy())
    assert not sampled


# --- a short queue --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits", [{"max_num_queued_reqs": 1}, {"max_num_queued_reqs": 3}, {"max_queued_tokens": 12}]
)
def test_prompts_come_no_faster_than_the_queue_takes_them(
    make_llm: MakeLLM, limits: dict[str, int]
) -> None:
    """And all slots are used, however short the queue is."""
    widths: list[int] = []
    llm = make_llm(max_num_seqs=8, **limits)
    llm.engine.listeners.append(lambda step, _: widths.append(len(step.output)))
    outputs = llm.generate(["12345"] * 40, greedy(20))
    assert [output.error for output in outputs] == [None] * 40
    assert [output.outputs[0].text for output in outputs] == ["fghijklmnopqrstuvwxy"] * 40
    assert max(widths) == 8


def test_more_prompts_than_the_ring_takes_at_once(make_llm: MakeLLM) -> None:
    outputs = make_llm().generate(["12345"] * 3000, greedy(1))
    assert [output.outputs[0].text for output in outputs] == ["f"] * 3000


# --- chat -----------------------------------------------------------------------------------------


def test_a_chat_template_is_compiled_once(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    from_string = jinja2.Environment.from_string

    def note(environment: jinja2.Environment, source: str) -> jinja2.Template:
        compiled.append(source)
        return from_string(environment, source)

    monkeypatch.setattr(jinja2.Environment, "from_string", note)
    llm = make_llm()
    questions = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    outputs = llm.chat(questions, greedy(1)) + llm.chat(questions[0], greedy(1))
    assert [bytes(output.prompt_token_ids) for output in outputs] == [
        b"user: one\nassistant: ",
        b"user: two\nassistant: ",
        b"user: three\nassistant: ",
        b"user: one\nassistant: ",
    ]
    assert len(compiled) == 1
