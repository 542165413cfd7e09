"""All settings of an engine in one place, under vLLM's names, and how to build it from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.cost_model import CostModel
from headway.core.errors import ConfigError, UnsupportedModel
from headway.core.policy import SchedulingPolicy
from headway.core.scheduler import PriorityScheduler
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO
from headway.executor.precision import Precision, check_precision
from headway.models.registry import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from headway.engine.engine import Engine
    from headway.executor.base import Executor

__all__ = ["EngineConfig", "ExecutorFactory", "ExecutorSettings", "Progress"]

#: Told of a stage of starting up and the fraction of it that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """What an executor is built from.

    Attributes:
        model_path: of the model's GGUF file.
        vocab_size: tokens of the file's tokenizer: the executor must not sample any others.
        max_num_seqs: sequences that a step has at most.
        max_model_len: longest context in tokens; None = the model's.
        kv_cache_bytes: size of the KV pool; None = the executor's choice.
        swap_space_bytes: limit of the swap space, 0 for none; None = the executor's choice.
        num_threads: for the computation; None = the executor's choice.
        max_num_batched_tokens: tokens in a step, at most.
        precision: of the activations where they are multiplied.
    """

    model_path: Path
    vocab_size: int
    max_num_seqs: int
    max_model_len: int | None
    kv_cache_bytes: int | None
    swap_space_bytes: int | None
    num_threads: int | None
    max_num_batched_tokens: int
    precision: Precision


#: Builds an executor, and tells of its progress; raises ``ModelError`` or ``ConfigError``.
ExecutorFactory = Callable[[ExecutorSettings, Progress | None], "Executor"]


@dataclass(frozen=True)
class EngineConfig:
    """What to run and how; the defaults suit a small CPU.

    Attributes:
        model: a known name or the path of a ``.gguf`` file.
        scheduling_policy: ``fcfs``, ``priority``, ``aging``, ``deadline``, or a policy object.
        preemption_mode: see ``headway.core.config.PreemptionMode``.
        max_num_seqs: requests in a step, at most.
        max_num_batched_tokens: tokens in a step, at most. Long steps compute no faster than
            these do, and an urgent request waits for the step in flight.
        max_model_len: longest context in tokens; None = the model's.
        kv_cache_bytes: size of the KV pool; None = a quarter of the free memory, as far as
            ``max_num_seqs`` full contexts can use it.
        swap_space_bytes: limit of the swap space; None = the executor's choice, 0 = none.
        enable_prefix_caching: share the blocks of equal prefixes.
        max_step_ms: no step is predicted to take longer; None = no bound.
        slos: what classes of requests have been promised.
        sharing: what less urgent work gets beside more urgent work.
        max_num_queued_reqs: requests that may wait for their first step; of more, the least
            urgent are refused.
        max_queued_tokens: the same for the tokens of their prompts; None = no limit.
        queue_timeout: seconds that a request may wait for its first step; None = no limit.
        num_threads: for the computation; None = one per core.
        precision: of the activations where they are multiplied: ``int8``, the fastest, or
            ``bf16``, which is nearer to float32.
        executor: builds what runs the steps; None = the native executor.
    """

    model: str | os.PathLike[str] = DEFAULT_MODEL
    scheduling_policy: str | SchedulingPolicy = "priority"
    preemption_mode: PreemptionMode | str = PreemptionMode.AUTO
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    swap_space_bytes: int | None = None
    enable_prefix_caching: bool = True
    max_step_ms: float | None = None
    slos: tuple[SLO, ...] = ()
    sharing: SharingRules = field(default_factory=SharingRules)
    max_num_queued_reqs: int = 100_000
    max_queued_tokens: int | None = None
    queue_timeout: float | None = None
    num_threads: int | None = None
    precision: Precision = "int8"
    executor: ExecutorFactory | None = None

    def __post_init__(self) -> None:
        self._scheduler_config(1, 1, 0, self.max_model_len, frozenset())  # refuse before loading
        for name in ("max_num_queued_reqs", "max_queued_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, must be at least 1")
        check_precision(self.precision)
        if self.queue_timeout is not None and not 0 < self.queue_timeout < math.inf:
            raise ConfigError(f"queue_timeout is {self.queue_timeout} s, must be above 0")

    def build(self, progress: Progress | None = None) -> Engine:
        """Fetch, convert and load the model, as far as that has not been done before.

        Raises:
            ModelError: the model is unknown, damaged, not supported, or cannot be fetched.
            ConfigError: a setting is out of the model's range.
        """
        # Help is printed, and settings are refused, without what takes long to import.
        from headway.engine.engine import Engine  # noqa: PLC0415
        from headway.engine.tokenizer import Tokenizer  # noqa: PLC0415

        def download(stage: str, done: int, total: int) -> None:
            if progress is not None and total:
                progress(stage, done / total)

        path = resolve(self.model, download)
        tokenizer = Tokenizer(path)
        make_executor = self.executor or _make_native_executor
        executor = make_executor(
            ExecutorSettings(
                model_path=path,
                vocab_size=tokenizer.vocab_size,
                max_num_seqs=self.max_num_seqs,
                max_model_len=self.max_model_len,
                kv_cache_bytes=self.kv_cache_bytes,
                swap_space_bytes=self.swap_space_bytes,
                num_threads=self.num_threads,
                max_num_batched_tokens=self.max_num_batched_tokens,
                precision=self.precision,
            ),
            progress,
        )
        config = self._scheduler_config(
            executor.num_blocks,
            executor.block_size,
            executor.num_swap_blocks,
            executor.max_model_len,
            tokenizer.eos_token_ids,
        )
        return Engine(
            executor,
            PriorityScheduler(config=config, cost_model=CostModel(executor.cost_prior)),
            tokenizer,
            max_num_queued_reqs=self.max_num_queued_reqs,
            max_queued_tokens=self.max_queued_tokens,
            queue_timeout=self.queue_timeout,
        )

    def _scheduler_config(
        self,
        num_blocks: int,
        block_size: int,
        num_swap_blocks: int,
        max_model_len: int | None,
        eos_token_ids: frozenset[int],
    ) -> SchedulerConfig:
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=block_size,
            num_swap_blocks=num_swap_blocks,
            max_model_len=max_model_len,
            policy=self.scheduling_policy,
            preemption_mode=self.preemption_mode,
            enable_prefix_caching=self.enable_prefix_caching,
            max_step_ms=self.max_step_ms,
            slos=self.slos,
            sharing=self.sharing,
            eos_token_ids=eos_token_ids,
        )


def _make_native_executor(settings: ExecutorSettings, progress: Progress | None) -> Executor:
    # Numpy takes a moment to import; settings are refused and help is printed without it.
    from headway.executor.native import NativeExecutor  # noqa: PLC0415

    executor = NativeExecutor(
        settings.model_path,
        kv_cache_bytes=settings.kv_cache_bytes,
        swap_space_bytes=settings.swap_space_bytes,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        num_threads=settings.num_threads,
        precision=settings.precision,
        progress=progress,
    )
    if executor.vocab_size != settings.vocab_size:
        executor.close()
        raise UnsupportedModel(
            f"{settings.model_path} has {settings.vocab_size} tokens and {executor.vocab_size} "
            "embeddings, must have as many"
        )
    return executor
