"""Experiment 2: what ranking and preempting do to urgent requests, and what others pay for it.

Small scenarios of a few requests each, two slots, and a KV pool that just holds two of the largest
requests, run to the end under every policy::

    python experiments/exp002_scheduler_policy.py --simulated     # fixed costs, a virtual clock
    python experiments/exp002_scheduler_policy.py --runs 5        # the real model

Setup, results and what to make of them: ``docs/experiments/exp002.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from headway import (
    Engine,
    EngineConfig,
    PreemptionMode,
    PriorityScheduler,
    Request,
    SamplingParams,
    SchedulerConfig,
)
from headway.engine.client import StepReport
from headway.engine.metrics import percentile
from headway.engine.outputs import EngineOutput, RequestMetrics
from headway.executor.simulated import SimulatedExecutor, VirtualClock

MAX_NUM_SEQS = 2
MAX_NUM_BATCHED_TOKENS = 256
#: Tokens in a block: as the executor has it, so that both modes have the same pools.
BLOCK_SIZE = 32
#: Prompt lengths, in tokens, drawn for each request from a fixed seed.
PROMPT_TOKENS = (64, 96)
SEED = 2
#: Decode steps that fit into a second of a scenario. At 20, no request ever has to wait for a slot
#: in two of the three scenarios, and no policy could differ from another.
STEPS_PER_SECOND = 4
#: ms a step, a prefill token, a decoding sequence, a context token: two sequences of 100 tokens
#: decode in 250 ms, so that a second holds ``STEPS_PER_SECOND`` such steps.
SIMULATED_COST = (200.0, 10.0, 20.0, 0.05)
SIMULATED_SWAP_MS_PER_BLOCK = 5.0

#: Lewis Carroll, "Alice's Adventures in Wonderland" (1865); each request gets a window of it.
TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing
to do: once or twice she had peeped into the book her sister was reading, but it had no pictures
or conversations in it, "and what is the use of a book," thought Alice, "without pictures or
conversations?" So she was considering in her own mind (as well as she could, for the hot day made
her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the
trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran
close by her. There was nothing so very remarkable in that; nor did Alice think it so very much
out of the way to hear the Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she
thought it over afterwards, it occurred to her that she ought to have wondered at this, but at the
time it all seemed quite natural); but when the Rabbit actually took a watch out of its waistcoat-
pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed across
her mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to
take out of it, and burning with curiosity, she ran across the field after it, and fortunately was
just in time to see it pop down a large rabbit-hole under the hedge. In another moment down went
Alice after it, never once considering how in the world she was to get out again. The rabbit-hole
went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that Alice
had not a moment to think about stopping herself before she found herself falling down a very deep
well."""


class Arrival(NamedTuple):
    """A request of a scenario: when (s), how urgent (smaller is more), how many tokens it makes."""

    at: float
    priority: int
    max_tokens: int


class Policy(NamedTuple):
    """A column of the comparison."""

    name: str
    scheduling_policy: str
    preemption_mode: PreemptionMode


SCENARIOS: dict[str, tuple[Arrival, ...]] = {
    "mixed_load": (
        Arrival(0, 1, 10),
        Arrival(1, 1, 100),
        Arrival(2, 0, 20),
        Arrival(3, 1, 50),
    ),
    "burst_high_priority": (
        Arrival(0, 1, 50),
        Arrival(1, 1, 50),
        Arrival(5, 0, 10),
        Arrival(5, 0, 10),
    ),
    "resource_constrained": tuple(Arrival(i, i % 2, 30) for i in range(10)),
}

#: Where preemption has little or nothing to give.
LIMITS: dict[str, tuple[Arrival, ...]] = {
    "light_load": tuple(arrival._replace(at=5 * arrival.at) for arrival in SCENARIOS["mixed_load"]),
    "equal_classes": tuple(Arrival(i, 0, 30) for i in range(10)),
    "mostly_urgent": tuple(Arrival(i, int(i in (0, 5)), 30) for i in range(10)),
    "long_urgent": (
        Arrival(0, 1, 50),
        Arrival(1, 1, 50),
        Arrival(5, 0, 50),
        Arrival(5, 0, 50),
    ),
    "victims_almost_done": (
        Arrival(0, 1, 50),
        Arrival(0, 1, 50),
        Arrival(13, 0, 50),
    ),
}

POLICIES = (
    Policy("FCFS", "fcfs", PreemptionMode.NONE),
    Policy("priority, none", "priority", PreemptionMode.NONE),
    Policy("priority, pause", "priority", PreemptionMode.PAUSE),
    Policy("priority, tail", "priority", PreemptionMode.TAIL),
    Policy("priority, swap", "priority", PreemptionMode.SWAP),
    Policy("priority, recompute", "priority", PreemptionMode.RECOMPUTE),
    Policy("priority, auto", "priority", PreemptionMode.AUTO),
)


@dataclass(frozen=True)
class ClassResult:
    """Latencies of the requests of one priority, from arrival, in seconds of the scenario."""

    latency_mean: float
    latency_p99: float
    ttft_mean: float
    ttft_p99: float


@dataclass(frozen=True)
class Result:
    """One scenario under one policy; of several runs, the median of every figure.

    Attributes:
        scenario, policy: their names.
        time_scale: seconds of the clock that a second of the scenario lasted. All times here are
            seconds of the scenario, so that a machine that others use, too, and that is faster in
            one minute than in the next, gives figures that can be compared.
        total: from the first arrival to the last token.
        throughput: generated tokens a second of that.
        classes: by priority.
        latency_mean: of all requests.
        preemptions: times a request yielded, by ``PreemptionMode.value``.
        num_recomputed_tokens: computed again after their blocks had been taken.
        num_swapped_blocks: copied between the pool and the swap space.
        num_steps: that the executor ran.
        outputs_equal: every request generated, in every run, what it generates on its own.
    """

    scenario: str
    policy: str
    time_scale: float
    total: float
    throughput: float
    classes: dict[int, ClassResult]
    latency_mean: float
    preemptions: dict[str, float]
    num_recomputed_tokens: float
    num_swapped_blocks: float
    num_steps: float
    outputs_equal: bool


# ---------------------------------------------------------------------- what a scenario runs on


class Backend(Protocol):
    """An executor with its clock, for one scenario after the other."""

    #: Seconds of the clock that a second of a scenario lasts.
    time_scale: float

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ...

    def open(self, num_blocks: int) -> None:
        """Make a pool of so many blocks."""
        ...

    def make_engine(self, policy: Policy) -> Engine:
        """A new engine with an empty pool."""
        ...

    def calibrate(self) -> None:
        """Set ``time_scale`` to how fast the machine is now."""
        ...

    def wait_until(self, moment: float) -> None:
        """Idle until the engine's clock shows ``moment``."""
        ...


class SimulatedBackend:
    """Fixed costs, a virtual clock, and a pool whose contents are checked in every step."""

    def __init__(self, time_scale: float | None = None) -> None:
        self.time_scale = time_scale or 1.0
        self._clock = VirtualClock()
        self._num_blocks = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def open(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks

    def make_engine(self, policy: Policy) -> Engine:
        self._clock = VirtualClock()
        executor = SimulatedExecutor(
            self._clock,
            num_blocks=self._num_blocks,
            block_size=BLOCK_SIZE,
            num_swap_blocks=16 * self._num_blocks,
            max_model_len=self._num_blocks * BLOCK_SIZE,
            cost=SIMULATED_COST,
            swap_ms_per_block=SIMULATED_SWAP_MS_PER_BLOCK,
            verify=True,
        )
        return Engine(executor, _scheduler_for(executor, policy), clock=self._clock)

    def calibrate(self) -> None:
        """Nothing to do: costs are fixed."""

    def wait_until(self, moment: float) -> None:
        self._clock.advance_to(moment)


class ModelBackend:
    """The real model. A short warm-up before each run measures a decode step: the time scale."""

    def __init__(
        self,
        model: str | None = None,
        time_scale: float | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._config = EngineConfig(max_num_seqs=MAX_NUM_SEQS, num_threads=num_threads)
        if model is not None:
            self._config = replace(self._config, model=model)
        # Enough for a block of any model; a scenario's pool is made when it is known.
        self._engine = replace(self._config, kv_cache_bytes=64 << 20).build()
        executor: Any = self._engine.executor
        self._bytes_per_block: int = executor.bytes_per_block
        #: What runs, for the record; pools are the scenarios' own.
        self.description: dict[str, str] = {
            label: value
            for label, value in executor.describe().items()
            if label not in ("KV cache", "swap space")
        }
        self._fixed_time_scale = time_scale
        self.time_scale = time_scale or 1.0

    def encode(self, text: str) -> list[int]:
        assert self._engine.tokenizer is not None
        return self._engine.tokenizer.encode(text)

    def open(self, num_blocks: int) -> None:
        self._engine.close()
        size = num_blocks * self._bytes_per_block
        self._engine = replace(self._config, kv_cache_bytes=size).build()
        assert self._engine.executor.num_blocks == num_blocks
        assert self._engine.executor.block_size == BLOCK_SIZE

    def make_engine(self, policy: Policy) -> Engine:
        executor = self._engine.executor
        return Engine(executor, _scheduler_for(executor, policy), self._engine.tokenizer)

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self._engine.clock()))

    def calibrate(self) -> None:
        if self._fixed_time_scale is not None:
            return
        engine = self.make_engine(POLICIES[0])
        durations: list[float] = []

        def listen(step: StepReport, _: Sequence[EngineOutput]) -> None:
            if step.output.features.decode_seqs == MAX_NUM_SEQS:
                durations.append(step.execute_end - step.execute_start)

        engine.listeners.append(listen)
        arrivals = [Arrival(0, 0, 16)] * MAX_NUM_SEQS
        for request in make_requests(arrivals, self.encode):
            engine.submit(request)
        while engine.has_work:
            engine.step()
        self.time_scale = STEPS_PER_SECOND * statistics.median(durations)


def _scheduler_for(executor: Any, policy: Policy) -> PriorityScheduler:
    return PriorityScheduler(
        config=SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            num_blocks=executor.num_blocks,
            block_size=executor.block_size,
            num_swap_blocks=executor.num_swap_blocks,
            max_model_len=executor.max_model_len,
            policy=policy.scheduling_policy,
            preemption_mode=policy.preemption_mode,
        )
    )


# ---------------------------------------------------------------------- running a scenario


def make_requests(
    arrivals: Sequence[Arrival],
    encode: Callable[[str], list[int]],
    begin: float = 0.0,
    time_scale: float = 1.0,
) -> list[Request]:
    """Fresh requests, the same every time: greedy, of exact length, all prompts different.

    Args:
        arrivals: of the scenario.
        encode: text → tokens.
        begin: when the scenario begins, on the engine's clock.
        time_scale: seconds of that clock for a second of the scenario.
    """
    lengths, words = random.Random(SEED), TEXT.split()
    requests = []
    for index, arrival in enumerate(arrivals):
        prompt = encode(" ".join(words[15 * index :]))[: lengths.randint(*PROMPT_TOKENS)]
        requests.append(
            Request(
                f"r{index}",
                arrival.priority,
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(
                    max_tokens=arrival.max_tokens, temperature=0, ignore_eos=True
                ),
                arrival_time=begin + arrival.at * time_scale,
            )
        )
    return requests


class Witness:
    """A listener that keeps what an engine says of its requests.

    Attributes:
        token_ids: generated, by request id.
        metrics: of the requests that have ended, by id.
        swapped: blocks copied between pool and swap space, of each step.
    """

    def __init__(self, engine: Engine) -> None:
        self.token_ids: dict[str, list[int]] = {}
        self.metrics: dict[str, RequestMetrics] = {}
        self.swapped: list[int] = []
        engine.listeners.append(self._listen)

    def _listen(self, step: StepReport, outputs: Sequence[EngineOutput]) -> None:
        self.swapped.append(step.output.num_swapped_blocks)
        for output in outputs:
            self.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
            if output.is_last and output.metrics is not None:
                self.metrics[output.request_id] = output.metrics


def pool_size(
    arrivals: Sequence[Arrival], encode: Callable[[str], list[int]], num_requests: int = 2
) -> int:
    """Blocks that so many of the scenario's largest request fill."""
    requests = make_requests(arrivals, encode)
    largest = max(request.num_prompt_tokens + request.max_tokens for request in requests)
    return num_requests * -(-largest // BLOCK_SIZE)


def outputs_alone(backend: Backend, arrivals: Sequence[Arrival]) -> list[list[int]]:
    """What every request generates when it has the engine to itself."""
    outputs = []
    for request in make_requests(arrivals, backend.encode):
        engine = backend.make_engine(POLICIES[0])
        witness = Witness(engine)
        engine.submit(request)
        while engine.has_work:
            engine.step()
        outputs.append(witness.token_ids[request.request_id])
    return outputs


def run_once(
    backend: Backend,
    scenario: str,
    arrivals: Sequence[Arrival],
    policy: Policy,
    alone: Sequence[Sequence[int]],
) -> Result:
    """Run a scenario under one policy; ``alone`` is what each request generates on its own."""
    backend.calibrate()
    scale = backend.time_scale
    engine = backend.make_engine(policy)
    witness = Witness(engine)
    begin = engine.clock()
    requests = make_requests(arrivals, backend.encode, begin, scale)
    moments = [begin + arrival.at * scale for arrival in arrivals]
    submitted = 0
    while submitted < len(requests) or engine.has_work:
        while submitted < len(requests) and moments[submitted] <= engine.clock():
            engine.submit(requests[submitted])
            submitted += 1
        if engine.has_work:
            engine.step()
        else:
            backend.wait_until(moments[submitted])
    metrics = [witness.metrics[request.request_id] for request in requests]
    total = (max(each.finish_time or 0.0 for each in metrics) - begin) / scale
    latencies = [(each.latency or 0.0) / scale for each in metrics]
    return Result(
        scenario=scenario,
        policy=policy.name,
        time_scale=scale,
        total=total,
        throughput=sum(each.num_output_tokens for each in metrics) / total,
        classes=_by_class(metrics, scale),
        latency_mean=statistics.fmean(latencies),
        preemptions=dict(engine.statistics.preemptions),
        num_recomputed_tokens=sum(engine.statistics.recomputed_tokens.values()),
        num_swapped_blocks=sum(witness.swapped),
        num_steps=len(witness.swapped),
        outputs_equal=[witness.token_ids[each.request_id] for each in metrics] == list(alone),
    )


def _by_class(ended: Iterable[RequestMetrics], scale: float) -> dict[int, ClassResult]:
    latencies: dict[int, list[float]] = {}
    ttfts: dict[int, list[float]] = {}
    for metrics in ended:
        assert metrics.latency is not None and metrics.ttft is not None
        latencies.setdefault(metrics.priority, []).append(metrics.latency / scale)
        ttfts.setdefault(metrics.priority, []).append(metrics.ttft / scale)
    return {
        priority: ClassResult(
            statistics.fmean(latencies[priority]),
            percentile(latencies[priority], 99),
            statistics.fmean(ttfts[priority]),
            percentile(ttfts[priority], 99),
        )
        for priority in sorted(latencies)
    }


def median_of(results: Sequence[Result]) -> Result:
    """The median of every figure of several runs; equal outputs only if they were in all."""

    def median(values: Iterable[Any]) -> Any:
        found = list(values)
        first = found[0]
        if isinstance(first, bool):
            return all(found)
        if isinstance(first, str):
            return first
        if isinstance(first, dict):
            keys = sorted({key for figures in found for key in figures})
            return {key: median(figures.get(key, 0) for figures in found) for key in keys}
        return statistics.median(found)

    merged = median(asdict(result) for result in results)
    merged["classes"] = {key: ClassResult(**figures) for key, figures in merged["classes"].items()}
    return Result(**merged)


def run(
    backend: Backend,
    scenarios: dict[str, tuple[Arrival, ...]] = SCENARIOS,
    policies: Sequence[Policy] = POLICIES,
    runs: int = 1,
    pool: int = 2,
) -> list[Result]:
    """Every scenario under every policy; policies take turns, so that a noisy minute hits all.

    Args:
        backend: what to run on.
        scenarios: by name.
        policies: to compare.
        runs: of each; every figure is the median.
        pool: how many of a scenario's largest request fit into the KV pool.
    """
    results = []
    for scenario, arrivals in scenarios.items():
        backend.open(pool_size(arrivals, backend.encode, pool))
        alone = outputs_alone(backend, arrivals)
        found: dict[Policy, list[Result]] = {policy: [] for policy in policies}
        for _ in range(runs):
            for policy in policies:
                found[policy].append(run_once(backend, scenario, arrivals, policy, alone))
        results += [median_of(found[policy]) for policy in policies]
    return results


# ---------------------------------------------------------------------- showing the results

COLUMNS = (
    "policy",
    "urgent mean",
    "urgent p99",
    "batch mean",
    "batch p99",
    "urgent TTFT mean / p99",
    "batch TTFT mean / p99",
    "total",
    "tok/s",
    "yields",
    "recomputed",
    "outputs equal",
)


def rows_of(results: Sequence[Result]) -> list[list[str]]:
    """Cells in the order of ``COLUMNS``."""
    rows = []
    for result in results:
        cells: dict[int, list[str]] = {}
        for priority in (0, 1):
            figures = result.classes.get(priority)
            cells[priority] = ["–"] * 3
            if figures is not None:
                cells[priority] = [
                    f"{figures.latency_mean:.2f}",
                    f"{figures.latency_p99:.2f}",
                    f"{figures.ttft_mean:.2f} / {figures.ttft_p99:.2f}",
                ]
        yields = [f"{count:g} {mode}" for mode, count in sorted(result.preemptions.items())]
        rows.append(
            [
                result.policy,
                *cells[0][:2],
                *cells[1][:2],
                cells[0][2],
                cells[1][2],
                f"{result.total:.2f}",
                f"{result.throughput:.1f}",
                ", ".join(text for text in yields if not text.startswith("0 ")) or "–",
                f"{result.num_recomputed_tokens:g}",
                "yes" if result.outputs_equal else "NO",
            ]
        )
    return rows


def print_tables(results: Sequence[Result], as_markdown: bool) -> None:
    """One table a scenario."""
    console = Console()
    for scenario in dict.fromkeys(result.scenario for result in results):
        rows = rows_of([result for result in results if result.scenario == scenario])
        if as_markdown:
            print(f"\n**{scenario}**\n")
            print("| " + " | ".join(COLUMNS) + " |")
            print("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
            for row in rows:
                print("| " + " | ".join(row) + " |")
            continue
        table = Table(title=scenario, title_justify="left")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Latency by class and policy: a bar for the mean, a tick for the 99th percentile."""
    scenarios = list(dict.fromkeys(result.scenario for result in results))
    figure = Figure(figsize=(1.5 + 3.6 * len(scenarios), 4.6))
    axes = figure.subplots(1, len(scenarios), sharey=True, squeeze=False)
    classes = ((0, "urgent", "#d1495b", -0.2), (1, "batch", "#8d99ae", 0.2))
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        found = [result for result in results if result.scenario == scenario]
        for priority, label, colour, offset in classes:
            shown = [
                (row + offset, result.classes[priority])
                for row, result in enumerate(found)
                if priority in result.classes
            ]
            places = [place for place, _ in shown]
            means = [figures.latency_mean for _, figures in shown]
            tails = [figures.latency_p99 for _, figures in shown]
            axis.barh(places, means, height=0.38, color=colour, label=f"{label}, mean")
            axis.hlines(places, means, tails, color=colour, linewidth=1)
            axis.plot(tails, places, "|", color=colour, markersize=9, label=f"{label}, p99")
        axis.set_title(scenario, fontsize=10)
        axis.set_xlabel("latency, seconds of the scenario")
        axis.set_yticks(range(len(found)), [result.policy for result in found])
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    labels = sorted(handles)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=140)


def record_of(results: Sequence[Result], backend: Backend, runs: int) -> dict[str, Any]:
    """Everything measured, and on what, ready for JSON."""
    record: dict[str, Any] = {"experiment": "exp002", "runs": runs}
    if isinstance(backend, ModelBackend):
        record["executor"] = backend.description
    record["results"] = [asdict(result) for result in results]
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; 1 if some output was not what the request generates on its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--simulated", action="store_true", help="fixed costs and a virtual clock; no model"
    )
    parser.add_argument("--model", help="a known name or a .gguf file (default: Headway's own)")
    parser.add_argument(
        "--limits", action="store_true", help="the scenarios in which preemption does not pay"
    )
    parser.add_argument(
        "--time-scale",
        type=float,
        help="seconds for a second of the scenario (default: 1 simulated; else "
        f"{STEPS_PER_SECOND} decode steps, measured)",
    )
    parser.add_argument(
        "--pool",
        type=int,
        default=2,
        help="how many of a scenario's largest request the KV pool holds (default: 2)",
    )
    parser.add_argument("--runs", type=int, default=1, help="of each; medians count (default: 1)")
    parser.add_argument("--threads", type=int, help="for the model (default: one a core)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, help="write a plot and the JSON to this directory")
    options = parser.parse_args(arguments)
    for name in ("runs", "pool"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, must be at least 1")
    if options.time_scale is not None and not options.time_scale > 0:
        parser.error(f"--time-scale is {options.time_scale}, must be above 0")

    backend: Backend
    if options.simulated:
        backend, title = SimulatedBackend(options.time_scale), "simulated"
    else:
        backend = ModelBackend(options.model, options.time_scale, options.threads)
        title = backend.description["model"]
    scenarios = LIMITS if options.limits else SCENARIOS
    results = run(backend, scenarios, runs=options.runs, pool=options.pool)
    record = record_of(results, backend, options.runs)
    if options.json:
        json.dump(record, sys.stdout, indent=2)
        print()
    else:
        print_tables(results, options.markdown)
        scales = [result.time_scale for result in results]
        print(
            f"\n{title}. Times are seconds of the scenario; one lasted {min(scales):.4g} to "
            f"{max(scales):.4g} s. Medians of {options.runs}."
        )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        name = "exp002-" + ("simulated" if options.simulated else "real")
        name += "-limits" if options.limits else ""
        (options.output / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        plot(results, f"Latency by policy: {title}", options.output / f"{name}.png")
    return 0 if all(result.outputs_equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
