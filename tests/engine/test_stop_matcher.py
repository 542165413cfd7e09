"""Stop texts: what is found against the definition, and in how many steps."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headway.engine import stop_matcher
from headway.engine.stop_matcher import Settled, StopMatcher

RELAXED = settings(deadline=None, max_examples=500)


class NaiveMatcher:
    """The definition: looks for everything everywhere in the whole text."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)
        self.text = ""
        self.num_settled = 0

    def append(self, piece: str, *, may_stop: bool) -> Settled:
        num_before = len(self.text)
        self.text += piece
        found = [
            (begin, text)
            for text in self.texts
            for begin in range(len(self.text))
            if self.text.startswith(text, begin) and begin + len(text) > num_before
        ]
        if found and may_stop:
            begin, text = min(found)
            return Settled(self.text[self.num_settled : begin], text)
        held = max(
            (
                text[:length]
                for text in self.texts
                for length in range(len(text))
                if self.text.endswith(text[:length])
            ),
            key=len,
            default="",
        )
        num_settled = len(self.text) - len(held)
        settled = Settled(self.text[self.num_settled : num_settled])
        self.num_settled = num_settled
        return settled


#: Few characters, so that texts overlap, contain and continue each other.
stop_texts = st.lists(st.text("ab", min_size=1, max_size=6), max_size=5)
pieces = st.lists(st.tuples(st.text("abc", max_size=8), st.booleans()), max_size=12)


@RELAXED
@given(texts=stop_texts, pieces=pieces)
@example(texts=["b", "abc"], pieces=[("ab", False), ("c", True)])
@example(texts=["ab", "abc"], pieces=[("abc", True)])
@example(texts=["ab", "abab"], pieces=[("ab", False), ("ab", True)])
def test_what_is_settled_is_the_definition_s(
    texts: list[str], pieces: list[tuple[str, bool]]
) -> None:
    naive, matcher = NaiveMatcher(texts), StopMatcher(texts)
    for piece, may_stop in pieces:
        wanted = naive.append(piece, may_stop=may_stop)
        assert matcher.append(piece, may_stop=may_stop) == wanted
        if wanted.stop is not None:
            assert matcher.flush() == ""
            return
    assert matcher.flush() == naive.text[naive.num_settled :]


def test_of_what_a_piece_completes_the_text_that_begins_first_counts() -> None:
    assert StopMatcher(["b", "abc"]).append("xabc") == ("x", "abc")
    matcher = StopMatcher(["b", "abc"])
    assert [matcher.append(piece) for piece in ("xa", "b")] == [("x", None), ("a", "b")]


def test_of_texts_that_begin_at_the_same_place_the_shortest_counts() -> None:
    assert StopMatcher(["abc", "ab", "abcd"]).append("abcd") == ("", "ab")


def test_a_lone_surrogate_is_a_character_like_any_other() -> None:
    assert StopMatcher(["\ud800x", "\ud800y"]).append("a\ud800y") == ("a", "\ud800y")


# ---------------------------------------------------------------------- steps


def count_lines(function: Callable[[], Any]) -> int:
    """How many lines of the matcher's module are executed."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != stop_matcher.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def random_texts(alphabet: str) -> list[str]:
    rng = random.Random(5)
    return ["".join(rng.choices(alphabet, k=1024)) for _ in range(16)]


#: 16 texts of about 1,024 characters, and a text that keeps much of them open.
HARD = {
    "random": (random_texts("abcdefgh"), random_texts("abcdefgh")[0][:-1]),
    "two characters": (random_texts("ab"), random_texts("ab")[3][:-1]),
    "one beginning": (["a" * 1023 + chr(98 + n) for n in range(16)], "a" * 1023),
    "one ending": ([chr(98 + n) + "a" * 1023 for n in range(16)], "b" + "a" * 1022),
    "long ways back": (
        ["a" * 1024, *(chr(99 + n) + "a" * 1022 + "b" for n in range(15))],
        "c" + "a" * 1022 + "x",
    ),
    "periods": ([("a" * n + "b") * (1024 // (n + 1)) for n in range(16)], "ab" * 511),
}


@pytest.mark.parametrize("name", HARD)
def test_the_steps_are_proportional_to_the_text_however_long_the_stop_texts(name: str) -> None:
    texts, text = HARD[name]
    matcher = StopMatcher(texts)

    def read(*pieces: str) -> None:
        for piece in pieces:
            assert matcher.append(piece).stop is None

    # The first time, more is found out about the stop texts: so much for each of their characters.
    num_characters = sum(map(len, texts))
    assert count_lines(lambda: read(*text, "#")) < 30 * num_characters
    # After that, all that counts is the text: 16 lines for each character and 4 for each step.
    for _ in range(3):
        assert count_lines(lambda: read(*text, "#")) < 25 * (len(text) + 1)
        assert count_lines(lambda: read(text, "#")) < 25 * (len(text) + 1)


@pytest.mark.parametrize("name", HARD)
def test_long_stop_texts_that_the_text_does_not_come_near_cost_nothing(name: str) -> None:
    texts, _ = HARD[name]
    # The texts are entered in few steps, each of which may copy a whole one.
    assert count_lines(lambda: StopMatcher(texts)) < 1_000
    matcher = StopMatcher(texts)
    assert count_lines(lambda: matcher.append("#" * 1_000)) < 20 * 1_000
