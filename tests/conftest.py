"""Engines to test with: one that tells a story in virtual time, and one with the default model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_models import add_byte_tokenizer

from headway.core import invariants
from headway.core.config import SchedulerConfig
from headway.core.request import Request
from headway.core.scheduler import PriorityScheduler
from headway.engine.engine import Clock, Engine
from headway.engine.llm import LLM
from headway.engine.outputs import EngineOutput
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import Executor
from headway.executor.simulated import SimulatedExecutor, VirtualClock

_STORY = (
    "It was a dark and stormy night; the rain fell in torrents — except at occasional intervals. "
)

_CHAT_TEMPLATE = (
    "{% for one in messages %}"
    "{% if one.role == 'tool' %}{{ raise_exception('there are no tools') }}{% endif %}"
    "{{ one.role }}: {{ one.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class CheckedScheduler(PriorityScheduler):
    """A scheduler whose invariants hold after every step, or the step fails."""

    def update_from_output(self, *arguments: Any) -> list[Request]:
        finished = super().update_from_output(*arguments)
        invariants.check(self)
        return finished


#: Builds an engine; see ``make_engine``.
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's file without weights: every byte is a token of the same number; 256 ends a text."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_byte_tokenizer(writer)
    writer.add_chat_template(_CHAT_TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def byte_tokenizer(byte_model: Path) -> Tokenizer:
    """The tokenizer of ``byte_model``."""
    return Tokenizer(byte_model)


@pytest.fixture(scope="session")
def story() -> str:
    """What every request of ``make_engine`` is a beginning of; it repeats itself."""
    return _STORY * 10


@pytest.fixture
def make_engine(story: str, byte_tokenizer: Tokenizer) -> Iterator[MakeEngine]:
    """``make_engine(**settings)``: an engine that goes on with the story, in virtual time.

    The byte at a position of the sequence is that of the story; so a request with the story's
    first k bytes as prompt is answered with what follows. Settings are those of
    ``SchedulerConfig`` and ``Engine``; ``executor`` replaces the simulated one. The executor checks
    every block's contents, the scheduler its invariants, and at the end of the test every engine
    must be idle.
    """
    story_bytes = story.encode()
    engines: list[Engine] = []

    def make(
        *,
        tokenizer: Tokenizer | None = byte_tokenizer,
        clock: Clock | None = None,
        executor: Executor | None = None,
        max_num_queued_reqs: int = 1000,
        max_queued_tokens: int | None = None,
        queue_timeout: float | None = None,
        ingress_capacity: int = 100,
        **settings: Any,
    ) -> Engine:
        defaults: dict[str, Any] = {
            "num_blocks": 200,
            "block_size": 4,
            "eos_token_ids": frozenset({256}),
        }
        config = SchedulerConfig(**(defaults | settings))
        virtual = VirtualClock()
        if executor is None:
            executor = SimulatedExecutor(
                virtual,
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                num_swap_blocks=config.num_swap_blocks,
                max_model_len=config.max_request_tokens,
                sampler=lambda _, position: story_bytes[position % len(story_bytes)],
                verify=True,
            )
        engine = Engine(
            executor,
            CheckedScheduler(config=config),
            tokenizer,
            clock=clock or virtual,
            max_num_queued_reqs=max_num_queued_reqs,
            max_queued_tokens=max_queued_tokens,
            queue_timeout=queue_timeout,
            ingress_capacity=ingress_capacity,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        assert_idle(engine)


@pytest.fixture
def drain() -> Callable[[Engine], list[EngineOutput]]:
    """``drain(engine)`` steps until nobody is left, which must be soon."""

    def drain(engine: Engine) -> list[EngineOutput]:
        outputs: list[EngineOutput] = []
        for _ in range(2000):
            if not engine.has_work:
                return outputs
            outputs += engine.step()
        raise AssertionError(f"unfinished: {engine.scheduler.requests}")

    return drain


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The default model, and room for few: eight slots, chunks of 64, contexts of 512 tokens."""
    llm = LLM(
        max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512, kv_cache_bytes=200_000_000
    )
    yield llm
    assert_idle(llm.engine)
    llm.close()


def assert_idle(engine: Engine) -> None:
    """Nothing is left of the requests that the engine has served."""
    statistics = engine.scheduler.statistics()
    assert not engine.has_work
    assert statistics.blocks.held == 0
    assert statistics.num_swap_blocks_used == 0
    engine.scheduler.block_manager.check()
