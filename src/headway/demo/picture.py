"""The runs as a picture: a lane for every request, a panel for every policy, one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.core.config import PreemptionMode
from headway.demo.load import URGENT_PRIORITY
from headway.demo.report import RunSummary
from headway.demo.run import Run
from headway.engine.timeline import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_BATCH_COLOURS = {
    Phase.WAITING: "#e3e6ea",
    Phase.PREFILL: "#1b4f8f",
    Phase.DECODE: "#5b9bd8",
    Phase.PAUSED: "#f5b921",
    Phase.SWAPPED: "#8e5bb5",
    Phase.PREEMPTED: "#7a4a2b",
}
_URGENT_COLOURS = _BATCH_COLOURS | {
    Phase.WAITING: "#f9c6c6",
    Phase.PREFILL: "#8f0d1c",
    Phase.DECODE: "#e0202e",
}
_LABELS = {PreemptionMode.SWAP: "blocks swapped out", PreemptionMode.TAIL: "blocks given up"}
#: Height of a bar; waiting is thinner, so that what is served stands out.
_THICK, _THIN = 0.8, 0.35


def draw(runs: Sequence[Run], summaries: Sequence[RunSummary], path: Path) -> None:
    """Write the picture as a PNG file.

    Raises:
        OSError: it cannot be written.
    """
    # Not pyplot, which would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    heights = [max(len(run.requests), 1) for run in runs]
    figure = Figure(figsize=(13, 1.6 + 0.15 * sum(heights)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(runs), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, run, summary in zip(panels, runs, summaries, strict=True):
        _draw_run(axes, run, summary)
    panels[-1].set_xlabel("seconds")
    panels[-1].set_xlim(0, max(run.elapsed for run in runs) * 1.01)
    figure.suptitle("Headway: the urgent request goes next", fontsize=15, fontweight="bold")
    figure.legend(handles=_legend(runs), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format="png")


def _draw_run(axes: Axes, run: Run, summary: RunSummary) -> None:
    """Urgent requests on top, then batch work, each in order of arrival."""
    lanes = sorted(
        run.requests, key=lambda record: (record.priority, record.arrival_time, record.request_id)
    )
    places = {record.request_id: place for place, record in enumerate(lanes)}
    num_urgent = sum(record.priority == URGENT_PRIORITY for record in lanes)
    for place, record in enumerate(lanes):
        colours = _URGENT_COLOURS if record.priority == URGENT_PRIORITY else _BATCH_COLOURS
        segments = run.segments(record, run.end)
        for phase in Phase:
            spans = [
                (segment.start - run.start, segment.end - segment.start)
                for segment in segments
                if segment.phase is phase
            ]
            height = _THIN if phase is Phase.WAITING else _THICK
            axes.broken_barh(spans, (place - height / 2, height), color=colours[phase], lw=0)
    for mode, marker in _MARKERS.items():
        points = [
            (time - run.start, places[preemption.request_id])
            for time, preemption in run.preemptions
            if preemption.mode is mode
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **marker)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.axhline(num_urgent - 0.5, color="#888888", lw=0.8, ls=":")
    axes.set_yticks(
        [(num_urgent - 1) / 2, (num_urgent + len(lanes) - 1) / 2], ["urgent", "batch"], fontsize=11
    )
    axes.get_yticklabels()[0].set_color(_URGENT_COLOURS[Phase.DECODE])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    title = run.policy if run.policy != "fcfs" else "first come, first served"
    urgent = summary.classes.get("urgent")
    if urgent is not None:
        title += f": an urgent request's first token after {urgent.ttft_p50:.2f} s (median)"
    axes.set_title(title, loc="left", fontsize=12)


_MARKERS: dict[PreemptionMode, dict[str, Any]] = {
    PreemptionMode.SWAP: {"color": "#5a2a82", "marker": "v", "ms": 4.5, "ls": "", "mew": 0},
    PreemptionMode.TAIL: {"color": "#7a4a2b", "marker": "x", "ms": 4.5, "ls": "", "mew": 1.2},
}


def _legend(runs: Sequence[Run]) -> list[Any]:
    from matplotlib.lines import Line2D  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    shown = {
        segment.phase for run in runs for record in run.requests for segment in run.segments(record)
    }
    modes = {preemption.mode for run in runs for _, preemption in run.preemptions}
    urgent = [
        Patch(color=_URGENT_COLOURS[phase], label=f"urgent: {phase.value}")
        for phase in (Phase.WAITING, Phase.PREFILL, Phase.DECODE)
    ]
    batch = [
        Patch(color=colour, label=phase.value)
        for phase, colour in _BATCH_COLOURS.items()
        if phase in shown
    ]
    markers = [
        Line2D([], [], label=_LABELS[mode], **marker)
        for mode, marker in _MARKERS.items()
        if mode in modes
    ]
    return [*urgent, *batch, *markers]
