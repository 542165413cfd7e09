"""From tokens to text: what is handed out when, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headway.core.sampling_params import SamplingParams
from headway.engine.output_processor import OutputProcessor
from headway.engine.tokenizer import Tokenizer


def processor(tokenizer: Tokenizer, *stop: str) -> OutputProcessor:
    return OutputProcessor(SamplingParams(stop=stop), tokenizer)


def feed(processor: OutputProcessor, data: Iterable[int]) -> tuple[list[str], str | None]:
    """The pieces that come out token by token, the last by ``flush``; and the stop text."""
    pieces = []
    for token_id in data:
        text, stop = processor.append(token_id)
        pieces.append(text)
        if stop is not None:
            return pieces, stop
    text, stop = processor.flush()
    return [*pieces, text], stop


def test_without_stop_texts_every_piece_comes_at_once(byte_tokenizer: Tokenizer) -> None:
    assert feed(processor(byte_tokenizer), b"abc") == (["a", "b", "c", ""], None)


def test_a_character_comes_when_it_is_complete(byte_tokenizer: Tokenizer) -> None:
    pieces, _ = feed(processor(byte_tokenizer), "a€b".encode())
    assert pieces == ["a", "", "", "€", "b", ""]


def test_half_a_character_at_the_end_is_replaced(byte_tokenizer: Tokenizer) -> None:
    pieces, _ = feed(processor(byte_tokenizer), "a€".encode()[:-1])
    assert "".join(pieces) == "a\ufffd"


def test_what_may_begin_a_stop_text_is_held_back(byte_tokenizer: Tokenizer) -> None:
    pieces, stop = feed(processor(byte_tokenizer, "END"), b"an ENDING")
    assert (pieces, stop) == (["a", "n", " ", "", "", ""], "END")


def test_what_turns_out_not_to_be_one_is_handed_out(byte_tokenizer: Tokenizer) -> None:
    pieces, stop = feed(processor(byte_tokenizer, "END"), b"ENEMY")
    assert (pieces, stop) == (["", "", "EN", "EM", "Y", ""], None)


def test_what_is_held_at_the_end_is_text(byte_tokenizer: Tokenizer) -> None:
    assert feed(processor(byte_tokenizer, "END"), b"an EN") == (
        ["a", "n", " ", "", "", "EN"],
        None,
    )


def test_the_stop_text_that_comes_first_counts(byte_tokenizer: Tokenizer) -> None:
    pieces, stop = feed(processor(byte_tokenizer, "torrents", "rain"), b"the rain in torrents")
    assert ("".join(pieces), stop) == ("the ", "rain")


def test_a_stop_text_of_several_bytes_a_character(byte_tokenizer: Tokenizer) -> None:
    pieces, stop = feed(processor(byte_tokenizer, "—"), "rain — except".encode())
    assert ("".join(pieces), stop) == ("rain ", "—")


@pytest.mark.parametrize("text", ["aab", "aaab", "aaaab", "abaab"])
def test_a_stop_text_that_overlaps_itself(byte_tokenizer: Tokenizer, text: str) -> None:
    pieces, stop = feed(processor(byte_tokenizer, "aab"), text.encode())
    assert ("".join(pieces), stop) == (text.partition("aab")[0], "aab")


@settings(deadline=None)
@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_streaming_gives_what_the_whole_text_would(
    byte_tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    pieces, stop = feed(processor(byte_tokenizer, *stops), text.encode())
    # Of the stop texts, the one whose end is reached first; its text ends where it begins.
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert (stop, "".join(pieces)) == (None, text)
    else:
        assert stop is not None and ends[stop] == min(ends.values())
        assert "".join(pieces) == text[: text.find(stop)]


def test_before_min_tokens_no_stop_text_ends_the_output(byte_tokenizer: Tokenizer) -> None:
    def feed_at_least(min_tokens: int, data: bytes) -> tuple[str, str | None]:
        params = SamplingParams(stop=("END",), min_tokens=min_tokens)
        pieces, stop = feed(OutputProcessor(params, byte_tokenizer), data)
        return "".join(pieces), stop

    assert feed_at_least(0, b"END") == ("", "END")
    # Its last character counts, as in vLLM: it must come after the first min_tokens tokens.
    assert feed_at_least(2, b"END") == ("", "END")
    assert feed_at_least(3, b"END") == ("END", None)
    # What has been passed over is text, and does not end the output later.
    assert feed_at_least(4, b"ENDING") == ("ENDING", None)
    assert feed_at_least(4, b"END THE END") == ("END THE ", "END")


def test_passing_over_a_stop_text_holds_nothing_back(byte_tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("END",), min_tokens=5)
    pieces, _ = feed(OutputProcessor(params, byte_tokenizer), b"END.")
    assert pieces == ["", "", "END", ".", ""]


#: Tokens of the byte tokenizer: a few characters, halves of them, and an end token without text.
token_lists = st.lists(st.sampled_from([*"ab€".encode(), 256]), max_size=25)
stop_texts = st.lists(st.text("ab€\ufffd", min_size=1, max_size=4), max_size=3)


@settings(deadline=None)
@given(tokens=token_lists, stops=stop_texts, min_tokens=st.integers(0, 16))
@example(tokens=[0xE2], stops=["\ufffd"], min_tokens=0)
@example(tokens=list("a€b€".encode()), stops=["b€a", "€b€"], min_tokens=0)
@example(tokens=list(b"abab"), stops=["bab"], min_tokens=3)
def test_a_resumed_output_goes_on_exactly(
    byte_tokenizer: Tokenizer, tokens: list[int], stops: list[str], min_tokens: int
) -> None:
    params = SamplingParams(stop=tuple(stops), min_tokens=min_tokens)
    undisturbed, stop = feed(OutputProcessor(params, byte_tokenizer), tokens)
    num_read = min(len(undisturbed), len(tokens))  # the last piece may be that of the end
    for split in range(num_read + 1):
        processor, before = OutputProcessor.resumed(params, byte_tokenizer, tokens[:split])
        assert before.text == "".join(undisturbed[:split])
        if before.stop is None:
            assert feed(processor, tokens[split:]) == (undisturbed[split:], stop)
        else:
            assert (split, before.stop) == (num_read, stop)


def test_tokens_that_complete_a_stop_text_have_ended_the_output(byte_tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("END",))
    _, before = OutputProcessor.resumed(params, byte_tokenizer, b"an END, and more")
    assert before == ("an ", "END")


def test_a_resumed_output_has_handed_out_the_prompt_s_ratings(byte_tokenizer: Tokenizer) -> None:
    params = SamplingParams(prompt_logprobs=1)
    begun, _ = OutputProcessor.resumed(params, byte_tokenizer, b"")
    assert begun.take_prompt_logprobs() == [None]
    begun, _ = OutputProcessor.resumed(params, byte_tokenizer, b"a")
    assert begun.take_prompt_logprobs() is None


def test_without_a_tokenizer_there_is_no_text() -> None:
    params = SamplingParams(stop=("a",))
    processor, before = OutputProcessor.resumed(params, None, b"a")
    assert before == ("", None)
    assert feed(processor, b"a") == (["", ""], None)
