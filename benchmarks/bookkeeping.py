"""What a long queue and curious clients cost the thread that steps. No model.

Streams run in a closed loop and hold all sixty-four slots; eight more of them than there are slots,
so that no slot is ever free for others. In turn, nothing else is there; or 4,096 less urgent
requests are queued behind them, a client asks for one of these every 10 ms, and every few steps
requests arrive for which others are turned away, because the tokens in the queue are limited.

Measured: what the step thread spends on a step outside the executor, which sleeps as long as a
small model would compute, without the interpreter's lock. *In the step* ends when the outputs are
ready; *between executions* is all from one execution's end to the next one's begin: outputs are
handed over, statistics are published, and the event loop takes its turn at the lock.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import machine

from headway.core.config import SchedulerConfig
from headway.core.errors import EngineStopped, QueueFull
from headway.core.request import SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.async_engine import AsyncEngine
from headway.engine.client import StepReport
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput
from headway.executor.base import ModelRunnerOutput
from headway.executor.simulated import SimulatedExecutor, VirtualClock

NUM_SLOTS, NUM_STREAMS, STREAM_PROMPT, STREAM_TOKENS = 64, 72, 32, 200
QUEUED_PROMPT = 16
#: Priorities, most urgent first: the streams, what arrives for a short time, what is queued.
STREAM, NEWCOMER, QUEUED = 0, 5, 10
#: Newcomers at a time, and seconds between two times.
NEWCOMERS, NEWCOMER_INTERVAL = 8, 0.05
QUESTION_INTERVAL = 0.01
#: ms a step, a prefill token, a decoding sequence, a context token.
COST = (4.0, 0.02, 0.05, 0.0)
BLOCK_SIZE, NUM_BLOCKS = 32, 1000

#: ms a step beyond what a step takes with an idle queue, at most.
TARGET_MS = 0.3


class RealTimeExecutor(SimulatedExecutor):
    """A simulated executor whose steps take their time."""

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        started, begin = time.perf_counter(), self.clock()
        result = super().execute(output)
        left = self.clock() - begin - (time.perf_counter() - started)
        time.sleep(max(0.0, left))
        return result


class Bookkeeping:
    """A listener: what steps took outside the executor, in ms, since ``clear``."""

    def __init__(self) -> None:
        self.in_step: list[float] = []
        self.between_executions: list[float] = []
        self._last_end: float | None = None

    def listen(self, step: StepReport, _: Sequence[EngineOutput]) -> None:
        if len(step.output) < NUM_SLOTS:
            self._last_end = None
            return
        computing = step.execute_end - step.execute_start
        self.in_step.append(1e3 * (step.end - step.start - computing))
        if self._last_end is not None:
            self.between_executions.append(1e3 * (step.execute_start - self._last_end))
        self._last_end = step.execute_end

    def clear(self) -> None:
        self.in_step.clear()
        self.between_executions.clear()

    def summary(self) -> dict[str, float]:
        return {
            "in the step ms": statistics.median(self.in_step),
            "between executions ms": statistics.median(self.between_executions),
            "steps": len(self.in_step),
        }


class Load:
    """The streams, and, while it is full, the queue."""

    def __init__(self, client: AsyncEngine, num_queued: int) -> None:
        self.client = client
        self.num_queued = num_queued
        self.num_shed = 0
        self.question_ms: list[float] = []
        self._ids = itertools.count()
        self._queue: set[asyncio.Task[None]] = set()
        #: Ids of the requests that the queue was filled with.
        self._first: list[str] = []

    async def stream(self, index: int) -> None:
        prompt = [1 + index] * STREAM_PROMPT
        max_tokens = 1 + STREAM_TOKENS * (index + 1) // NUM_STREAMS  # out of step
        while True:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            async for _ in self.client.generate(prompt, params, priority=STREAM):
                pass
            max_tokens = STREAM_TOKENS

    def enqueue(self, count: int, priority: int) -> list[str]:
        """Let so many requests queue behind the streams; none of them is ever in a step."""
        request_ids = [f"queued-{next(self._ids)}" for _ in range(count)]
        for request_id in request_ids:
            task = asyncio.create_task(self._wait(request_id, priority))
            self._queue.add(task)
            task.add_done_callback(self._queue.discard)
        return request_ids

    async def _wait(self, request_id: str, priority: int) -> None:
        params = SamplingParams(max_tokens=16, temperature=0.0)
        prompt = [7] * QUEUED_PROMPT
        try:
            async for _ in self.client.generate(prompt, params, request_id, priority=priority):
                pass
        except QueueFull:
            self.num_shed += 1
        except EngineStopped:
            pass  # the benchmark has failed, and says why

    async def fill(self) -> None:
        self._first = self.enqueue(self.num_queued, QUEUED)
        while self.client.statistics.num_waiting < 0.99 * self.num_queued:
            await asyncio.sleep(0.05)

    async def clear(self) -> None:
        for task in list(self._queue):
            task.cancel()
        while self.client.statistics.num_waiting > NUM_STREAMS:
            await asyncio.sleep(0.05)

    async def ask(self) -> None:
        """A question every 10 ms, about requests in the middle of the queue.

        The last ones are turned away; and while the loop was busy with filling the queue, the first
        ones may have found slots that streams had left.
        """
        middle = self._first[self.num_queued // 4 : self.num_queued // 2]
        for request_id in itertools.cycle(middle):
            start = time.perf_counter()
            info = self.client.get_request(request_id)
            self.question_ms.append(1e3 * (time.perf_counter() - start))
            assert info is not None and info.status == "waiting", (request_id, info)
            await asyncio.sleep(QUESTION_INTERVAL)

    async def arrive(self) -> None:
        """Requests for which there is room only if others leave."""
        while True:
            self.enqueue(NEWCOMERS, NEWCOMER)
            await asyncio.sleep(NEWCOMER_INTERVAL)


async def measure(num_queued: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Idle and full queue in turn."""
    executor = RealTimeExecutor(
        VirtualClock(), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=512, cost=COST
    )
    config = SchedulerConfig(
        max_num_seqs=NUM_SLOTS,
        max_num_batched_tokens=256,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=512,
    )
    engine = Engine(
        executor,
        PriorityScheduler(config=config),
        max_queued_tokens=num_queued * QUEUED_PROMPT + (NUM_STREAMS - NUM_SLOTS) * STREAM_PROMPT,
    )
    bookkeeping = Bookkeeping()
    async with AsyncEngine(engine) as client:
        client.add_listener(bookkeeping.listen)
        load = Load(client, num_queued)
        streams = [asyncio.create_task(load.stream(index)) for index in range(NUM_STREAMS)]
        await asyncio.sleep(1.0)
        runs: dict[str, list[dict[str, float]]] = {"idle": [], "full": []}
        num_shed = []
        for _ in range(rounds):
            bookkeeping.clear()
            await asyncio.sleep(seconds)
            runs["idle"].append(bookkeeping.summary())
            await load.fill()
            disturbing = [asyncio.create_task(load.ask()), asyncio.create_task(load.arrive())]
            await asyncio.sleep(0.5)
            bookkeeping.clear()
            load.num_shed = 0
            await asyncio.sleep(seconds)
            runs["full"].append(bookkeeping.summary())
            num_shed.append(load.num_shed)
            for task in disturbing:
                assert not task.done(), task.exception()
                task.cancel()
            await load.clear()
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    results: dict[str, Any] = {
        name: {figure: machine.summary([run[figure] for run in of]) for figure in of[0]}
        for name, of in runs.items()
    }
    results["beyond idle"] = {
        figure: machine.summary(
            [
                full[figure] - idle[figure]
                for idle, full in zip(runs["idle"], runs["full"], strict=True)
            ]
        )
        for figure in ("in the step ms", "between executions ms")
    }
    results["queued"] = num_queued
    results["turned away"] = sum(num_shed)
    results["question ms"] = machine.summary(load.question_ms)
    results["target ms"] = TARGET_MS
    results["met"] = all(each["median"] <= TARGET_MS for each in results["beyond idle"].values())
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queued", type=int, default=4096, help="requests in the queue")
    parser.add_argument("--rounds", type=int, default=5, help="of idle and full; medians count")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments.queued, arguments.rounds, arguments.seconds))
    path = machine.write("bookkeeping", results)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return not results["met"]
    for figure, beyond in results["beyond idle"].items():
        print(
            f"{figure:<24} idle {results['idle'][figure]['median']:.3f}, full "
            f"{results['full'][figure]['median']:.3f}, beyond {beyond['median']:+.3f} "
            f"({beyond['min']:+.3f} … {beyond['max']:+.3f}; target {TARGET_MS})"
        )
    print(
        f"{results['queued']} queued, {results['turned away']} turned away, a question takes "
        f"{results['question ms']['median']:.2f} ms (on the event loop)"
    )
    print(f"written to {path}")
    return not results["met"]


if __name__ == "__main__":
    sys.exit(main())
