"""Headway, by its engine's own step loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import workload

from headway import __version__
from headway.core.request import Request, SamplingParams
from headway.engine.config import EngineConfig


class Headway:
    def __init__(self, model: Path) -> None:
        self.engine = EngineConfig(model=model, max_num_seqs=max(workload.BATCHES)).build()
        self._ids = map(str, itertools.count())

    def about(self) -> dict[str, Any]:
        return {"version": __version__, **self.engine.description.facts}

    def steps(self, prompts: workload.Prompts, max_tokens: int) -> Iterator[dict[int, int]]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        streams: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            request = Request(next(self._ids), prompt=prompt, sampling_params=params)
            streams[request.request_id] = index
            self.engine.submit(request)
        while self.engine.has_work:
            outputs = self.engine.step()
            yield {
                streams[output.request_id]: output.token_ids[-1]
                for output in outputs
                if output.token_ids
            }


if __name__ == "__main__":
    workload.main(Headway)
