"""What a loose promise to batch work does to a tight one to urgent requests. Simulated.

Sixteen streams of batch work (priority 10) run in a closed loop, each with prompts of 200 to 2,000
tokens; urgent requests (priority 0) of 64 tokens arrive as a Poisson process. Urgent requests have
been promised a first token within 100 ms. Batch work has been promised nothing, or a first token
within a minute: that must not let its prompts make steps that urgent requests wait for.

The machine is simulated, on a clock of its own, so that every run gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import machine

from headway import Engine, PriorityScheduler, Request, SamplingParams, SchedulerConfig
from headway.core.slo import SLO
from headway.engine.client import StepReport
from headway.engine.metrics import percentile
from headway.engine.outputs import EngineOutput
from headway.executor.simulated import SMALL_CPU_COST, SimulatedExecutor, VirtualClock

URGENT, BATCH = 0, 10
URGENT_SLO, BATCH_SLO = "0:ttft=100ms", "10:ttft=60s"
NUM_STREAMS, BATCH_PROMPTS, BATCH_TOKENS = 16, (200, 2000), 64
URGENT_PROMPT, URGENT_TOKENS, URGENT_RATE = 64, 16, 2.0
NUM_BLOCKS, BLOCK_SIZE = 3000, 32
BUDGETS = (256, 2048)

#: Two classes over one, at most, of the urgent requests' time to first token.
MAX_RATIO = 1.1


class Figures(NamedTuple):
    """Times in ms of simulated time; ``batch_tokens_per_s`` are generated ones."""

    urgent_ttft_p50: float
    urgent_ttft_max: float
    longest_step: float
    batch_tokens_per_s: float
    num_urgent: int


def simulate(slos: Sequence[str], budget: int, seconds: float = 120.0, seed: int = 0) -> Figures:
    """Serve the load for so many seconds under these promises.

    Args:
        slos: as ``--slo`` takes them.
        budget: ``max_num_batched_tokens``.
        seconds: of simulated time.
        seed: of prompts and arrivals.
    """
    clock, chance = VirtualClock(), random.Random(seed)
    executor = SimulatedExecutor(
        clock,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=4096,
        cost_prior=(*SMALL_CPU_COST, 0.0, 0.0),
    )
    config = SchedulerConfig(
        max_num_seqs=64,
        max_num_batched_tokens=budget,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=4096,
        slos=tuple(map(SLO.parse, slos)),
    )
    engine = Engine(executor, PriorityScheduler(config=config), clock=clock)
    ttfts: list[float] = []
    steps: list[float] = []
    num_batch_tokens = count = 0

    def submit(priority: int, num_prompt: int, max_tokens: int, arrival: float) -> None:
        nonlocal count
        count += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        prompt = [chance.randrange(1, 30_000) for _ in range(num_prompt)]
        engine.submit(
            Request(f"{count}", priority, prompt, sampling_params=params, arrival_time=arrival)
        )

    def submit_batch() -> None:
        submit(BATCH, chance.randint(*BATCH_PROMPTS), BATCH_TOKENS, clock())

    def listen(step: StepReport, outputs: Sequence[EngineOutput]) -> None:
        nonlocal num_batch_tokens
        steps.append(step.end - step.start)
        for output in outputs:
            metrics = output.metrics
            if output.is_last and metrics is not None and metrics.priority == BATCH:
                num_batch_tokens += metrics.num_output_tokens
                submit_batch()
            elif output.is_last and metrics is not None and metrics.ttft is not None:
                ttfts.append(metrics.ttft)

    engine.listeners.append(listen)
    for _ in range(NUM_STREAMS):
        submit_batch()
    due = chance.expovariate(URGENT_RATE)
    while clock() < seconds:
        while due <= clock():
            submit(URGENT, URGENT_PROMPT, URGENT_TOKENS, due)
            due += chance.expovariate(URGENT_RATE)
        engine.step()
    return Figures(
        round(1e3 * percentile(ttfts, 50), 1),
        round(1e3 * max(ttfts), 1),
        round(1e3 * max(steps), 1),
        round(num_batch_tokens / clock(), 1),
        len(ttfts),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="of simulated time")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="tokens a step")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"load": {"seconds": arguments.seconds}, "max_ratio": MAX_RATIO}
    is_met = True
    for budget in arguments.budgets:
        one = simulate([URGENT_SLO], budget, arguments.seconds)
        two = simulate([URGENT_SLO, BATCH_SLO], budget, arguments.seconds)
        ratios = (
            two.urgent_ttft_p50 / one.urgent_ttft_p50,
            two.urgent_ttft_max / one.urgent_ttft_max,
        )
        met = max(ratios) <= MAX_RATIO
        is_met = is_met and met
        results[f"{budget} tokens a step"] = {
            "one class": one._asdict(),
            "two classes": two._asdict(),
            "met": met,
        }
    path = machine.write("two_classes", results)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return not is_met
    for budget in arguments.budgets:
        found = results[f"{budget} tokens a step"]
        for name in ("one class", "two classes"):
            print(f"{budget:>5} tokens a step, {name:<12} {found[name]}")
        print("      " + ("met" if found["met"] else "missed") + f" (at most {MAX_RATIO} ×)")
    print(f"written to {path}")
    return not is_met


if __name__ == "__main__":
    sys.exit(main())
