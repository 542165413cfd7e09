"""Tokens for texts and conversations, long ones too."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from headway.core.errors import InvalidRequest, RequestTooLong
from headway.engine.tokenizer import Tokenizer
from headway.server.prompts import PromptEncoder


def test_short_and_long_texts(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(byte_tokenizer, 10_000)
    for text in ("", "short", "long — " * 1000):
        assert asyncio.run(encoder.encode(text)) == list(text.encode())


def test_a_text_that_cannot_fit_is_not_tokenised(byte_tokenizer: Tokenizer) -> None:
    # The longest spelling is that of "<|end|>".
    encoder = PromptEncoder(byte_tokenizer, 1000)
    assert len(asyncio.run(encoder.encode("x" * 7000))) == 7000
    with pytest.raises(RequestTooLong, match=r"7001 characters.*1000 tokens"):
        asyncio.run(encoder.encode("x" * 7001))


def test_a_conversation(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(byte_tokenizer, 1000)
    tokens = asyncio.run(encoder.encode_chat([{"role": "user", "content": "Hi"}]))
    assert tokens == list(b"user: Hi\nassistant: ")


@pytest.mark.parametrize(
    ("template", "words"), [(None, "no chat template"), ("{% if %}", "cannot be compiled")]
)
def test_a_model_without_a_template_of_use(template: str | None, words: str) -> None:
    bare: Any = SimpleNamespace(chat_template=template, bos_token="", eos_token="")
    with pytest.raises(InvalidRequest, match=f"{words}.*/v1/completions"):
        asyncio.run(PromptEncoder(bare, 10).encode_chat([{"role": "user", "content": "Hi"}]))


def test_the_room_for_output(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(byte_tokenizer, 100)
    prompts = [[1] * 10, [1] * 90]
    assert encoder.output_limit(prompts, None) == 10
    assert encoder.output_limit(prompts, None, 16) == 10
    assert encoder.output_limit(prompts, None, 5) == 5
    assert encoder.output_limit(prompts, 10) == 10
    with pytest.raises(RequestTooLong, match="90 tokens and max_tokens is 11; a context has 100"):
        encoder.output_limit(prompts, 11)
