"""What many clients cost: the memory of open streams, and the time of a step beside a long queue.

1. Idle streams. Each has begun (its first token is there) and waits, because more urgent streams
   hold every slot. Also, what as many connections cost that have no request. The pool's memory is
   the pool's: it is filled once before, so that it is resident when counting begins.
2. Queued requests wait behind streams in a closed loop that hold every slot. Compared with the same
   load without them, before and after: the time between two tokens of a stream, which is a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from typing import Any

import machine
import uvloop
from openai_load import (
    Background,
    Client,
    Connection,
    Prompts,
    Server,
    allow_open_files,
    serve,
    window,
)

from headway.engine.metrics import percentile

SLOTS = 16
COMMAND = f"headway serve --port {{port}} --max-num-seqs {SLOTS} --kv-cache-bytes 800M"
#: Tokens that fill the pool of that server.
POOL_TOKENS = 36_000

MAX_MEMORY_MB = 200.0
MAX_STEP_CHANGE = 0.05

_STEP_TIME = re.compile(rb"^headway:step_time_seconds_(sum|count)\{[^}]*\} (\S+)$", re.MULTILINE)
_WAITING = re.compile(rb"^\w+:num_requests_waiting\{[^}]*\} (\S+)$", re.MULTILINE)


async def measure_idle(client: Client, server: Server, number: int) -> dict[str, Any]:
    """Memory of ``number`` connections without a request, and of as many idle streams."""
    await client.prepare()
    prompts = Prompts(0)
    await client.complete(prompts.next(POOL_TOKENS % 1000), 16, 0)
    for _ in range(POOL_TOKENS // 1000):
        await client.complete(prompts.next(1000), 1, 0)

    before = server.memory_mb()
    connections = [await client.open("/health") for _ in range(number)]
    await asyncio.gather(*(connection.done.wait() for connection in connections))
    connected = server.memory_mb() - before
    close(connections)

    before = server.memory_mb()
    streams: list[Connection] = []
    for index in range(number):  # each displaces an earlier one
        streams.append(await client.stream(prompts.next(4), 1024, priority=number - index))
        await streams[-1].begun.wait()
    urgent = [await client.stream(prompts.next(4), 1024, priority=0) for _ in range(2 * SLOTS)]
    await asyncio.gather(*(stream.begun.wait() for stream in urgent[:SLOTS]))
    start, _ = await window(3.0)
    memory = server.memory_mb() - before
    num_idle = sum(
        stream.end is None and bool(stream.times) and stream.times[-1] < start for stream in streams
    )
    close(streams + urgent)
    return {
        "idle streams": num_idle,
        "of": number,
        "memory MB": round(memory, 1),
        "connections alone MB": round(connected, 1),
        "server memory MB": round(server.memory_mb(), 1),
        "met": num_idle == number and memory < MAX_MEMORY_MB,
    }


async def measure_queued(client: Client, number: int, seconds: float) -> dict[str, Any]:
    """What ``number`` waiting requests change for the streams that run."""
    await client.prepare()
    prompts = Prompts(1)
    background = Background(client, prompts, num_words=64, max_tokens=128, priority=0)
    background.start(2 * SLOTS)
    await asyncio.sleep(seconds / 2)
    windows = [await observe(client, seconds / 2)]
    queue = [await client.stream(prompts.next(16), 16, priority=10) for _ in range(number)]
    while await num_waiting(client) < number:
        await asyncio.sleep(0.5)
    windows.append(await observe(client, seconds))
    num_begun = sum(bool(stream.times) or stream.end is not None for stream in queue)
    close(queue)
    while await num_waiting(client) > 2 * SLOTS:
        await asyncio.sleep(0.5)
    windows.append(await observe(client, seconds / 2))
    await background.stop()

    steps = []
    for quiet_or_not in ((windows[0], windows[2]), (windows[1],)):
        gaps = [
            after - before
            for start, end, _, _ in quiet_or_not
            for before, after in background.gaps(start, end)
        ]
        computing = sum(seconds for _, _, seconds, _ in quiet_or_not)
        num_steps = sum(number for _, _, _, number in quiet_or_not)
        rate = sum(background.tokens(start, end) for start, end, _, _ in quiet_or_not) / seconds
        steps.append(
            {
                "gap p50 ms": round(1e3 * percentile(gaps, 50), 3),
                "gap mean ms": round(1e3 * sum(gaps) / len(gaps), 3),
                "gap p99 ms": round(1e3 * percentile(gaps, 99), 3),
                "computing a step, mean ms": round(1e3 * computing / max(num_steps, 1), 3),
                "tokens/s": round(rate, 1),
            }
        )
    change = steps[1]["gap p50 ms"] / steps[0]["gap p50 ms"] - 1
    return {
        "queued": number,
        "begun meanwhile": num_begun,
        "without": steps[0],
        "with": steps[1],
        "change of gap p50": round(change, 4),
        "failures": len(background.errors),
        "met": abs(change) <= MAX_STEP_CHANGE and not background.errors and not num_begun,
    }


async def observe(client: Client, seconds: float) -> tuple[float, float, float, float]:
    """Begin and end of a window, and the steps' computing time and number in it."""
    before = await step_time(client)
    start, end = await window(seconds)
    after = await step_time(client)
    return start, end, after["sum"] - before["sum"], after["count"] - before["count"]


async def step_time(client: Client) -> dict[str, float]:
    found = _STEP_TIME.findall(await client.get("/metrics"))
    return {"sum": 0.0, "count": 0.0} | {name.decode(): float(value) for name, value in found}


async def num_waiting(client: Client) -> float:
    return sum(float(value) for value in _WAITING.findall(await client.get("/metrics")))


def close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--idle-streams", type=int, default=500, help="0: do not measure")
    parser.add_argument("--queued", type=int, default=2000, help="0: do not measure")
    parser.add_argument("--seconds", type=float, default=30.0, help="with a queue, and without")
    parser.add_argument(
        "--serve", default=COMMAND, help=f"the server, with {SLOTS} slots; {{port}} is the port"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    allow_open_files(2 * max(arguments.idle_streams, arguments.queued) + 256)
    results: dict[str, Any] = {"command": arguments.serve}
    if arguments.idle_streams:
        with serve(arguments.serve) as server:
            client = Client(server.base_url)
            results["idle"] = uvloop.run(measure_idle(client, server, arguments.idle_streams))
    if arguments.queued:
        with serve(arguments.serve) as server:
            client = Client(server.base_url)
            results["queued"] = uvloop.run(
                measure_queued(client, arguments.queued, arguments.seconds)
            )
    path = machine.write("many_streams", results)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return
    if idle := results.get("idle"):
        print(
            f"{idle['idle streams']} of {idle['of']} streams idle: {idle['memory MB']} MB (target "
            f"{MAX_MEMORY_MB:.0f} MB: {word(idle)}); as many connections alone: "
            f"{idle['connections alone MB']} MB; the server: {idle['server memory MB']} MB"
        )
    if queued := results.get("queued"):
        print(
            f"{queued['queued']} queued requests: a step (gap p50) "
            f"{100 * queued['change of gap p50']:+.1f} % "
            f"(target ±{100 * MAX_STEP_CHANGE:.0f} %: {word(queued)}); "
            f"{queued['begun meanwhile']} of them begun, {queued['failures']} failures"
        )
        for name in ("without", "with"):
            print(f"  {name:<8}" + ", ".join(f"{k} {v}" for k, v in queued[name].items()))
    print(f"written to {path}")


def word(result: dict[str, Any]) -> str:
    return "met" if result["met"] else "missed"


if __name__ == "__main__":
    main()
