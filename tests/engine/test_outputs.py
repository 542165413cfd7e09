"""What users see grows by what the engine hands out."""

from __future__ import annotations

from headway.core.request import Request, SamplingParams
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.executor.base import TokenLogprobs


def rated(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, ((token_id, -0.5),))


def request(n: int = 1, **params: int) -> Request:
    chosen = SamplingParams(**params)
    return Request("a", prompt=[1, 2], sampling_params=chosen, arrival_time=0.0, n=n)


def test_what_is_new_is_what_came_since_begin() -> None:
    result = RequestOutput.of(request(logprobs=1))
    result.extend(EngineOutput("a", 0, (5,), "a", logprobs=(rated(5),)))
    result.begin()
    assert (result.new_text, result.new_token_ids, result.new_logprobs) == ("", [], [])
    result.extend(EngineOutput("a", 0, (6,), "", logprobs=(rated(6),)))
    result.extend(EngineOutput("a", 0, (7,), "bc", "length", logprobs=(rated(7),), is_last=True))
    assert (result.new_text, result.new_token_ids) == ("bc", [6, 7])
    assert result.new_logprobs == [rated(6), rated(7)]
    (completion,) = result.outputs
    assert (completion.text, completion.token_ids) == ("abc", [5, 6, 7])
    assert completion.logprobs == [rated(5), rated(6), rated(7)]
    assert result.finished


def test_what_a_reader_has_taken_stays_as_it_was() -> None:
    result = RequestOutput.of(request(logprobs=0))
    result.extend(EngineOutput("a", 0, (5,), "a", logprobs=(rated(5),)))
    token_ids, logprobs = result.new_token_ids, result.new_logprobs
    result.begin()
    result.extend(EngineOutput("a", 0, (6,), "b", logprobs=(rated(6),)))
    assert (token_ids, logprobs) == ([5], [rated(5)])


def test_nothing_is_rated_that_was_not_asked_for() -> None:
    result = RequestOutput.of(request())
    result.extend(EngineOutput("a", 0, (5,), "a"))
    assert result.outputs[0].logprobs is None
    assert result.prompt_logprobs is None
    assert result.new_logprobs == []


def test_the_prompt_s_come_once_and_stay() -> None:
    result = RequestOutput.of(request(prompt_logprobs=1))
    assert result.prompt_logprobs is None
    result.extend(EngineOutput("a", 0, (5,), "a", prompt_logprobs=[None, rated(2)]))
    result.begin()
    result.extend(EngineOutput("a", 0, (6,), "b"))
    assert result.prompt_logprobs == [None, rated(2)]


def test_each_choice_has_what_is_new_of_it() -> None:
    result = RequestOutput.of(request(n=3, logprobs=0), "the client's")
    assert (result.request_id, [choice.index for choice in result.outputs]) == (
        "the client's",
        [0, 1, 2],
    )
    result.extend(EngineOutput("a", 2, (5,), "a", logprobs=(rated(5),)))
    result.extend(EngineOutput("a", 0, (6,), "b", "stop", "x", logprobs=(rated(6),)))
    result.extend(EngineOutput("a", 2, (7,), "c", logprobs=(rated(7),)))
    assert result.changed == [2, 0]
    assert [choice.new_text for choice in result.outputs] == ["b", "", "ac"]
    assert (result.new_text, result.new_token_ids) == ("b", [6])
    first, second, third = result.outputs
    assert (first.finish_reason, first.stop_reason) == ("stop", "x")
    assert (second.finish_reason, third.finish_reason, result.finished) == (None, None, False)
    result.begin()
    assert result.changed == []
    assert [choice.new_text for choice in result.outputs] == ["", "", ""]
    result.extend(EngineOutput("a", 1, (8,), "d", "length", logprobs=(rated(8),)))
    assert (result.changed, second.new_token_ids) == ([1], [8])
    result.extend(EngineOutput("a", 2, (), "e", "abort", is_last=True))
    assert (result.changed, result.finished) == ([1, 2], True)
    assert [choice.text for choice in result.outputs] == ["b", "d", "ace"]
    assert [choice.finish_reason for choice in result.outputs] == ["stop", "length", "abort"]
