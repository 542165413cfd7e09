"""From tokens to text: incremental detokenising, and stop texts."""

from __future__ import annotations

from typing import NamedTuple

from headway.core.request import Request
from headway.engine.tokenizer import IncrementalDetokenizer, Tokenizer

__all__ = ["OutputProcessor", "Settled"]


class Settled(NamedTuple):
    """Text that cannot change any more, and the stop text that ended it, if one did."""

    text: str
    stop: str | None = None


class OutputProcessor:
    """The text of one request. O(length of the new text · stop texts) a token.

    Text that may turn out to be the beginning of a stop text is held back until it is settled.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = request.sampling_params.stop
        #: Text not handed out yet: shorter than the longest stop text.
        self._held = ""

    def append(self, token_id: int) -> Settled:
        """Add a generated token."""
        return self._settle(self._detokenizer.append(token_id))

    def flush(self) -> Settled:
        """The request has ended: whatever was held back is text."""
        settled = self._settle(self._detokenizer.flush())
        if settled.stop is None:
            settled = Settled(settled.text + self._held)
        self._held = ""
        return settled

    def _settle(self, piece: str) -> Settled:
        if not self._stop:
            return Settled(piece)
        text = self._held + piece
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return Settled(text[:at], stop)
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return Settled(text[: len(text) - keep])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
