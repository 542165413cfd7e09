"""What every engine is given to do, and how its speed is read off its steps.

Each engine has a script ``run_….py`` beside this file, which runs in that engine's own environment:
the standard library must do here. The script says how the engine makes its steps, ``main`` does the
rest, so all are measured in the same way:

prefill: one prompt at a time, from handing it in until its first token is out.
decode: the steps in which every stream of the batch gets one token, from one such step's end to the
    last one's. All prompts are in by then; what admitting them cost is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

PREFILL_TOKENS = 512
#: Of a decode's prompts; the timed steps are at contexts from here on.
PROMPT_TOKENS = 128
BATCHES = (1, 8, 16, 64)
#: Of a decode, with all streams in each.
STEPS = 64
#: Of these, the ones before the clock starts: kernels are chosen when a shape is first seen.
SKIPPED_STEPS = 4
#: What a sound model goes on with is known.
CHECK_TOKENS = 12

Prompts = list[list[int]]


class Engine(Protocol):
    """An engine that has loaded the model."""

    def about(self) -> dict[str, Any]:
        """Versions, and the settings that a figure depends on."""
        ...

    def steps(self, prompts: Prompts, max_tokens: int) -> Iterator[dict[int, int]]:
        """Generate greedily for all prompts at once; an end token ends nothing.

        Yields, after each step, the token of each prompt, by its index, that got one.
        """
        ...


def num_threads() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0))


def prefill_rate(engine: Engine, prompt: list[int]) -> float:
    """Tokens a second of one prompt."""
    start = perf_counter()
    end = None
    for tokens in engine.steps([prompt], 1):
        if tokens:
            end = end or perf_counter()
    if end is None:
        raise RuntimeError("no token was generated")
    return len(prompt) / (end - start)


def decode_rate(engine: Engine, prompts: Prompts, num_steps: int = STEPS) -> float:
    """Tokens a second of all streams together."""
    batch = len(prompts)
    ends: list[float] = []
    # The streams that begin first generate a little more, until the others have begun.
    for tokens in engine.steps(prompts, num_steps + batch):
        if len(tokens) == batch:
            ends.append(perf_counter())
    if len(ends) < num_steps:
        raise RuntimeError(f"of {num_steps} steps with all {batch} streams there were {len(ends)}")
    timed = ends[min(SKIPPED_STEPS, num_steps - 2) : num_steps]
    return batch * (len(timed) - 1) / (timed[-1] - timed[0])


def measure(engine: Engine, work: dict[str, Any]) -> dict[str, Any]:
    """All figures: medians over the prompts, or sets of prompts, that ``work`` has of each kind."""
    check = [
        token for tokens in engine.steps([work["check"]], CHECK_TOKENS) for token in tokens.values()
    ]
    warm_up = work["warm up"]
    prefill_rate(engine, warm_up["prefill"])
    decode_rate(engine, warm_up["decode"], num_steps=8)
    prefill = [prefill_rate(engine, prompt) for prompt in work["prefill"]]
    decode = {
        batch: [decode_rate(engine, prompts) for prompts in sets]
        for batch, sets in work["decode"].items()
    }
    return {
        "prefill": statistics.median(prefill),
        "decode": {batch: statistics.median(rates) for batch, rates in decode.items()},
        "check": check,
        "about": engine.about(),
    }


def main(load: Callable[[Path], Engine]) -> None:
    """Be the script of an engine.

    Args:
        load: an engine with the model at a path.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="as this engine reads it")
    parser.add_argument("work", type=Path, help="JSON: prompts as token ids")
    parser.add_argument("output", type=Path, help="the figures as JSON")
    arguments = parser.parse_args()
    work = json.loads(arguments.work.read_text())
    arguments.output.write_text(json.dumps(measure(load(arguments.model), work)))
