"""OpenVINO GenAI's continuous batching, by its own step loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
import workload


class OpenVINOGenAI:
    def __init__(self, model: Path) -> None:
        self.pipeline = make_pipeline(model, max(workload.BATCHES))
        self._model = model
        self._ids = itertools.count()

    def about(self) -> dict[str, Any]:
        return {
            "version": openvino_genai.__version__,
            "openvino": ov.__version__,
            "model": self._model.name,
        }

    def steps(self, prompts: workload.Prompts, max_tokens: int) -> Iterator[dict[int, int]]:
        config = greedy(max_tokens)
        handles = [
            self.pipeline.add_request(next(self._ids), ov.Tensor(np.array([prompt])), config)
            for prompt in prompts
        ]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            tokens: dict[int, int] = {}
            for index, handle in enumerate(handles):
                if handle.can_read():
                    (output,) = handle.read().values()
                    tokens[index] = output.generated_ids[-1]
            yield tokens


def make_pipeline(model: Path, max_num_seqs: int) -> Any:
    """A whole prompt of the measurement fits in a step; the cache is larger than is needed."""
    config = openvino_genai.SchedulerConfig()
    config.max_num_batched_tokens = workload.PREFILL_TOKENS
    config.max_num_seqs = max_num_seqs
    config.cache_size = 2  # GB
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = False
    return openvino_genai.ContinuousBatchingPipeline(str(model), config, "CPU")


def greedy(max_tokens: int) -> Any:
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    return config


if __name__ == "__main__":
    workload.main(OpenVINOGenAI)
