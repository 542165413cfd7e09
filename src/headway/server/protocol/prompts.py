"""From texts and conversations to tokens, without holding up other requests.

Tokenising takes about a microsecond a character, during which the event loop would stand still. So
texts that are long together are tokenised in another thread, and the thread is given back between
slices of them, so that a request of many texts does not keep it from others. A text that cannot fit
into the context is refused without being tokenised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from headway.core.errors import InvalidRequest, RequestTooLong, UnsupportedModel
from headway.engine.chat_template import ChatTemplate
from headway.engine.tokenizer import Tokenizer

__all__ = ["PromptEncoder"]

#: Characters that are tokenised at a time; more are tokenised in another thread.
_SLICE: Final = 4096


class PromptEncoder:
    """Turns what clients send into tokens.

    Args:
        tokenizer: the model's.
        max_tokens: of a prompt and its output.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._template: ChatTemplate | None = None
        #: Why there is no template, if so; texts can be completed without one.
        self._lack = "the model's file has no chat template"
        if tokenizer.chat_template is not None:
            try:
                self._template = ChatTemplate(
                    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token
                )
            except UnsupportedModel as error:
                self._lack = str(error)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """The tokens of each text.

        Raises:
            RequestTooLong: a text certainly has more of them than the context.
        """
        if sum(map(len, texts)) <= _SLICE:
            return self._encode(texts, add_special_tokens)
        await asyncio.to_thread(self._check_lengths, texts)
        tokens: list[list[int]] = []
        for part in _slices(texts):
            tokens += await asyncio.to_thread(self._encode, part, add_special_tokens)
        return tokens

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's turn.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses the messages.
            RequestTooLong: as ``encode``.
        """
        if self._template is None:
            raise InvalidRequest(f"{self._lack}; use /v1/completions")
        text = self._template.render(messages)
        (tokens,) = await self.encode([text], add_special_tokens=False)
        return tokens

    def output_limit(
        self, prompts: Sequence[Sequence[int]], asked: int | None, default: int | None = None
    ) -> int:
        """How many tokens to generate, at most.

        Args:
            prompts: that have the limit in common.
            asked: what the client asks for.
            default: for a client that does not ask, as far as there is room; None = all the room.

        Raises:
            RequestTooLong: the client asks for more than the context has room for.
        """
        longest = max(map(len, prompts))
        room = self.max_tokens - longest
        if asked is None:
            # With no room at all it is the engine that refuses the prompt.
            return max(1, room if default is None else min(default, room))
        if asked > room:
            raise RequestTooLong(
                f"the prompt has {longest} tokens and max_tokens is {asked}; a context has "
                f"{self.max_tokens} tokens"
            )
        return asked

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encode = self.tokenizer.encode
        return [encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def _check_lengths(self, texts: Sequence[str]) -> None:
        longest = max(map(len, texts))
        if longest > self._max_characters:
            raise RequestTooLong(
                f"the prompt has {longest} characters; a context has {self.max_tokens} tokens, "
                f"which stand for at most {self._max_characters}"
            )

    @cached_property
    def _max_characters(self) -> int:
        # A token of so many bytes stands for no more characters.
        longest = max(len(self.tokenizer.token_bytes(n)) for n in range(self.tokenizer.vocab_size))
        return self.max_tokens * longest


def _slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Runs of texts with ``_SLICE`` characters in all, or one text that has more by itself."""
    start = length = 0
    for index, text in enumerate(texts):
        length += len(text)
        if length > _SLICE and index > start:
            yield texts[start:index]
            start, length = index, len(text)
    yield texts[start:]
