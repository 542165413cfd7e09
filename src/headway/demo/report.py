"""What the runs of the demo came to: a table, a sentence, and the same as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from headway.core.config import PreemptionMode
from headway.demo.load import BATCH_PRIORITY, URGENT_PRIORITY
from headway.demo.record import RequestRecord
from headway.demo.run import Run
from headway.engine.metrics import ClassSummary, summarize

__all__ = ["RunSummary", "as_data", "conclusion", "num_equal_outputs", "summarize_runs", "table"]

#: The ladder's ways to yield, cheapest first.
_MODES = [
    mode.value
    for mode in (
        PreemptionMode.PAUSE,
        PreemptionMode.TAIL,
        PreemptionMode.SWAP,
        PreemptionMode.RECOMPUTE,
    )
]
#: Runs whose steps took so many times as long as the other's are not quite comparable.
_NOISE = 1.2
_NAMES = {URGENT_PRIORITY: "urgent", BATCH_PRIORITY: "batch"}


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run in numbers.

    Attributes:
        policy: its name.
        seconds: from the start to the last token.
        num_unfinished: requests that the time limit cut off, by class; 0 normally.
        classes: of the finished requests, by ``"urgent"`` and ``"batch"``.
        full_step_ms: median duration of a step that decodes with (almost) all slots; None if
            there was none.
        tokens_per_second: generated, by class, from the start to the class's last token.
        preemptions: how often requests of a class yielded, by ``PreemptionMode.value``.
    """

    policy: str
    seconds: float
    full_step_ms: float | None
    num_unfinished: dict[str, int]
    classes: dict[str, ClassSummary]
    tokens_per_second: dict[str, float]
    preemptions: dict[str, dict[str, int]]


def summarize_runs(runs: Sequence[Run]) -> list[RunSummary]:
    """The numbers of runs that are over; latencies are of the requests that came in all of them."""
    common = set.intersection(*(set(run.records) for run in runs))
    return [_summarize(run, common) for run in runs]


def _summarize(run: Run, common: set[str]) -> RunSummary:
    finished = [record for record in run.finished if record.request_id in common]
    metrics = [record.metrics for record in finished if record.metrics is not None]
    classes = {_NAMES[summary.priority]: summary for summary in summarize(metrics)}
    yielded: dict[str, Counter[str]] = {name: Counter() for name in _NAMES.values()}
    for _, preemption in run.preemptions:
        yielded[_NAMES[preemption.priority]][preemption.mode.value] += 1
    return RunSummary(
        policy=run.policy,
        seconds=run.elapsed,
        full_step_ms=median(run.full_step_seconds) * 1e3 if run.full_step_seconds else None,
        num_unfinished={
            name: sum(
                record.priority == priority for record in run.requests if not record.is_served
            )
            for priority, name in _NAMES.items()
        },
        classes=classes,
        tokens_per_second={
            name: summary.num_output_tokens / (_last_finish(finished, summary.priority) - run.start)
            for name, summary in classes.items()
        },
        preemptions={name: dict(counts) for name, counts in yielded.items()},
    )


def _last_finish(records: Sequence[RequestRecord], priority: int) -> float:
    times = [record.finish_time for record in records if record.priority == priority]
    return max(time for time in times if time is not None)


def num_equal_outputs(runs: Sequence[Run]) -> tuple[int, int]:
    """(requests whose tokens are the same in all runs, requests that finished in all)."""
    outputs = [{record.request_id: record.token_ids for record in run.finished} for run in runs]
    common = set.intersection(*(set(tokens) for tokens in outputs))
    equal = sum(all(tokens[name] == outputs[0][name] for tokens in outputs) for name in common)
    return equal, len(common)


def table(runs: Sequence[RunSummary]) -> Table:
    """Urgent and batch requests, the policies side by side."""
    result = Table(
        box=box.SIMPLE_HEAD, title="The same load under two policies", title_style="bold"
    )
    result.add_column("")
    columns = [(name, run) for name in _NAMES.values() for run in runs]
    for name, run in columns:
        style = "bright_red" if name == "urgent" else "cyan"
        result.add_column(f"{name}\n{run.policy}", justify="right", header_style=style)

    def add(label: str, cell: Callable[[str, RunSummary], str]) -> None:
        cells = [cell(name, run) if name in run.classes else "–" for name, run in columns]
        result.add_row(label, *cells)

    add("requests finished", lambda name, run: f"{run.classes[name].num_requests}")
    if any(sum(run.num_unfinished.values()) for run in runs):
        add("cut off by the time limit", lambda name, run: f"{run.num_unfinished[name]}")
    add("first token, p50", lambda name, run: f"{run.classes[name].ttft_p50:.2f} s")
    add("first token, p99", lambda name, run: f"{run.classes[name].ttft_p99:.2f} s")
    add("end to end, p50", lambda name, run: f"{run.classes[name].latency_p50:.2f} s")
    add("end to end, p99", lambda name, run: f"{run.classes[name].latency_p99:.2f} s")
    add("tokens/s", lambda name, run: f"{run.tokens_per_second[name]:.0f}")
    for mode in _MODES:
        add(f"yielded: {mode}", partial(_num_yielded, mode))
    add("tokens recomputed", lambda name, run: f"{run.classes[name].num_recomputed_tokens}")
    return result


def _num_yielded(mode: str, name: str, run: RunSummary) -> str:
    return f"{run.preemptions[name].get(mode, 0)}"


def conclusion(priority: RunSummary, fcfs: RunSummary, equal: tuple[int, int]) -> str:
    """One sentence: what ranking gave the urgent requests, and what it took from the rest."""
    ours, theirs = priority.classes.get("urgent"), fcfs.classes.get("urgent")
    batch, other = priority.classes.get("batch"), fcfs.classes.get("batch")
    if ours is None or theirs is None or batch is None or other is None:
        return "The machine was too slow to finish both runs in time, so there is no comparison."
    slower = (batch.latency_mean / other.latency_mean - 1) * 100
    changed = f"{abs(slower):.0f} % {'longer' if slower > 0 else 'less long'} on average"
    ratio = theirs.ttft_p50 / ours.ttft_p50
    text = (
        f"Urgent requests got their first token {ratio:.{0 if ratio >= 10 else 1}f} times sooner "
        f"({ours.ttft_p50:.2f} s instead of {theirs.ttft_p50:.2f} s, median), and batch "
        f"requests took {changed}"
    )
    same, common = equal
    which = f"all {common}" if same == common else f"{same} of {common}"
    text += f"; {which} outputs are the same, token for token."
    if priority.full_step_ms is not None and fcfs.full_step_ms is not None:
        slowdown = priority.full_step_ms / fcfs.full_step_ms
        if not 1 / _NOISE < slowdown < _NOISE:
            text += (
                " (Something else kept this machine busy: the same step took "
                f"{slowdown:.1f} times as long in the first run, so compare with care.)"
            )
    return text


def as_data(runs: Sequence[RunSummary], equal: tuple[int, int]) -> dict[str, Any]:
    """For ``--json``; times in seconds."""
    return {
        "runs": [asdict(run) for run in runs],
        "num_equal_outputs": equal[0],
        "num_compared_outputs": equal[1],
    }
