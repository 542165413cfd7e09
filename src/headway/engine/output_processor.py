"""From what the executor says of a request to what its reader gets: text, and ratings in order.

Detokenising is incremental; text that may begin a stop text waits until it is settled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from headway.core.sampling_params import SamplingParams
from headway.engine.stop_matcher import Settled, StopMatcher
from headway.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from headway.executor.base import PromptLogprobs, TokenLogprobs

__all__ = ["OutputProcessor"]

_NO_TEXT: Final = Settled("")


class OutputProcessor:
    """The text of one output. O(length of the new text) a token.

    Text that may turn out to be the beginning of a stop text is held back until it is settled. A
    stop text ends the output only if its last character came after the first ``min_tokens``
    tokens, as in vLLM.

    Args:
        params: of the request.
        tokenizer: None makes no text of tokens.
    """

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
        self._params = params
        self._num_tokens = 0
        #: None until there is text to look for stop texts in: a request that waits needs none.
        self._stop_matcher: StopMatcher | None = None
        #: Of the prompt's tokens, as far as they have been computed; None if not asked for.
        self._prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )

    @classmethod
    def resumed(
        cls, params: SamplingParams, tokenizer: Tokenizer | None, output_token_ids: Iterable[int]
    ) -> tuple[OutputProcessor, Settled]:
        """A processor that goes on after these tokens, which another one was given before.

        O(length of their text).

        Returns:
            The processor, and the text that the other one has handed out: what the new one hands
            out follows it exactly. Its ``stop`` is set if the tokens complete a stop text; then
            the output has ended, and tokens after that are not looked at. The log-probabilities of
            the prompt were handed out with the first token, and are not collected again.
        """
        processor = cls(params, tokenizer)
        pieces = []
        stop = None
        for token_id in output_token_ids:
            processor._prompt_logprobs = None
            piece, stop = processor.append(token_id)
            pieces.append(piece)
            if stop is not None:
                break
        return processor, Settled("".join(pieces), stop)

    def rate_prompt(self, rated: PromptLogprobs) -> None:
        """Add the ratings of a stretch of the prompt, which follows the stretch before."""
        assert self._prompt_logprobs is not None
        assert rated.start == len(self._prompt_logprobs)
        self._prompt_logprobs += rated.tokens

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """The whole prompt's ratings, complete by now; None if taken before, or not asked for."""
        taken, self._prompt_logprobs = self._prompt_logprobs, None
        return taken

    def append(self, token_id: int) -> Settled:
        """Add a generated token."""
        self._num_tokens += 1
        if self._detokenizer is None:
            return _NO_TEXT
        return self._settle(self._detokenizer.append(token_id))

    def flush(self) -> Settled:
        """The output has ended: whatever was held back is text."""
        if self._detokenizer is None:
            return _NO_TEXT
        settled = self._settle(self._detokenizer.flush())
        if settled.stop is None and self._stop_matcher is not None:
            return Settled(settled.text + self._stop_matcher.flush())
        return settled

    def _settle(self, piece: str) -> Settled:
        if not self._params.stop or not piece:
            return Settled(piece)
        if self._stop_matcher is None:
            self._stop_matcher = StopMatcher(self._params.stop)
        may_stop = self._num_tokens > self._params.min_tokens
        return self._stop_matcher.append(piece, may_stop=may_stop)
