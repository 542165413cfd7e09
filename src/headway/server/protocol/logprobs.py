"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from headway.engine.outputs import TokenLogprobs
from headway.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from headway.server.protocol.response_types import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)

__all__ = ["CompletionLogprobsBuilder", "chat_logprobs"]

#: JSON has no −∞; this is OpenAI's word for "very unlikely".
_LEAST: Final = -9999.0


class CompletionLogprobsBuilder:
    """The shape of ``/v1/completions``, piece by piece, with offsets into the whole text.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        #: Of the next token's text.
        self._offset = 0
        self._piece = _empty()

    def add_prompt(
        self, text: str, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None]
    ) -> None:
        """Tokens of the prompt, whose ``text`` comes before the generated one."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=False)
        pieces = [detokenizer.append(token_id) for token_id in token_ids]
        # Tokens that were put before the text have no place in it.
        self._offset = len(text) - sum(map(len, pieces))
        for token_id, piece, logprobs in zip(token_ids, pieces, found, strict=True):
            self._append(token_id, len(piece), logprobs)
        self._offset = len(text)

    def add(self, tokens: Iterable[TokenLogprobs]) -> None:
        """Generated tokens."""
        for token in tokens:
            self._append(token.token_id, len(self._detokenizer.append(token.token_id)), token)

    def take(self) -> CompletionLogprobs:
        """What has been added since the last time."""
        piece, self._piece = self._piece, _empty()
        return piece

    def _append(self, token_id: int, length: int, found: TokenLogprobs | None) -> None:
        piece = self._piece
        piece["tokens"].append(self._spell(token_id))
        piece["text_offset"].append(max(0, self._offset))
        self._offset += length
        if found is None:  # the first token of a prompt has no probability
            piece["token_logprobs"].append(None)
            piece["top_logprobs"].append(None)
        else:
            piece["token_logprobs"].append(_finite(found.logprob))
            ranked = (*found.top, (token_id, found.logprob))
            piece["top_logprobs"].append(
                {self._spell(ranked_id): _finite(logprob) for ranked_id, logprob in ranked}
            )

    def _spell(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return f"bytes:{_escape(data)}"


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprobs]) -> ChatLogprobs:
    """The shape of ``/v1/chat/completions``."""

    def entry(token_id: int, logprob: float) -> TopLogprob:
        data = tokenizer.token_bytes(token_id)
        try:
            token = data.decode()
        except UnicodeDecodeError:
            token = _escape(data)
        return {"token": token, "logprob": _finite(logprob), "bytes": list(data)}

    content: list[TokenLogprob] = [
        {
            **entry(found.token_id, found.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in found.top],
        }
        for found in tokens
    ]
    return {"content": content, "refusal": None}


def _empty() -> CompletionLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _escape(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)
