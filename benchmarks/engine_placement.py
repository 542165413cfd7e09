"""Where the engine is better off on few cores: in a thread of the server's process, or in its own?

thread: ``AsyncEngine`` as it is. The step thread and the event loop share the interpreter's lock;
    inference releases it.
process: the same ``AsyncEngine``, over a pipe to an ``Engine`` in a process of its own. Outputs and
    changes of status are sent once a step, pickled, and the step thread's place is taken by one
    that receives.

In both, a consumer for each stream does what the server does for a chunk: words an event as JSON
and writes it to a socket, which another process reads. Streams run in a closed loop; urgent
requests arrive in between. Each run is a process of its own, and the two ways take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import machine
import psutil
import uvloop

from headway.core.request import Request, SamplingParams
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.async_engine import AsyncEngine
from headway.engine.client import EngineListener, StepReport
from headway.engine.config import EngineConfig
from headway.engine.engine import Engine
from headway.engine.metrics import percentile
from headway.engine.outputs import EngineOutput
from headway.engine.warm_up import warm_up

PLACES = ("thread", "process")
MAX_STEP_MS = 50.0
PROMPT_TOKENS, OUTPUT_TOKENS = 96, 128
URGENT_TOKENS, URGENT_INTERVAL = 4, 0.4
WARM_UP = 5.0


def build() -> Engine:
    engine = EngineConfig(max_step_ms=MAX_STEP_MS).build()
    warm_up(engine)
    return engine


class StepTimes:
    """From the end of a step to the end of the next: nothing is left out."""

    def __init__(self, engine: Engine) -> None:
        self.ends: list[float] = []
        engine.listeners.append(lambda step, _: self.ends.append(step.end))

    def milliseconds(self, start: float, end: float) -> list[float]:
        ends = [moment for moment in self.ends if start <= moment < end]
        return [1e3 * (after - before) for before, after in itertools.pairwise(ends)]


# ---------------------------------------------------------------------------- another process


def run_engine(pipe: Connection) -> None:
    """Serve the other end of the pipe, until it asks for the step times of a window."""
    engine = build()
    times = StepTimes(engine)
    wake = threading.Event()
    engine.on_ingress = wake.set
    engine.listeners.append(lambda step, outputs: pipe.send((step.changes, outputs)))
    window: list[float] = []

    def receive() -> None:
        while not window:
            name, *arguments = pipe.recv()
            if name == "submit":
                request_id, priority, prompt, params = arguments
                engine.submit(Request(request_id, priority, prompt, sampling_params=params))
            elif name == "abort":
                engine.abort(*arguments)
            else:
                window.extend(arguments)
                wake.set()

    threading.Thread(target=receive, daemon=True).start()
    pipe.send((engine.description, engine.statistics))
    while not window:
        wake.clear()
        if engine.has_work:
            engine.step()
        else:
            wake.wait()
    pipe.send(times.milliseconds(*window))
    engine.close()


class RemoteEngine:
    """The part of an ``Engine`` that ``AsyncEngine`` needs here, over a pipe."""

    tokenizer = None

    def __init__(self) -> None:
        self.pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=run_engine, args=(other,), daemon=True)
        self.process.start()
        self.listeners: list[EngineListener] = []
        self.unfinished: set[str] = set()
        #: The first ones: the load asks for no later ones.
        self.description, self.statistics = self.pipe.recv()

    def clock(self) -> float:
        return time.monotonic()

    @property
    def has_work(self) -> bool:
        return bool(self.unfinished)

    def prepare(self, request: Request) -> None:
        """The engine at the other end does it."""

    def enqueue(self, request: Request) -> None:
        self.unfinished.add(request.request_id)
        prompt, params = request.prompt_token_ids, request.sampling_params
        self.pipe.send(("submit", request.request_id, request.priority, prompt, params))
        self.on_ingress()  # set by ``AsyncEngine``

    def abort(self, request_id: str) -> None:
        self.pipe.send(("abort", request_id))

    def step(self) -> list[EngineOutput]:
        changes, outputs = self.pipe.recv()
        self.unfinished -= {output.request_id for output in outputs if output.is_last}
        report = StepReport(SchedulerOutput(), None, 0.0, 0.0, 0.0, 0.0, changes, 0)
        for listener in self.listeners:
            listener(report, outputs)
        return outputs

    def abort_all(self, error: Exception) -> None:
        """Nothing listens any more."""

    def close(self) -> None:
        """The process ends with this one."""

    def milliseconds(self, start: float, end: float) -> list[float]:
        self.pipe.send(("window", start, end))
        while isinstance(message := self.pipe.recv(), tuple):
            pass  # of the last steps
        return message


# ---------------------------------------------------------------------------- the server's side


class Load:
    """Streams in a closed loop, and urgent requests."""

    def __init__(self, engine: AsyncEngine, sockets: list[socket.socket]) -> None:
        self.engine = engine
        self.sockets = sockets
        self.random = random.Random(0)
        self.num_tokens = 0
        self.urgent_ttfts: list[float] = []

    async def stream(self, index: int) -> None:
        _, writer = await asyncio.open_connection(sock=self.sockets[index])
        max_tokens = OUTPUT_TOKENS * (index + 1) // len(self.sockets) + 1  # out of step
        while True:
            await self._complete(max_tokens, 10, writer)
            max_tokens = OUTPUT_TOKENS

    async def arrivals(self) -> None:
        _, writer = await asyncio.open_connection(sock=self.sockets[-1])
        while True:
            await asyncio.sleep(self.random.uniform(0.5, 1.5) * URGENT_INTERVAL)
            self.urgent_ttfts.append(await self._complete(URGENT_TOKENS, 0, writer))

    async def _complete(
        self, max_tokens: int, priority: int, writer: asyncio.StreamWriter
    ) -> float:
        prompt = [self.random.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        start, ttft = time.monotonic(), 0.0
        async for output in self.engine.generate(prompt, params, priority=priority):
            choice = {"text": output.new_text, "index": 0, "finish_reason": None}
            event = {"id": output.request_id, "object": "text_completion", "choices": [choice]}
            writer.write(b"data: %b\n\n" % json.dumps(event).encode())
            self.num_tokens += 1
            ttft = ttft or time.monotonic() - start
        return ttft


async def measure(
    engine: Any, process: psutil.Process, sockets: list[socket.socket], seconds: float
) -> dict[str, Any]:
    """What happens in a window of so many seconds, with a stream for each socket but one."""
    async_engine = AsyncEngine(engine)
    load = Load(async_engine, sockets)
    tasks = [asyncio.create_task(load.stream(index)) for index in range(len(sockets) - 1)]
    tasks.append(asyncio.create_task(load.arrivals()))
    await asyncio.sleep(WARM_UP)
    load.num_tokens = 0
    load.urgent_ttfts.clear()
    own = psutil.Process()
    before = cpu_times(own, process)
    start = time.monotonic()
    await asyncio.sleep(seconds)
    end = time.monotonic()
    cpu = {name: value - before[name] for name, value in cpu_times(own, process).items()}
    result = {
        "tokens/s": load.num_tokens / (end - start),
        "urgent ttft ms p50": 1e3 * percentile(load.urgent_ttfts, 50),
        "urgent ttft ms p99": 1e3 * percentile(load.urgent_ttfts, 99),
        **cpu,
    }
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await async_engine.drain(None)
    await async_engine.shutdown()
    return result | {"window": (start, end)}


def cpu_times(server: psutil.Process, engine: psutil.Process) -> dict[str, float]:
    """Seconds so far; others are the clients, and what disturbs the measurement."""
    total = psutil.cpu_times()
    busy = total.user + total.nice + total.system
    seconds = {"server process CPU s": sum(server.cpu_times()[:2]), "engine process CPU s": 0.0}
    if engine != server:
        seconds["engine process CPU s"] = sum(engine.cpu_times()[:2])
    return seconds | {"others' CPU s": busy - sum(seconds.values())}


def read_all(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """The clients: read and forget, until the server has gone."""
    with selectors.DefaultSelector() as selector:
        for server, client in pairs:
            server.close()
            selector.register(client, selectors.EVENT_READ, client.recv)
        while selector.get_map():
            for key, _ in selector.select():
                if not key.data(1 << 16):
                    selector.unregister(key.fileobj)


def run_one(place: str, streams: int, seconds: float) -> dict[str, float]:
    pairs = [socket.socketpair() for _ in range(streams + 1)]
    multiprocessing.get_context("fork").Process(target=read_all, args=(pairs,), daemon=True).start()
    sockets = [server for server, _ in pairs]
    times: Any
    if place == "thread":
        engine: Any = build()
        times, process = StepTimes(engine), psutil.Process()
    else:
        engine = times = RemoteEngine()
        process = psutil.Process(engine.process.pid)
    result = uvloop.run(measure(engine, process, sockets, seconds))
    steps = times.milliseconds(*result.pop("window"))
    result |= {f"step ms p{rank}": percentile(steps, rank) for rank in (50, 99)}
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each, in turn; medians count")
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--one", choices=PLACES, help="run once in this process, print JSON")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.one, arguments.streams[0], arguments.seconds)))
        return
    results: dict[str, Any] = {}
    for streams in arguments.streams:
        runs: dict[str, list[dict[str, float]]] = {place: [] for place in PLACES}
        for _ in range(arguments.runs):
            for place in PLACES:
                command = [sys.executable, __file__, "--one", place, "--streams", str(streams)]
                command += ["--seconds", str(arguments.seconds)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs[place].append(json.loads(done.stdout))
        results[f"{streams} streams"] = {
            place: {name: machine.summary([run[name] for run in of]) for name in of[0]}
            for place, of in runs.items()
        }
    path = machine.write("engine_placement", results)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return
    for streams_name, places in results.items():
        print(f"{streams_name:<22}" + "".join(f"{place:>10}" for place in places))
        for name in places["thread"]:
            values = "".join(f"{figures[name]['median']:10.2f}" for figures in places.values())
            print(f"  {name:<20}{values}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
