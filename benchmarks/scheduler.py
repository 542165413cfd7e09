"""What the scheduler itself costs: no model, only decisions.

256 requests decode, W more wait, at ten priorities, with the prefix cache on; requests finish
and are replaced. Measured: a step (``schedule`` + ``update_from_output``), adding a request,
aborting a random waiting one.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from time import perf_counter

import machine

from headway.core.config import SchedulerConfig
from headway.core.request import Request, SamplingParams
from headway.core.scheduler import PriorityScheduler

RUNNING = 256
PROMPT_TOKENS = 32
BLOCK_SIZE = 16


class Load:
    """A scheduler with 256 running and ``num_waiting`` waiting requests, kept at that."""

    def __init__(self, num_waiting: int, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.count = 0
        self.scheduler = PriorityScheduler(
            config=SchedulerConfig(
                max_num_seqs=RUNNING,
                max_num_batched_tokens=2048,
                num_blocks=RUNNING * 24,
                block_size=BLOCK_SIZE,
            )
        )
        self.add_seconds: list[float] = []
        for _ in range(num_waiting + RUNNING):
            self.add()

    def add(self) -> None:
        self.count += 1
        request = Request(
            f"request-{self.count}",
            priority=self.random.randrange(10),
            prompt_token_ids=[self.random.randrange(50_000) for _ in range(PROMPT_TOKENS)],
            sampling_params=SamplingParams(max_tokens=self.random.randrange(100, 300)),
        )
        start = perf_counter()
        self.scheduler.add_request(request)
        self.add_seconds.append(perf_counter() - start)

    def step(self) -> float:
        """One step and its replacements; returns the seconds that the scheduler took."""
        start = perf_counter()
        output = self.scheduler.schedule()
        scheduled = perf_counter() - start
        sampled = [(100,) if row.seeds else () for row in output]
        start = perf_counter()
        finished = self.scheduler.update_from_output(output, sampled)
        updated = perf_counter() - start
        for _ in finished:
            self.add()
        return scheduled + updated


def measure(num_waiting: int, num_steps: int) -> dict[str, float]:
    """Averages, in ms and µs, with ``num_waiting`` waiting."""
    load = Load(num_waiting)
    for _ in range(100):  # until all 256 decode and their lengths have drifted apart
        load.step()
    load.add_seconds.clear()
    gc.collect()
    gc.freeze()
    steps = [load.step() for _ in range(num_steps)]
    waiting = [request.request_id for request in load.scheduler.waiting_heap]
    victims = load.random.sample(waiting, min(500, len(waiting)))
    start = perf_counter()
    for request_id in victims:
        load.scheduler.abort(request_id)
    abort = (perf_counter() - start) / len(victims)
    load.add_seconds.clear()
    for _ in victims:
        load.add()
    add = sum(load.add_seconds) / len(load.add_seconds)
    gc.unfreeze()
    return {
        "step_ms_mean": round(1e3 * sum(steps) / len(steps), 4),
        "step_ms_median": round(1e3 * sorted(steps)[len(steps) // 2], 4),
        "abort_us": round(1e6 * abort, 3),
        "add_us": round(1e6 * add, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--waiting", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn; medians count")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {waiting: [] for waiting in arguments.waiting}
    for _ in range(arguments.runs):
        for waiting in arguments.waiting:
            runs[waiting].append(measure(waiting, arguments.steps))
    results = {
        str(waiting): {
            name: machine.summary([figures[name] for figures in measured]) for name in measured[0]
        }
        for waiting, measured in runs.items()
    }
    path = machine.write("scheduler", results)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return
    print(f"{'waiting':>9} {'step ms':>9} {'abort µs':>9} {'add µs':>8}   (medians)")
    for name, result in results.items():
        print(
            f"{name:>9} {result['step_ms_mean']['median']:9.3f} "
            f"{result['abort_us']['median']:9.2f} {result['add_us']['median']:8.2f}"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
