"""From tokens to text: what is handed out when, and where a stop text ends it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.request import Request, SamplingParams
from headway.engine.output_processor import OutputProcessor
from headway.engine.tokenizer import Tokenizer


def processor(tokenizer: Tokenizer, *stop: str) -> OutputProcessor:
    params = SamplingParams(stop=stop)
    return OutputProcessor(Request("r", prompt=[1], sampling_params=params), tokenizer)


def feed(one: OutputProcessor, data: bytes) -> tuple[list[str], str | None]:
    """The pieces that come out byte by byte, the last by ``flush``; and the stop text."""
    pieces = []
    for byte in data:
        text, stop = one.append(byte)
        pieces.append(text)
        if stop is not None:
            return pieces, stop
    text, stop = one.flush()
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
    ends = {one: text.find(one) + len(one) for one in stops if one in text}
    if not ends:
        assert (stop, "".join(pieces)) == (None, text)
    else:
        assert stop is not None and ends[stop] == min(ends.values())
        assert "".join(pieces) == text[: text.find(stop)]
