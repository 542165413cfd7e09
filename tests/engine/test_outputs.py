"""What users see grows by what the engine hands out."""

from __future__ import annotations

from headway.core.request import Request, SamplingParams
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.executor.base import TokenLogprobs


def rated(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, ((token_id, -0.5),))


def request(**params: int) -> Request:
    return Request("a", prompt=[1, 2], sampling_params=SamplingParams(**params), arrival_time=0.0)


def test_what_is_new_is_what_came_since_begin() -> None:
    one = request(logprobs=1)
    result = RequestOutput.of(one)
    result.extend(EngineOutput(one, (5,), "a", logprobs=(rated(5),)))
    result.begin()
    assert (result.new_text, result.new_token_ids, result.new_logprobs) == ("", [], [])
    result.extend(EngineOutput(one, (6,), "", logprobs=(rated(6),)))
    result.extend(EngineOutput(one, (7,), "bc", "length", logprobs=(rated(7),)))
    assert (result.new_text, result.new_token_ids) == ("bc", [6, 7])
    assert result.new_logprobs == [rated(6), rated(7)]
    (completion,) = result.outputs
    assert (completion.text, completion.token_ids) == ("abc", [5, 6, 7])
    assert completion.logprobs == [rated(5), rated(6), rated(7)]
    assert result.finished


def test_what_a_reader_has_taken_stays_as_it_was() -> None:
    one = request(logprobs=0)
    result = RequestOutput.of(one)
    result.extend(EngineOutput(one, (5,), "a", logprobs=(rated(5),)))
    token_ids, logprobs = result.new_token_ids, result.new_logprobs
    result.begin()
    result.extend(EngineOutput(one, (6,), "b", logprobs=(rated(6),)))
    assert (token_ids, logprobs) == ([5], [rated(5)])


def test_nothing_is_rated_that_was_not_asked_for() -> None:
    one = request()
    result = RequestOutput.of(one)
    result.extend(EngineOutput(one, (5,), "a"))
    assert result.outputs[0].logprobs is None
    assert result.prompt_logprobs is None
    assert result.new_logprobs == []


def test_the_prompt_s_come_once_and_stay() -> None:
    one = request(prompt_logprobs=1)
    result = RequestOutput.of(one)
    assert result.prompt_logprobs is None
    result.extend(EngineOutput(one, (5,), "a", prompt_logprobs=[None, rated(2)]))
    result.begin()
    result.extend(EngineOutput(one, (6,), "b"))
    assert result.prompt_logprobs == [None, rated(2)]
