"""What the plug-in adds to vLLM's scheduler: no model, only decisions. Prints JSON.

Runs in the environment that has vLLM; ``vllm_plugin.py`` starts it. 256 requests decode and 10,000
wait, with the priority policy and the prefix cache on; requests finish and are replaced. vLLM's own
scheduler and the same one with the plug-in take turns, step by step, two steps in flight:

equals: all requests have the same priority.
urgent: now and then two urgent ones arrive, and displace running ones where the plug-in is; only
    the steps after such an arrival count.

The plug-in's own time is what ``schedule`` takes beyond the ``schedule`` of vLLM that it calls.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from headway.vllm.scheduler import HeadwaySchedulerMixin

RUNNING = 256
PROMPT_TOKENS, MAX_TOKENS, URGENT_TOKENS = 32, (100, 300), 4
URGENT_AT_ONCE, URGENT_EVERY = 2, 8
BLOCK_SIZE = 16
NUM_BLOCKS = RUNNING * 32
STEPS_IN_FLIGHT = 2


class VLLMScheduler(AsyncScheduler):
    """vLLM's own, which adds up what its ``schedule`` takes."""

    seconds = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        start = perf_counter()
        output = super().schedule(*args, **kwargs)
        self.seconds += perf_counter() - start
        return output


class PluginScheduler(HeadwaySchedulerMixin, VLLMScheduler):
    """The same with the plug-in around it."""


#: A scheduler's class, and what ``--additional-config`` says for the plug-in.
Kind = tuple[type[VLLMScheduler], dict[str, Any]]


class Load:
    """A scheduler with 256 running and ``num_waiting`` waiting requests, kept at that."""

    def __init__(self, kind: Kind, model: Path, num_waiting: int) -> None:
        scheduler, headway = kind
        config = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=RUNNING,
            max_num_batched_tokens=2048,
            block_size=BLOCK_SIZE,
            scheduling_policy="priority",
            enable_prefix_caching=True,
            additional_config={"headway": headway},
        ).create_engine_config(UsageContext.OPENAI_API_SERVER)
        config.scheduler_config.async_scheduling = True  # off on a CPU, which has no use for it
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        attention = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
        )
        self.scheduler = scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                NUM_BLOCKS, [], [KVCacheGroupSpec(["attention"], attention)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        self._random = random.Random(0)
        self._num_added = 0
        self._num_unfinished = RUNNING + num_waiting
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._fill()

    def step(self, with_urgent: bool = False) -> dict[str, float]:
        """One step and its replacements; returns the seconds of its parts."""
        for _ in range(URGENT_AT_ONCE if with_urgent else 0):
            self._add(0, URGENT_TOKENS)
        self.scheduler.seconds = 0.0
        start = perf_counter()
        output = self.scheduler.schedule()
        scheduled = perf_counter() - start
        own = scheduled - self.scheduler.seconds
        self._in_flight.append((output, self._run(output)))
        updated = 0.0
        if len(self._in_flight) == STEPS_IN_FLIGHT:
            before = self._in_flight.popleft()
            start = perf_counter()
            self.scheduler.update_from_output(*before)
            updated = perf_counter() - start
        self._fill()
        return {"schedule": scheduled, "own time": own, "update_from_output": updated}

    def abort(self, number: int) -> list[float]:
        """Seconds that it takes to abort so many waiting requests, one by one."""
        waiting = [
            name
            for name, request in self.scheduler.requests.items()
            if request.status == RequestStatus.WAITING
        ]
        seconds = []
        for name in self._random.sample(waiting, number):
            start = perf_counter()
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            seconds.append(perf_counter() - start)
        return seconds

    def _fill(self) -> None:
        while len(self.scheduler.requests) < self._num_unfinished:
            self._add(10, self._random.randrange(*MAX_TOKENS))

    def _add(self, priority: int, max_tokens: int) -> None:
        self._num_added += 1
        request = Request(
            f"request-{self._num_added}",
            [self._random.randrange(1000) for _ in range(PROMPT_TOKENS)],
            SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            None,
            priority=priority,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def _run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """What a model would answer: a token for each whose prompt is computed."""
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            names,
            {name: index for index, name in enumerate(names)},
            [[] if self.scheduler.requests[name].is_prefill_chunk else [7] for name in names],
        )


def measure_steps(
    steps_name: str, kinds: dict[str, Kind], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Medians of a step's parts, for each scheduler."""
    loads = {
        name: Load(kind, arguments.model_dir, arguments.waiting) for name, kind in kinds.items()
    }
    for load in loads.values():
        for _ in range(100):  # until all decode and their lengths have drifted apart
            load.step()
    gc.collect()
    gc.freeze()  # as vLLM does when its engine has started
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    for index in range(arguments.steps):
        with_urgent = steps_name == "urgent" and index % URGENT_EVERY == 0
        for name, load in loads.items():
            step = load.step(with_urgent)
            if with_urgent or steps_name == "equals":
                steps[name].append(step)
    gc.unfreeze()
    return {
        name: {
            f"{steps_name}: {part}": statistics.median(step[part] for step in of) for part in of[0]
        }
        for name, of in steps.items()
    }


def measure_aborts(kind: Kind, arguments: argparse.Namespace) -> dict[str, float]:
    """What aborting a waiting request takes."""
    load = Load(kind, arguments.model_dir, arguments.abort_waiting)
    load.step()
    seconds = load.abort(arguments.aborts)
    return {"abort": statistics.median(seconds), "longest abort": max(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, required=True, help="its config.json is enough")
    parser.add_argument("--share", required=True, help="a step time such as 40ms")
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--abort-waiting", type=int, default=100_000)
    parser.add_argument("--aborts", type=int, default=50)
    arguments = parser.parse_args()
    kinds: dict[str, Kind] = {
        "plain": (VLLMScheduler, {}),
        "plug-in": (PluginScheduler, {}),
        f"share {arguments.share}": (PluginScheduler, {"share": arguments.share}),
    }
    equals = measure_steps("equals", kinds, arguments)
    urgent = measure_steps("urgent", kinds, arguments)
    results = {
        name: {**equals[name], **urgent[name], **measure_aborts(kind, arguments)}
        for name, kind in kinds.items()
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
