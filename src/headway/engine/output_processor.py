"""From what the executor says of a request to what its reader gets: text, and ratings in order.

Detokenising is incremental; text that may begin a stop text waits until it is settled.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from headway.core.request import Request
from headway.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from headway.executor.base import PromptLogprobs, TokenLogprobs

__all__ = ["OutputProcessor", "Settled"]


class Settled(NamedTuple):
    """Text that cannot change any more, and the stop text that ended it, if one did."""

    text: str
    stop: str | None = None


_NO_TEXT: Final = Settled("")


class OutputProcessor:
    """The text of one request. O(length of the new text · stop texts) a token.

    Text that may turn out to be the beginning of a stop text is held back until it is settled.

    Args:
        request: whose it is.
        tokenizer: None makes no text of tokens.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
        self._stop = request.sampling_params.stop
        #: Text not handed out yet: shorter than the longest stop text.
        self._held = ""
        #: Of the prompt's tokens, as far as they have been computed; None if nobody asks.
        self._prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if request.sampling_params.prompt_logprobs is None else [None]
        )

    def rate_prompt(self, rated: PromptLogprobs) -> None:
        """Add a stretch of the prompt, which follows those before it."""
        assert self._prompt_logprobs is not None
        assert rated.start == len(self._prompt_logprobs)
        self._prompt_logprobs += rated.tokens

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Those of the whole prompt, which is computed by now; None if taken, or not asked for."""
        taken, self._prompt_logprobs = self._prompt_logprobs, None
        return taken

    def append(self, token_id: int) -> Settled:
        """Add a generated token."""
        if self._detokenizer is None:
            return _NO_TEXT
        return self._settle(self._detokenizer.append(token_id))

    def flush(self) -> Settled:
        """The request has ended: whatever was held back is text."""
        if self._detokenizer is None:
            return _NO_TEXT
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
