"""Finding stop texts in a text that grows piece by piece, and holding back what may begin one.

All texts are looked for at once by the automaton of Aho and Corasick ("Efficient String Matching:
An Aid to Bibliographic Search", Communications of the ACM 18(6), 1975). A state stands for a
beginning of a stop text: after every character, for the longest beginning that the text ends with.
So what has to be held back is known without looking at the text again.

Where the automaton goes when a character does not continue a beginning is found out depth by depth,
and only down to the depth that the text has reached. Most requests never get beyond the first few
characters of a stop text, and for them long stop texts cost nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Settled", "StopMatcher"]


class Settled(NamedTuple):
    """Text that cannot change any more, and the stop text that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Reads one text, and settles it up to its first stop text.

    Reading n characters takes at most 2n steps, however many stop texts there are and however long
    they are; and, once in its lifetime, at most 2 steps for each character of the stop texts. (The
    text that is held back is copied with every piece, which is no step of the interpreter.)

    Args:
        texts: of at least one character.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # The states are numbered text by text, in sorted order, and the beginning with one more
        # character mostly has the next number. State 0 is the empty beginning.
        #: Of each state, the character that leads to the state of the next number, if one does.
        self._next_character: list[str | None] = [None]
        #: The other ways on: of few states, the state that each character leads to.
        self._branches: dict[int, dict[str, int]] = {}
        #: The states that are whole stop texts.
        self._whole: set[int] = set()
        self._enter(sorted(set(texts)))

        # What is found out depth by depth.
        num_states = len(self._next_character)
        #: Of each state, the state of its longest proper ending that is one; −1: not found out yet.
        self._shorter = array("i", [-1]) * num_states
        #: Of each state, how many of its last characters are the longest beginning that is no whole
        #: stop text yet, or one that another continues.
        self._num_open = array("i", [0]) * num_states
        #: Of each state, how many of its last characters are the longest whole stop text.
        self._num_whole = array("i", [0]) * num_states
        #: The states of the greatest depth that is known, and that depth.
        self._deepest = [0]
        self._depth = 0
        self._shorter[0] = 0

        self._state = 0
        #: Text not settled yet: shorter than the longest stop text.
        self._held = ""

    def append(self, piece: str, *, may_stop: bool = True) -> Settled:
        """Add a piece of text.

        Of the stop texts that are complete with this piece, the one that begins first ends the
        text; of several that begin there, the shortest. Nothing may be added after that.

        Args:
            piece: the next characters.
            may_stop: False passes over stop texts whose last character is in this piece.
        """
        text = self._held + piece
        begin = end = len(text)
        state = self._state
        for position, character in enumerate(piece, len(self._held) + 1):
            state = self._after(state, character)
            if self._shorter[state] < 0:
                self._deepen()
            num_whole = self._num_whole[state]
            if num_whole and position - num_whole < begin:
                begin, end = position - num_whole, position
        if may_stop and begin < end:
            self._state, self._held = 0, ""
            return Settled(text[:begin], text[begin:end])
        num_settled = len(text) - self._num_open[state]
        self._state, self._held = state, text[num_settled:]
        return Settled(text[:num_settled])

    def flush(self) -> str:
        """The text has ended: what was held back is settled."""
        held, self._state, self._held = self._held, 0, ""
        return held

    def _after(self, state: int, character: str) -> int:
        """The state of the longest beginning at the end of ``state`` and ``character``.

        Every state that is left on the way is shorter than the one before, and only one character
        is gained: this is why n characters take at most 2n steps.
        """
        while self._next_character[state] != character:
            branches = self._branches.get(state)
            if branches is not None and character in branches:
                return branches[character]
            if state == 0:
                return 0
            state = self._shorter[state]
        return state + 1

    def _enter(self, texts: list[str]) -> None:
        """Number the states of sorted texts. A few operations for each text."""
        previous, path = "", [0]  # the states of all beginnings of the previous text
        for text in texts:
            num_common = _num_common(previous, text)
            branching, state = path[num_common], len(self._next_character)
            if branching == state - 1:
                self._next_character[branching] = text[num_common]
            else:
                self._branches.setdefault(branching, {})[text[num_common]] = state
            self._next_character += [*text[num_common + 1 :], None]
            path[num_common + 1 :] = range(state, state + len(text) - num_common)
            self._whole.add(path[-1])
            previous = text

    def _deepen(self) -> None:
        """Find out about the states that are one character longer."""
        next_character, branches = self._next_character, self._branches
        self._depth += 1
        states = []
        for parent in self._deepest:
            shorter = self._shorter[parent]
            character = next_character[parent]
            if character is not None:
                states.append(parent + 1)
                self._shorter[parent + 1] = self._after(shorter, character) if parent else 0
            if parent in branches:
                for character, state in branches[parent].items():
                    states.append(state)
                    self._shorter[state] = self._after(shorter, character) if parent else 0
        for state in states:
            shorter = self._shorter[state]
            is_open = next_character[state] is not None or state in branches
            self._num_open[state] = self._depth if is_open else self._num_open[shorter]
            is_whole = state in self._whole
            self._num_whole[state] = self._depth if is_whole else self._num_whole[shorter]
        self._deepest = states


def _num_common(left: str, right: str) -> int:
    """How many characters both begin with; found by bisection."""
    counts = range(1, min(len(left), len(right)) + 1)
    return bisect_left(counts, True, key=lambda count: left[:count] != right[:count])
