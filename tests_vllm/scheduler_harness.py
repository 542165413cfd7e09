"""vLLM's scheduler, and requests for it, without a model or an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from bare_model import MAX_MODEL_LEN
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    LoRAConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

BLOCK_SIZE = 16
#: The token that ends the answers of requests that stop at it.
STOP = 1

init_none_hash(sha256)


def make_scheduler(
    cls: type[Scheduler],
    model: Path,
    *,
    headway: dict[str, Any] | None = None,
    num_blocks: int = 1000,
    v2: bool = False,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 512,
    max_loras: int = 0,
    num_speculative_tokens: int = 0,
    kv_transfer_config: KVTransferConfig | None = None,
    is_async: bool | None = None,
    **options: Any,
) -> Scheduler:
    """A scheduler of class ``cls``.

    Args:
        cls: to be made.
        model: see ``bare_model``.
        headway: the plug-in's settings.
        num_blocks: KV blocks that requests may have, of ``BLOCK_SIZE`` tokens.
        v2: schedule for vLLM's newer model runner, which has a row for each running request.
        max_num_seqs: see vLLM.
        max_num_batched_tokens: see vLLM.
        max_loras: adapters in a step; 0 = there are none.
        num_speculative_tokens: drafts for each token; 0 = none.
        kv_transfer_config: see vLLM.
        is_async: what the configuration says; None = that which is for ``cls``.
        options: further ones of vLLM's ``SchedulerConfig``.
    """
    if is_async is None:
        is_async = issubclass(cls, AsyncScheduler)
    model_config = ModelConfig(
        model=str(model), max_model_len=MAX_MODEL_LEN, dtype="bfloat16", skip_tokenizer_init=True
    )
    config = VllmConfig(
        model_config=model_config,
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
        scheduler_config=SchedulerConfig(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            is_encoder_decoder=False,
            policy="priority",
            **options,
        ),
        lora_config=LoRAConfig(max_loras=max_loras, max_lora_rank=8) if max_loras else None,
        kv_transfer_config=kv_transfer_config,
        additional_config={} if headway is None else {"headway": headway},
    )
    # Which vLLM turns off by itself on a CPU.
    config.scheduler_config.async_scheduling = is_async
    if num_speculative_tokens:
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=num_speculative_tokens,
            prompt_lookup_max=2,
            target_model_config=model_config,
            target_parallel_config=config.parallel_config,
        )
    # One block is vLLM's own: what is written there belongs to no request.
    config.cache_config.num_gpu_blocks = num_blocks + 1
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    scheduler = cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=True,
    )
    # vLLM decides by what is installed; the scheduler only reads it.
    scheduler.use_v2_model_runner = v2
    return scheduler


class Lenient(StructuredOutputGrammar):
    """A grammar that accepts everything."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None: ...

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None: ...

    def is_terminated(self) -> bool:
        return False

    def reset(self) -> None: ...


def make_request(
    request_id: str,
    prompt: int | Sequence[int],
    *,
    max_tokens: int = 16,
    priority: int = 0,
    arrival_time: float = 0.0,
    lora: int = 0,
    stops: bool = False,
    resumable: bool = False,
    grammar: Future[StructuredOutputGrammar] | None = None,
    extra_args: dict[str, Any] | None = None,
) -> Request:
    """A request as the engine core makes it.

    Args:
        request_id: its name.
        prompt: its tokens, or how many, unlike those of all other requests.
        max_tokens: of its answer.
        priority: smaller is more urgent.
        arrival_time: in seconds.
        lora: the number of its adapter; 0 = none.
        stops: its answer may end early.
        resumable: it is a session, to which more input may be added.
        grammar: its answer must obey, once this has been compiled.
        extra_args: what the body's ``vllm_xargs`` say.
    """
    if isinstance(prompt, int):
        prompt = random.Random(request_id).choices(range(10, 40_000), k=prompt)
    request = Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=[STOP] if stops else None,
            structured_outputs=StructuredOutputsParams(regex=".*") if grammar else None,
            extra_args=extra_args,
        ),
        pooling_params=None,
        priority=priority,
        arrival_time=arrival_time,
        lora_request=LoRARequest(f"adapter-{lora}", lora, "nowhere") if lora else None,
        resumable=resumable,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )
    if grammar is not None:
        request.structured_output_request.grammar = grammar
    return request
