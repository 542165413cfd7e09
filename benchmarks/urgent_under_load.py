"""How long an urgent request waits behind background streams, on any OpenAI-compatible server.

Background: streams in a closed loop, 200 words in, 256 tokens out, priority 10. Urgent requests:
64 words in, 16 tokens out, priority 0, as a Poisson process. First the urgent request alone on the
idle server; then, with the background: warm-up, half of the time without urgent requests, the
urgent window, the other half. Each of these windows ends with a background completion, so lasts a
little longer than it is asked to. Every prompt is different. Each server is started, measured and
stopped before the next.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import machine
import psutil
import uvloop
from openai_load import (
    Background,
    Client,
    Connection,
    Prompts,
    Server,
    allow_open_files,
    cpu_seconds,
    serve,
)
from rich.console import Console
from rich.table import Table

from headway.engine.metrics import percentile

URGENT_WORDS, URGENT_TOKENS, URGENT_PRIORITY = 64, 16, 0
BACKGROUND_WORDS, BACKGROUND_TOKENS, BACKGROUND_PRIORITY = 200, 256, 10
IDLE_REQUESTS = 20
#: Of a minute's 29 arrivals five follow another within half a second; 30 and 6.6 are expected.
SEED = 3

_COMMAND = "headway serve --port {port}"
_SLO = "--slo 0:ttft=100ms,tpot=30ms"
#: What is measured if nothing else is named.
SERVERS = {
    "default": _COMMAND,
    "16 slots": f"{_COMMAND} --max-num-seqs 16",
    "slo": f"{_COMMAND} {_SLO}",
    "16 slots, slo": f"{_COMMAND} --max-num-seqs 16 {_SLO}",
}

#: figure → at most (<) or at least (>) this; seconds, ratios, tokens a second.
_IDLE = {"idle ttft p50": ("<", 0.045), "idle end-to-end p50": ("<", 0.200)}
_SLO_TARGETS = _IDLE | {
    "urgent ttft p99 / idle": ("<", 2.5),
    "urgent end-to-end p99 / idle": ("<", 2.0),
    "background kept": (">", 0.85),
}
TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "default": _IDLE | {"urgent ttft p99 / idle": ("<", 3.5), "background tokens/s": (">", 480.0)},
    "16 slots": _IDLE | {"urgent ttft p99 / idle": ("<", 3.5), "background tokens/s": (">", 420.0)},
    "slo": _SLO_TARGETS,
    "16 slots, slo": _SLO_TARGETS,
}


@dataclass(frozen=True)
class Load:
    """What is put on a server; times in seconds, ``spread`` as in ``Background``."""

    streams: int
    rate: float
    seconds: float
    warmup: float
    baseline: float
    seed: int
    spread: bool = True


async def measure(client: Client, load: Load, server: Server | None) -> dict[str, Any]:
    """All figures of one server."""
    await client.prepare()
    prompts = Prompts(load.seed)

    def urgent() -> Any:
        return client.complete(prompts.next(URGENT_WORDS), URGENT_TOKENS, URGENT_PRIORITY)

    idle = [await urgent() for _ in range(IDLE_REQUESTS + 3)][3:]  # the first ones warm up
    for request in idle:
        if not request.times:
            raise SystemExit(f"the idle server does not serve: {request.error}")

    background = Background(
        client,
        prompts,
        BACKGROUND_WORDS,
        BACKGROUND_TOKENS,
        BACKGROUND_PRIORITY,
        spread=load.spread,
    )
    background.start(load.streams)
    await background.window(load.warmup)
    quiet = [await background.window(load.baseline / 2)]
    before = cpu_times(server)
    async with arrivals(urgent, load) as requests:
        start, end = await background.window(load.seconds)
    cpu = {name: seconds - before[name] for name, seconds in cpu_times(server).items()}
    under_load = await asyncio.gather(*requests)
    await background.window(0)
    quiet.append(await background.window(load.baseline / 2))
    await background.stop()

    gaps = background.gaps(start, end)
    lengths = [after - before for before, after in gaps]
    rate = background.tokens(start, end) / (end - start)
    quiet_seconds = sum(after - before for before, after in quiet)
    quiet_rate = sum(background.tokens(*span) for span in quiet) / quiet_seconds
    served = [request for request in under_load if request.error is None]
    if not served or not gaps:
        raise SystemExit(f"nothing was served under load: {under_load and under_load[0].error}")
    results = {
        **latencies("idle", idle),
        **latencies("urgent", served),
        "background tokens/s": rate,
        "background tokens/s without urgent": quiet_rate,
        "background kept": rate / quiet_rate,
        "background gap p50": percentile(lengths, 50),
        "background gap p99": percentile(lengths, 99),
        "background gap max": max(lengths),
        "background gap max beyond urgent work": uncovered(gaps, served),
        "urgent requests": len(under_load),
        "failures": dict(
            Counter(request.error for request in [*idle, *under_load] if request.error is not None)
            + Counter(background.errors)
        ),
        **{name: seconds / (end - start) for name, seconds in cpu.items()},
    }
    for figure in ("ttft", "end-to-end"):
        for rank in ("p50", "p99"):
            ratio = results[f"urgent {figure} {rank}"] / results[f"idle {figure} p50"]
            results[f"urgent {figure} {rank} / idle"] = ratio
    if server is not None:
        results["server memory MB"] = server.memory_mb()
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in results.items()
    }


def cpu_times(server: Server | None) -> dict[str, float]:
    """CPU seconds so far of the client, the server, and whoever else disturbs them."""
    total = psutil.cpu_times()
    seconds = {"client cores used": cpu_seconds()}
    if server is not None:
        seconds["server cores used"] = server.cpu_seconds()
        busy = total.user + total.nice + total.system
        seconds["others' cores used"] = busy - sum(seconds.values())
    return seconds


@contextlib.asynccontextmanager
async def arrivals(
    urgent: Callable[[], Any], load: Load
) -> AsyncIterator[list[asyncio.Task[Connection]]]:
    """Let urgent requests arrive for the time of the context, into the list that it gives."""
    requests: list[asyncio.Task[Connection]] = []

    async def arrive() -> None:
        intervals = random.Random(load.seed)
        due = perf_counter()
        while True:
            due += intervals.expovariate(load.rate)
            await asyncio.sleep(due - perf_counter())
            requests.append(asyncio.create_task(urgent()))

    arriving = asyncio.create_task(arrive())
    try:
        yield requests
    finally:
        arriving.cancel()


def latencies(name: str, requests: Sequence[Connection]) -> dict[str, float]:
    """Percentiles of the requests that were served."""
    ttfts = [request.times[0] - request.start for request in requests]
    totals = [request.times[-1] - request.start for request in requests]
    return {
        f"{name} {figure} p{rank}": percentile(values, rank)
        for figure, values in (("ttft", ttfts), ("end-to-end", totals))
        for rank in (50, 99)
    }


def uncovered(gaps: Sequence[tuple[float, float]], urgent: Sequence[Connection]) -> float:
    """The longest part of a background gap during which there was no urgent request."""
    busy: list[tuple[float, float]] = []  # disjoint, in order
    for start, end in sorted((request.start, request.times[-1]) for request in urgent):
        if busy and start <= busy[-1][1]:
            busy[-1] = busy[-1][0], max(end, busy[-1][1])
        else:
            busy.append((start, end))
    longest = 0.0
    for before, after in sorted(gaps, key=lambda gap: gap[0] - gap[1]):
        if after - before <= longest:
            break
        covered = sum(max(0.0, min(after, end) - max(before, start)) for start, end in busy)
        longest = max(longest, after - before - covered)
    return longest


#: figure, its unit, and by how much it is multiplied to be shown in it.
ROWS = (
    ("idle ttft p50", "ms", 1e3),
    ("idle end-to-end p50", "ms", 1e3),
    ("urgent ttft p50", "ms", 1e3),
    ("urgent ttft p99", "ms", 1e3),
    ("urgent ttft p50 / idle", "×", 1),
    ("urgent ttft p99 / idle", "×", 1),
    ("urgent end-to-end p50", "ms", 1e3),
    ("urgent end-to-end p99", "ms", 1e3),
    ("urgent end-to-end p50 / idle", "×", 1),
    ("urgent end-to-end p99 / idle", "×", 1),
    ("background tokens/s", "", 1),
    ("background tokens/s without urgent", "", 1),
    ("background kept", "%", 100),
    ("background gap p50", "ms", 1e3),
    ("background gap p99", "ms", 1e3),
    ("background gap max", "ms", 1e3),
    ("background gap max beyond urgent work", "ms", 1e3),
    ("client cores used", "", 1),
    ("server cores used", "", 1),
    ("others' cores used", "", 1),
    ("server memory MB", "", 1),
)


def show(
    results: dict[str, Any],
    title: str = "urgent requests under load",
    rows: Sequence[tuple[str, str, float]] = ROWS,
) -> None:
    """Print the figures that ``judged`` has seen, a column for each server."""
    table = Table("", *results, title=title)
    for figure, unit, factor in rows:
        cells = []
        for figures in results.values():
            text = "–"
            if figure in figures:
                digits = 2 if factor == 1 else 0
                text = f"{figures[figure] * factor:.{digits}f} {unit}".rstrip()
            if figure in figures["targets"]:
                sign, limit = figures["targets"][figure]
                color, word = ("green", "met") if figures["met"][figure] else ("red", "missed")
                bound = f"{'≤' if sign == '<' else '≥'} {limit * factor:g}"
                text = f"[{color}]{text} ({bound}: {word})[/]"
            cells.append(text)
        table.add_row(figure, *cells)
    failures = {name: figures.get("failures", {}) for name, figures in results.items()}
    table.add_row("failures", *(str(sum(counts.values())) for counts in failures.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name, counts in failures.items():
        for error, count in counts.items():
            print(f"{name}: {count} × {error}")


def judged(figures: dict[str, Any], targets: dict[str, tuple[str, float]]) -> dict[str, Any]:
    """The figures with their targets, and which are met."""
    met = {
        figure: figures[figure] <= limit if sign == "<" else figures[figure] >= limit
        for figure, (sign, limit) in targets.items()
    }
    return figures | {"targets": targets, "met": met}


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``load_of`` reads."""
    parser.add_argument("--streams", type=int, default=32, help="in the background")
    parser.add_argument("--rate", type=float, default=0.5, help="urgent requests a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of urgent requests")
    parser.add_argument("--warmup", type=float, default=15.0, help="seconds")
    parser.add_argument("--baseline", type=float, default=30.0, help="seconds without urgent ones")
    parser.add_argument("--seed", type=int, default=SEED, help="of prompts and arrivals")


def load_of(arguments: argparse.Namespace, spread: bool = True) -> Load:
    """The load that the options describe."""
    return Load(
        arguments.streams,
        arguments.rate,
        arguments.seconds,
        arguments.warmup,
        arguments.baseline,
        arguments.seed,
        spread,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", help="of a server that runs already, instead of starting any")
    parser.add_argument("--name", default="server", help="of that server, in the table")
    parser.add_argument(
        "--serve",
        nargs=2,
        action="append",
        metavar=("NAME", "COMMAND"),
        help="start and measure this server instead of Headway's; {port} stands for the port",
    )
    parser.add_argument("--only", nargs="+", choices=SERVERS, help="of Headway's servers")
    add_load_options(parser)
    parser.add_argument("--model", help="as the server calls it; its first if none is given")
    parser.add_argument("--api-key")
    parser.add_argument(
        "--results", default="urgent_under_load", help="name of the file in benchmarks/results"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    load = load_of(arguments)
    allow_open_files(4096)

    def run(name: str, base_url: str, server: Server | None) -> None:
        client = Client(base_url, arguments.model, arguments.api_key)
        figures = uvloop.run(measure(client, load, server))
        results[name] = judged(figures, TARGETS.get(name, {}))

    results: dict[str, Any] = {}
    if arguments.base_url:
        run(arguments.name, arguments.base_url, None)
    else:
        named = {name: SERVERS[name] for name in arguments.only or SERVERS}
        for name, command in (dict(arguments.serve) if arguments.serve else named).items():
            with serve(command, arguments.api_key) as server:
                run(name, server.base_url, server)
            results[name]["command"] = command
    path = machine.write(arguments.results, results | {"load": vars(load)})
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return
    show(results)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
