"""From texts and conversations to tokens, without holding up everybody else.

Tokenising takes about a microsecond a character, during which the event loop would stand still, so
long texts are tokenised in another thread; and not at all if they cannot fit into the context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from headway.core.errors import InvalidRequest, RequestTooLong, UnsupportedModel
from headway.engine.chat_template import ChatTemplate
from headway.engine.tokenizer import Tokenizer

__all__ = ["PromptEncoder"]

#: Characters; a longer text is tokenised in another thread.
_LONG: Final = 4096


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

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Raises:
            RequestTooLong: it certainly has more of them than the context.
        """
        if len(text) <= _LONG:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._encode_long, text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's turn.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses the messages.
            RequestTooLong: as ``encode``.
        """
        if self._template is None:
            raise InvalidRequest(f"{self._lack}; use /v1/completions")
        return await self.encode(self._template.render(messages), add_special_tokens=False)

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

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > self._max_characters:
            raise RequestTooLong(
                f"the prompt has {len(text)} characters; a context has {self.max_tokens} tokens, "
                f"which stand for at most {self._max_characters}"
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @cached_property
    def _max_characters(self) -> int:
        # A token of so many bytes stands for no more characters.
        longest = max(len(self.tokenizer.token_bytes(n)) for n in range(self.tokenizer.vocab_size))
        return self.max_tokens * longest
