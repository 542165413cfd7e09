"""vLLM on a CPU, by its offline engine's step loop."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import workload
from vllm.sampling_params import RequestOutputKind

import vllm


class VLLM:
    def __init__(self, model: Path) -> None:
        llm = vllm.LLM(
            model=str(model),
            dtype=os.environ["VLLM_DTYPE"],
            max_model_len=1024,
            max_num_seqs=max(workload.BATCHES),
            enable_prefix_caching=False,
        )
        self.engine = llm.llm_engine
        self._ids = map(str, itertools.count())

    def about(self) -> dict[str, Any]:
        return {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "dtype": os.environ["VLLM_DTYPE"],
            "preload": [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split(":")],
        }

    def steps(self, prompts: workload.Prompts, max_tokens: int) -> Iterator[dict[int, int]]:
        params = vllm.SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        streams: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            request_id = next(self._ids)
            streams[request_id] = index
            self.engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            yield {
                streams[output.request_id]: output.outputs[0].token_ids[-1]
                for output in self.engine.step()
                if output.outputs[0].token_ids
            }


if __name__ == "__main__":
    workload.main(VLLM)
