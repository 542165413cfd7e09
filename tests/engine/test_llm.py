"""Offline use with the default model: prompts in, results out, and an engine that stays usable."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from headway.core.errors import InvalidRequest
from headway.core.request import Request, SamplingParams
from headway.engine.client import StepReport
from headway.engine.llm import LLM, Prompt

pytestmark = pytest.mark.model

CAPITAL = "The capital of France is"


def greedy(max_tokens: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)


def ask(llm: LLM, prompt: str = CAPITAL, **more: Any) -> str:
    (output,) = llm.generate(prompt, greedy(**more))
    return output.outputs[0].text


@pytest.fixture(autouse=True)
def still_serves(llm: LLM) -> Iterator[None]:
    """Whatever a test did, the engine is idle and serves the next one."""
    yield
    assert not llm.engine.has_work
    assert ask(llm, max_tokens=2) == " Paris."


# --- results --------------------------------------------------------------------------------------


def test_a_prompt_is_completed(llm: LLM) -> None:
    (output,) = llm.generate(CAPITAL, greedy(8))
    assert output.finished
    assert output.prompt == CAPITAL
    assert output.prompt_token_ids == llm.tokenizer.encode(CAPITAL)
    (completion,) = output.outputs
    assert completion.text.startswith(" Paris.")
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert (len(completion.token_ids), completion.finish_reason) == (8, "length")
    assert output.metrics is not None
    assert 0 < (output.metrics.ttft or 0) <= (output.metrics.latency or 0)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """Also where they end in another one: by priority, and by length."""
    prompts: list[Prompt] = [
        "One, two, three,",
        CAPITAL,
        llm.tokenizer.encode("A B C D"),
        "Water is",
    ] * 5
    params = [greedy(2 + index % 5) for index in range(20)]
    outputs = llm.generate(prompts, params, priority=[-index for index in range(20)])
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if isinstance(prompt, str):
            assert output.prompt == prompt
        else:
            assert (output.prompt, output.prompt_token_ids) == (None, prompt)
        assert output.priority == -index
        assert output.sampling_params is params[index]
        assert len(output.outputs[0].token_ids) == 2 + index % 5
    texts = [output.outputs[0].text[:3] for output in outputs]
    assert texts == texts[:4] * 5


def test_no_prompts_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_the_most_urgent_ends_first(llm: LLM) -> None:
    """More requests than slots, all alike but for their priority."""
    outputs = llm.generate([CAPITAL] * 12, greedy(4), priority=[12 - n for n in range(12)])
    ends = [output.metrics.finish_time or 0 for output in outputs if output.metrics is not None]
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < ends[0]


def test_chat(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France? One word."}]
    single = llm.chat(question, greedy(8))
    both = llm.chat([question, [{"role": "user", "content": "Say hello."}]], greedy(8))
    assert len(single) == 1
    assert "Paris" in single[0].outputs[0].text
    assert len(both) == 2
    assert both[0].outputs == single[0].outputs
    assert llm.tokenizer.decode(single[0].prompt_token_ids, skip_special_tokens=False).endswith(
        "<|im_start|>assistant\n"
    )
    with pytest.raises(InvalidRequest, match="messages is empty"):
        llm.chat([[]])


# --- where it ends --------------------------------------------------------------------------------


def test_a_stop_text_ends_it_inside_and_across_tokens(llm: LLM) -> None:
    whole = ask(llm, max_tokens=16)
    for begin, end in ((3, 5), (6, 12), (len(whole) - 4, len(whole) - 1)):
        stop = whole[begin:end]
        (output,) = llm.generate(CAPITAL, greedy(16, stop=(stop, "never to be seen")))
        completion = output.outputs[0]
        assert completion.text == whole.partition(stop)[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_text_that_only_looked_like_a_stop_text_is_not_lost(llm: LLM) -> None:
    whole = ask(llm, max_tokens=16)
    assert ask(llm, max_tokens=16, stop=(whole[2:] + " and so on",)) == whole


def test_a_stop_token_ends_it(llm: LLM) -> None:
    (free,) = llm.generate(CAPITAL, greedy(8))
    wanted = free.outputs[0].token_ids[3]
    at = free.outputs[0].token_ids.index(wanted)
    (output,) = llm.generate(CAPITAL, greedy(8, stop_token_ids=frozenset({wanted})))
    completion = output.outputs[0]
    assert completion.token_ids == free.outputs[0].token_ids[: at + 1]
    assert completion.text == llm.tokenizer.decode(completion.token_ids[:-1])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", wanted)


def test_the_end_token_ends_it_unless_told_otherwise(llm: LLM) -> None:
    prompt = llm.render_chat([{"role": "user", "content": "Say hello."}])
    ended, went_on = llm.generate([prompt] * 2, [greedy(60), greedy(60, ignore_eos=True)])
    assert ended.outputs[0].finish_reason == "stop"
    assert ended.outputs[0].stop_reason is None
    assert ended.outputs[0].token_ids[-1] in llm.tokenizer.eos_token_ids
    length = len(ended.outputs[0].token_ids)
    assert length < 60
    assert went_on.outputs[0].token_ids[:length] == ended.outputs[0].token_ids
    assert (len(went_on.outputs[0].token_ids), went_on.outputs[0].finish_reason) == (60, "length")


def test_min_tokens_delays_the_end_token(llm: LLM) -> None:
    """The end token is not chosen before, and the tokens until then are those before it."""
    prompt = llm.render_chat([{"role": "user", "content": "Say hello."}])
    ended, delayed = llm.generate([prompt] * 2, [greedy(60), greedy(60, min_tokens=40)])
    free, late = ended.outputs[0].token_ids, delayed.outputs[0].token_ids
    assert ended.outputs[0].finish_reason == "stop"
    assert len(free) < 40 <= len(late)
    assert late[: len(free) - 1] == free[:-1]
    assert not llm.tokenizer.eos_token_ids & set(late[:39])
    assert (late[-1] in llm.tokenizer.eos_token_ids) == (delayed.outputs[0].finish_reason == "stop")


def test_min_tokens_delays_stop_tokens_and_stop_texts(llm: LLM) -> None:
    (free,) = llm.generate(CAPITAL, greedy(12))
    first = free.outputs[0].token_ids[0]
    stopping = greedy(12, min_tokens=5, stop_token_ids=frozenset({first}))
    (output,) = llm.generate(CAPITAL, stopping)
    assert first not in output.outputs[0].token_ids[:5]
    assert len(output.outputs[0].token_ids) > 5
    text = llm.tokenizer.decode(free.outputs[0].token_ids[:2])
    (output,) = llm.generate(CAPITAL, greedy(12, min_tokens=5, stop=(text,)))
    assert output.outputs[0].token_ids[:5] == free.outputs[0].token_ids[:5]


def test_min_p_of_one_leaves_the_likeliest_token_only(llm: LLM) -> None:
    expected = ask(llm, max_tokens=8)
    wild = SamplingParams(max_tokens=8, temperature=5.0, seed=1)
    tamed = SamplingParams(max_tokens=8, temperature=5.0, seed=1, min_p=1.0)
    first, second = llm.generate([CAPITAL] * 2, [wild, tamed])
    assert first.outputs[0].text != expected
    assert second.outputs[0].text == expected


def test_a_repetition_penalty_keeps_the_model_from_repeating_itself(llm: LLM) -> None:
    """Neither what the prompt has, nor what the output has."""
    prompt = "The sea, the sea, the sea, the sea, the sea,"
    free, penalised = llm.generate(
        [prompt] * 2,
        [greedy(20, ignore_eos=True), greedy(20, ignore_eos=True, repetition_penalty=1.8)],
    )
    known = set(free.prompt_token_ids)
    assert set(free.outputs[0].token_ids) <= known, "the model goes on for ever"
    token_ids = penalised.outputs[0].token_ids
    assert len(set(token_ids)) == len(token_ids)
    assert not known & set(token_ids)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": frozenset({5, 49_152})}, "stop_token_ids of request 'llm-"),
        ({"logit_bias": {49_152: 1.0}}, "logit_bias of request 'llm-"),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused(
    llm: LLM, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(CAPITAL, greedy(4, **params))
    assert message in str(caught.value)
    assert str(caught.value).endswith("has token id 49152, the vocabulary is 0 … 49151")


# --- chance ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.2, seed=7)
    (alone,) = llm.generate(CAPITAL, params)
    crowd = llm.generate(
        ["Once upon a time", CAPITAL, "def main():", CAPITAL, "1 2 3 4 5"],
        [greedy(12), params, SamplingParams(max_tokens=9, seed=3), params, greedy(4)],
        priority=[0, 2, 1, 0, 1],
    )
    other, without = llm.generate(
        [CAPITAL] * 2,
        [
            SamplingParams(max_tokens=10, temperature=1.2, seed=8),
            SamplingParams(max_tokens=10, temperature=1.2),
        ],
    )
    assert crowd[1].outputs == crowd[3].outputs == alone.outputs
    assert other.outputs != alone.outputs
    assert without.outputs != alone.outputs
    # A seed that was drawn is told, so that the text can be had again.
    (again,) = llm.generate(CAPITAL, without.sampling_params)
    assert without.sampling_params.seed is not None
    assert again.outputs == without.outputs


def test_greedy_text_is_the_same_whatever_the_batch(llm: LLM) -> None:
    prompts = [CAPITAL, "Water boils at", "Two plus two is", "My favourite colour is", "Once"]
    alone = [ask(llm, prompt, max_tokens=10) for prompt in prompts]
    together = llm.generate(prompts, greedy(10))
    assert [output.outputs[0].text for output in together] == alone


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "priority", "message"),
    [
        ("", 0, "the prompt is empty, needs at least 1 character"),
        ([CAPITAL, ""], 0, "the prompt is empty, needs at least 1 character"),
        ([[]], 0, "the prompt is empty, needs at least 1 token"),
        ([3], 0, "the prompt is of type int, must be a text or a list of token ids"),
        ([[3, 4.5]], 0, "the prompt holds 4.5, must be a text or token ids"),
        ([[3, 49_152]], 0, "has token id 49152, the vocabulary is 0 … 49151"),
        ([[3, -1]], 0, "must be a text or token ids of 0 … 2**63 − 1"),
        ([[3] * 512], 0, "has 512 tokens, the context is 512 tokens"),
        (CAPITAL, 2**63, "priority of request 'llm-"),
        (CAPITAL, 0.5, "priority of request 'llm-"),
        ([CAPITAL] * 3, [1, 2], "priority has 2 values for 3 prompts"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(
    llm: LLM, prompts: Any, priority: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(prompts, greedy(), priority=priority)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_tokens", [0, -5, 1.5])
def test_max_tokens_must_be_positive(max_tokens: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^max_tokens is {max_tokens}, must be at least 1$"):
        SamplingParams(max_tokens=max_tokens)


def test_parameters_for_each_prompt_must_be_as_many(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling_params has 1 values for 2 prompts$"):
        llm.generate([CAPITAL] * 2, [greedy()])


def test_the_text_ends_where_the_context_does(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("word " * 512)[: 512 - 3]
    (output,) = llm.generate([prompt], greedy(100, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3
    assert output.outputs[0].finish_reason == "length"


def test_requests_submitted_to_the_engine_itself_do_not_disturb(llm: LLM) -> None:
    """They go on beside the prompts, or after them, and take nothing from their results."""
    expected = llm.generate(CAPITAL, greedy(4))[0].outputs[0].text
    other = Request("other", 0, [10, 11, 12], sampling_params=greedy(30))
    llm.engine.submit(other)
    llm.engine.step()
    assert llm.generate(CAPITAL, greedy(4))[0].outputs[0].text == expected
    while llm.engine.has_work:
        llm.engine.step()
    assert other.is_finished


# --- the terminal ---------------------------------------------------------------------------------


def test_ctrl_c_leaves_an_engine_that_can_be_used(llm: LLM) -> None:
    def press(step: StepReport, _: object) -> None:
        if len(step.output) == 8:
            signal.raise_signal(signal.SIGINT)

    llm.engine.listeners.append(press)
    # A process that a shell starts in the background ignores the signal.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([CAPITAL] * 30, greedy(50, ignore_eos=True))
    finally:
        signal.signal(signal.SIGINT, previous)
        llm.engine.listeners.remove(press)
    assert llm.engine.scheduler.block_manager.statistics().held == 0
    assert not llm.engine.scheduler.requests


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("is_terminal", "use_tqdm", "is_shown"),
    [(False, None, False), (True, None, True), (True, False, False)],
)
def test_the_bar_is_for_terminals(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
    use_tqdm: bool | None,
    is_shown: bool,
) -> None:
    stderr = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    llm.generate(CAPITAL, greedy(3), use_tqdm=use_tqdm)
    assert ("generating" in stderr.getvalue()) is is_shown
    assert is_shown or not stderr.getvalue()
    assert not capsys.readouterr().out
