"""Tokens for texts and conversations, long ones too."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.errors import InvalidRequest, RequestTooLong
from headway.engine.tokenizer import Tokenizer
from headway.server.protocol.prompts import PromptEncoder


def test_short_and_long_texts(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(byte_tokenizer, 10_000)
    for text in ("", "short", "long — " * 1000):
        assert asyncio.run(encoder.encode([text])) == [list(text.encode())]


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=6))
def test_several_texts_keep_their_order(byte_tokenizer: Tokenizer, lengths: list[int]) -> None:
    encoder = PromptEncoder(byte_tokenizer, 10_000)
    texts = [chr(ord("a") + index) * length for index, length in enumerate(lengths)]
    assert asyncio.run(encoder.encode(texts)) == [list(text.encode()) for text in texts]


def test_the_event_loop_runs_while_many_texts_are_tokenised(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(byte_tokenizer, 10_000)

    async def count_turns() -> int:
        encoding = asyncio.create_task(encoder.encode(["x" * 4096] * 128))
        num_turns = 0
        while not encoding.done():
            await asyncio.sleep(0)
            num_turns += 1
        return num_turns

    assert asyncio.run(count_turns()) > 128, "at least once for each of them"


def test_many_texts_do_not_keep_the_thread_from_others(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(byte_tokenizer, 10_000)

    async def run() -> list[str]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        order: list[str] = []

        async def encode(name: str, texts: list[str]) -> None:
            await encoder.encode(texts)
            order.append(name)

        await asyncio.gather(encode("many", ["x" * 4096] * 128), encode("one", ["x" * 5000]))
        return order

    assert asyncio.run(run()) == ["one", "many"]


def test_a_text_that_cannot_fit_is_not_tokenised(byte_tokenizer: Tokenizer) -> None:
    # The longest spelling is that of "<|end|>".
    encoder = PromptEncoder(byte_tokenizer, 1000)
    assert [len(tokens) for tokens in asyncio.run(encoder.encode(["x" * 7000]))] == [7000]
    with pytest.raises(RequestTooLong, match=r"7001 characters.*1000 tokens"):
        asyncio.run(encoder.encode(["x", "x" * 7001]))


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
