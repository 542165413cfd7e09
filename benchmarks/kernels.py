"""What the kernels take for a step, what stopping one costs, and what comes on top of both.

paths: a step with every set of kernels that runs here, without engine or scheduler.
suspension: a step that is suspended after every layer and resumed, against the same step whole.
stops: how long a step goes on after another thread has asked it to stop, at any moment.
engine: what a step takes beyond its kernels, in the whole engine; see ``throughput.py``.
server: an urgent request on an idle ``headway serve``: its first token over HTTP, against what the
    server took for its step. (Where that would take too long, the server makes several steps of it;
    they count together.)

What is compared takes turns, because the machine is shared; medians count. Exits with status 1 if a
figure misses its target.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, NoReturn

import machine
import numpy as np
import uvloop
from native_steps import make_rows, num_blocks
from openai_load import Client, Prompts, serve
from rich.console import Console
from rich.table import Table
from throughput import CONTEXT, DECODE_STEPS, MAX_OVERHEAD, MAX_OVERHEAD_MS, Bench

from headway.core.scheduler_output import SchedulerOutput
from headway.engine.config import EngineConfig
from headway.engine.metrics import percentile
from headway.executor.batch import StepResult, build_batch
from headway.executor.execution import Execution
from headway.executor.native import NativeExecutor
from headway.executor.native_model import BLOCK_SIZE, NativeModel
from headway.executor.precision import PRECISIONS
from headway.kernels.library import Cache, open_library
from headway.kernels.loader import available_paths, load
from headway.models.packed_model import load_packed
from headway.models.registry import DEFAULT_MODEL, default_home, resolve

PARTS = ("paths", "suspension", "stops", "engine", "server")

#: Not a multiple of a block: a token that opens one has it cleared, which is rare.
DECODE_CONTEXT = 130
MAX_MODEL_LEN, MAX_TOKENS = 1024, 512
DECODES = {f"decode {batch}": make_rows(batch, 1, DECODE_CONTEXT) for batch in (1, 8, 16, 64)}
PREFILLS = {f"prefill {length}": make_rows(1, length, 0) for length in (64, 256, 512)}
PATH_STEPS = {name: rows for name, rows in (DECODES | PREFILLS).items() if name != "prefill 256"}

#: 256 tokens are the longest step of an engine with the default settings.
STOPPED_STEP = PREFILLS["prefill 256"]
SUSPENDED_STEPS = {"decode 64": DECODES["decode 64"], "prefill 256": STOPPED_STEP}
#: Of a step's time.
MAX_SUSPENSION = 0.01
#: Layers' times. The flag is looked at after every layer.
MAX_STOP = 1.25

URGENT_WORDS = 64
#: Of the first token over HTTP: times the step's own time, and milliseconds.
MAX_TTFT_FACTOR, MAX_TTFT_MS = 1.15, 2.0

_STEP_TIME = re.compile(rb"^headway:step_time_seconds_(sum|count)\{[^}]*\} (\S+)$", re.MULTILINE)


class Figure(NamedTuple):
    """One line of the outcome."""

    name: str
    value: str
    target: str
    met: bool


# ---------------------------------------------------------------------------- paths


def measure_paths(
    path: Path, names: Sequence[str], precisions: Sequence[str], num_threads: int, runs: int
) -> dict[str, Any]:
    """Milliseconds of each step with each of the kernels, by step and "path precision"."""
    packed = load_packed(path, default_home() / "packed")
    models = {
        f"{name} {precision}": NativeModel(
            open_library(load(name, default_home() / "kernels")),
            packed,
            precision=precision,
            num_threads=num_threads,
            max_model_len=MAX_MODEL_LEN,
            max_tokens=MAX_TOKENS,
        )
        for name in names
        for precision in precisions
    }
    size = max(map(num_blocks, PATH_STEPS.values()))
    pool = np.zeros((size, next(iter(models.values())).block_bytes), np.uint8)
    cache = Cache(pool.ctypes.data, size)
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(1 + runs):
        for step, rows in PATH_STEPS.items():
            batch = build_batch(rows, BLOCK_SIZE)
            for variant, model in models.items():
                execution = Execution(model, cache, batch, _unread)
                times[step][variant].append(timed(execution.advance))
    for model in models.values():
        model.close()
    # In the first run, scratch space and pool are written to for the first time.
    return {
        step: {variant: machine.summary(found[1:]) for variant, found in variants.items()}
        for step, variants in times.items()
    }


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds that a call takes."""
    start = perf_counter()
    function()
    return 1e3 * (perf_counter() - start)


def _unread(result: StepResult) -> NoReturn:
    raise AssertionError("these results are not read")


# ---------------------------------------------------------------------------- suspension


def measure_suspension(executor: NativeExecutor, runs: int) -> dict[str, Any]:
    """What suspending a step after every layer and resuming it adds, as a share of the step."""

    def whole(execution: Execution) -> None:
        execution.advance()

    def in_pieces(execution: Execution) -> None:
        for stage in range(1, execution.num_stages + 1):
            execution.advance(stage)

    results: dict[str, Any] = {}
    for step, rows in SUSPENDED_STEPS.items():
        times: dict[str, list[float]] = {"whole ms": [], "in pieces ms": []}
        ways = [("whole ms", whole), ("in pieces ms", in_pieces)]
        for _ in range(1 + runs):
            for name, way in ways:
                execution = executor.begin(SchedulerOutput(rows=rows))
                times[name].append(timed(lambda way=way, execution=execution: way(execution)))
                assert execution.is_complete
            ways.reverse()
        figures = {name: found[1:] for name, found in times.items()}
        shares = [
            pieces / single - 1
            for single, pieces in zip(figures["whole ms"], figures["in pieces ms"], strict=True)
        ]
        results[step] = {name: machine.summary(found) for name, found in figures.items()}
        results[step]["slower by"] = machine.summary(shares)
        results[step]["met"] = statistics.median(shares) <= MAX_SUSPENSION
    return results


# ---------------------------------------------------------------------------- stops


def measure_stops(executor: NativeExecutor, count: int) -> dict[str, Any]:
    """How long ``advance`` goes on after ``stop``, which another thread calls at any moment."""
    layers: list[float] = []
    waits: list[float] = []
    draw = random.Random(0)
    while len(waits) < count:
        # A whole step in between tells what a layer takes now; the last stage is the head.
        execution = executor.begin(SchedulerOutput(rows=STOPPED_STEP))
        for stage in range(1, execution.num_stages):
            layers.append(timed(lambda until=stage, execution=execution: execution.advance(until)))
        layer = statistics.median(layers)
        execution = executor.begin(SchedulerOutput(rows=STOPPED_STEP))
        while not execution.is_complete and len(waits) < count:
            wait = _stop_after(execution, draw.uniform(0, 3 * layer / 1e3))
            if wait is not None:
                waits.append(wait)
    return {
        "step": f"prefill {len(STOPPED_STEP[0].token_ids)}",
        "layer ms": machine.summary(layers),
        "wait ms": machine.summary(waits),
        "wait p99 ms": round(percentile(waits, 99), 4),
        "longest wait in layers": round(max(waits) / layer, 4),
        "met": max(waits) <= MAX_STOP * layer,
    }


def _stop_after(execution: Execution, seconds: float) -> float | None:
    """Milliseconds that it goes on when told to stop so late; None if it is complete by then."""
    asked = []

    def ask() -> None:
        time.sleep(seconds)
        asked.append(perf_counter())
        execution.stop()

    asker = threading.Thread(target=ask)
    asker.start()
    is_complete = execution.advance()
    stopped = perf_counter()
    asker.join()
    return None if is_complete else 1e3 * (stopped - asked[0])


# ---------------------------------------------------------------------------- engine


def measure_engine(runs: int) -> dict[str, Any]:
    """What a decode step takes beyond its kernels, at batch 1 and 64."""
    batches = (1, 64)
    bench = Bench(EngineConfig(max_num_seqs=max(batches)).build())
    prompts = [bench.prompt(CONTEXT - DECODE_STEPS // 2) for _ in range(max(batches))]
    bench.run(prompts, max_tokens=2)
    found: dict[int, list[dict[str, float]]] = {batch: [] for batch in batches}
    for _ in range(runs):
        for batch in batches:
            found[batch].append(bench.decode(prompts[:batch]))
    bench.engine.close()
    results: dict[str, Any] = {
        f"batch {batch}": {
            figure: machine.summary([decode[figure] for decode in decodes])
            for figure in ("step ms", "kernels ms", "overhead ms", "overhead")
        }
        for batch, decodes in found.items()
    }
    single, largest = results["batch 1"], results["batch 64"]
    single["met"] = single["overhead ms"]["median"] <= MAX_OVERHEAD_MS
    largest["met"] = largest["overhead"]["median"] <= MAX_OVERHEAD
    return results


# ---------------------------------------------------------------------------- server


def measure_server(count: int) -> dict[str, Any]:
    """Time to first token of a short urgent prompt, and the time of the steps that made it."""
    with serve("headway serve --port {port}") as server:
        pairs = uvloop.run(_urgent_requests(Client(server.base_url), count))
    ttfts, steps = ([pair[index] for pair in pairs] for index in (0, 1))
    beyond = [ttft - MAX_TTFT_FACTOR * step for ttft, step in pairs]
    return {
        "ttft ms": machine.summary(ttfts),
        "steps ms": machine.summary(steps),
        "ttft over steps": machine.summary([ttft / step for ttft, step in pairs]),
        f"ttft beyond {MAX_TTFT_FACTOR} steps ms": machine.summary(beyond),
        "met": statistics.median(beyond) <= MAX_TTFT_MS,
    }


async def _urgent_requests(client: Client, count: int) -> list[tuple[float, float]]:
    """Milliseconds to the first token, and of the steps: more than one where that takes long."""
    await client.prepare()
    prompts = Prompts(0)
    pairs = []
    for _ in range(3 + count):
        before = await _step_times(client)
        request = await client.complete(prompts.next(URGENT_WORDS), 1, 0)
        if request.error is not None:
            raise SystemExit(f"the idle server does not serve: {request.error}")
        after = await _step_times(client)
        assert after["count"] > before["count"], (before, after)
        steps = after["sum"] - before["sum"]
        pairs.append((1e3 * (request.times[0] - request.start), 1e3 * steps))
    return pairs[3:]  # the first ones warm up


async def _step_times(client: Client) -> dict[str, float]:
    found = _STEP_TIME.findall(await client.get("/metrics"))
    return {"sum": 0.0, "count": 0.0} | {name.decode(): float(value) for name, value in found}


# ---------------------------------------------------------------------------- the outcome


def figures_of(results: dict[str, Any]) -> list[Figure]:
    """What has a target."""
    figures = []
    for step, found in results.get("suspension", {}).items():
        share = found["slower by"]
        figures.append(
            Figure(
                f"{step}: suspended after every layer, slower by",
                f"{share['median']:+.2%}",
                f"≤ {MAX_SUSPENSION:.0%}",
                found["met"],
            )
        )
    if found := results.get("stops"):
        figures.append(
            Figure(
                f"{found['step']}: the longest of {found['wait ms']['runs']} waits for it to stop, "
                f"in layers of {found['layer ms']['median']:.2f} ms",
                f"{found['longest wait in layers']:.2f}",
                f"≤ {MAX_STOP}",
                found["met"],
            )
        )
    if found := results.get("engine"):
        single, largest = found["batch 1"], found["batch 64"]
        figures += [
            Figure(
                f"batch 1: of a step of {single['step ms']['median']:.2f} ms, not the kernels'",
                f"{single['overhead ms']['median']:.2f} ms",
                f"≤ {MAX_OVERHEAD_MS} ms",
                single["met"],
            ),
            Figure(
                f"batch 64: of a step of {largest['step ms']['median']:.2f} ms, not the kernels'",
                f"{largest['overhead']['median']:.1%}",
                f"≤ {MAX_OVERHEAD:.0%}",
                largest["met"],
            ),
        ]
    if found := results.get("server"):
        ttft, step = found["ttft ms"]["median"], found["steps ms"]["median"]
        bound = MAX_TTFT_FACTOR * step + MAX_TTFT_MS
        figures.append(
            Figure(
                f"first token over HTTP of {URGENT_WORDS} words, whose step takes {step:.1f} ms",
                f"{ttft:.1f} ms",
                f"≤ {MAX_TTFT_FACTOR} × + {MAX_TTFT_MS:g} ms = {bound:.1f} ms",
                found["met"],
            )
        )
    return figures


def show(results: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Print the steps' times, and what has a target."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if steps := results.get("paths"):
        variants = list(next(iter(steps.values())))
        table = Table("", *variants, title="milliseconds a step")
        for step, found in steps.items():
            table.add_row(step, *(f"{found[variant]['median']:.2f}" for variant in variants))
        console.print(table)
    if figures:
        table = Table("figure", "value", "target", "")
        for figure in figures:
            verdict = "[green]met[/]" if figure.met else "[red]missed[/]"
            table.add_row(figure.name, figure.value, figure.target, verdict)
        console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--runs", type=int, default=15, help="of each step, in turn")
    parser.add_argument("--stops", type=int, default=200, help="to wait for")
    parser.add_argument("--requests", type=int, default=30, help="to the server")
    parser.add_argument("--paths", nargs="+", help="of the kernels (all that run here)")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of activations"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    path = resolve(DEFAULT_MODEL)
    results: dict[str, Any] = {}
    executor = NativeExecutor(path, max_model_len=MAX_MODEL_LEN, swap_space_bytes=0)
    results["kernels"] = executor.describe()["kernels"]
    if "suspension" in arguments.parts:
        results["suspension"] = measure_suspension(executor, arguments.runs)
    if "stops" in arguments.parts:
        results["stops"] = measure_stops(executor, arguments.stops)
    num_threads = executor.num_threads
    executor.close()
    if "paths" in arguments.parts:
        names = arguments.paths or available_paths()
        results["paths"] = measure_paths(
            path, names, arguments.precision, num_threads, arguments.runs
        )
    if "server" in arguments.parts:
        results["server"] = measure_server(arguments.requests)
    if "engine" in arguments.parts:
        results["engine"] = measure_engine(max(3, arguments.runs // 3))
    figures = figures_of(results)
    results["met"] = all(figure.met for figure in figures)
    file = machine.write("kernels", results)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return not results["met"]
    print(f"kernels: {results['kernels']}")
    show(results, figures)
    print(f"written to {file}")
    return not results["met"]


if __name__ == "__main__":
    sys.exit(main())
