"""Settings: refused before anything is loaded, and arriving where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import BYTE_VOCAB_SIZE

from headway.core.config import PreemptionMode
from headway.core.errors import ConfigError, DamagedModel, UnknownModel
from headway.core.policy import AgingPolicy
from headway.core.request import SamplingParams
from headway.engine.config import EngineConfig, ExecutorSettings, Progress
from headway.engine.llm import LLM
from headway.executor.base import Executor
from headway.executor.simulated import SimulatedExecutor, VirtualClock


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0, must be an integer of at least 1"),
        ({"max_num_seqs": 2.5}, "max_num_seqs is 2.5, must be an integer of at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0, must be an integer of at"),
        ({"max_model_len": 1}, "max_model_len is 1, must be an integer of at least 2"),
        ({"max_step_ms": 0}, "max_step_ms is 0, must be above 0"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs is 0, must be at least 1"),
        ({"scheduling_policy": "best"}, "scheduling policy is 'best', must be one of fcfs, pri"),
        ({"preemption_mode": "kill"}, "preemption_mode is 'kill', must be one of none, pause,"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(UnknownModel, match="gpt-17"):
        EngineConfig(model="gpt-17").build()


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF, more or less")
    with pytest.raises(DamagedModel, match=r"broken\.gguf"):
        EngineConfig(model=path).build()


def test_an_executor_of_another_kind_is_built_from_the_same_settings(byte_model: Path) -> None:
    built: list[ExecutorSettings] = []
    stages: list[tuple[str, float]] = []

    def simulated(settings: ExecutorSettings, progress: Progress | None) -> Executor:
        built.append(settings)
        if progress is not None:
            progress("simulate", 1.0)
        assert settings.max_model_len is not None
        return SimulatedExecutor(
            VirtualClock(),
            num_blocks=100,
            block_size=4,
            max_model_len=settings.max_model_len,
            sampler=lambda _, position: ord("a") + position % 26,
        )

    llm = LLM(
        str(byte_model),
        executor=simulated,
        progress=lambda stage, fraction: stages.append((stage, fraction)),
        max_num_seqs=3,
        max_model_len=40,
        kv_cache_bytes=5000,
        swap_space_bytes=0,
        num_threads=2,
    )
    assert built == [
        ExecutorSettings(
            model_path=byte_model,
            vocab_size=BYTE_VOCAB_SIZE,
            max_num_seqs=3,
            max_model_len=40,
            kv_cache_bytes=5000,
            swap_space_bytes=0,
            num_threads=2,
            max_num_batched_tokens=256,
            precision="int8",
        )
    ]
    assert stages == [("simulate", 1.0)]
    config = llm.engine.scheduler.config
    assert (config.num_blocks, config.block_size, config.max_model_len) == (100, 4, 40)
    (output,) = llm.generate("ab", SamplingParams(max_tokens=3))
    assert output.outputs[0].text == "cde"
    llm.close()


@pytest.mark.model
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 100_000}, "max_model_len is 100000, the model's context is 8192"),
        ({"kv_cache_bytes": 1000}, "kv_cache_bytes is 1,000, a single block of 32 tokens takes"),
        ({"num_threads": 0}, "num_threads is 0, must be at least 1"),
    ],
)
def test_what_only_the_model_can_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings).build()
    assert str(caught.value).startswith(message)


@pytest.mark.model
def test_settings_arrive() -> None:
    stages: set[str] = set()
    llm = LLM(
        progress=lambda stage, fraction: stages.add(stage),
        scheduling_policy=AgingPolicy(tau=7.0),
        preemption_mode="swap",
        max_num_seqs=3,
        max_num_batched_tokens=50,
        max_model_len=1000,
        kv_cache_bytes=20_000_000,
        swap_space_bytes=10_000_000,
        enable_prefix_caching=False,
        max_num_queued_reqs=5,
        num_threads=1,
    )
    engine, config = llm.engine, llm.engine.scheduler.config
    bytes_per_block = 20_000_000 / config.num_blocks
    assert engine.scheduler.policy.name == "aging"
    assert config.preemption_mode is PreemptionMode.SWAP
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (3, 50)
    assert (config.max_model_len, engine.executor.max_model_len) == (1000, 1000)
    assert config.num_swap_blocks == pytest.approx(10_000_000 / bytes_per_block, abs=2)
    assert not config.enable_prefix_caching
    assert engine.queue_limits.max_num_reqs == 5
    assert "try" in stages
    # Ten prompts through a queue of five: generate waits for room.
    outputs = llm.generate(["Hello"] * 10)
    assert len(outputs) == 10
    llm.close()
