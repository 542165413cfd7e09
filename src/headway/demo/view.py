"""The demo while it runs: a picture of the moment on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from headway.core.config import PreemptionMode
from headway.core.request import RequestStatus
from headway.demo.load import NUM_SLOTS, URGENT_PRIORITY
from headway.demo.record import RequestRecord
from headway.demo.run import Run
from headway.engine.metrics import percentile
from headway.engine.timeline import Phase

__all__ = ["View", "make_view", "render"]

_REDRAW_SECONDS = 0.2
_REPORT_SECONDS = 5.0

#: Character and style of a phase in a lane; urgent requests decode in their own colour.
_LOOKS = {
    Phase.WAITING: ("·", "bright_black"),
    Phase.PREFILL: ("▆", "bright_cyan"),
    Phase.DECODE: ("▆", "blue"),
    Phase.PAUSED: ("─", "yellow"),
    Phase.SWAPPED: ("╌", "magenta"),
    Phase.PREEMPTED: ("╌", "red"),
}
_URGENT = "bold bright_red"
_STATUS_STYLES = {
    RequestStatus.RUNNING: "green",
    RequestStatus.PAUSED: "yellow",
    RequestStatus.SWAPPED: "magenta",
    RequestStatus.PREEMPTED: "red",
    RequestStatus.WAITING: "bright_black",
}


class View(Protocol):
    """Shows runs, one after the other."""

    def say(self, text: str) -> None:
        """Tell what is being done."""
        ...

    def follow(self, run: Run, title: str) -> None:
        """Show this run from now on, until it is over."""
        ...


@contextmanager
def make_view(console: Console) -> Iterator[View]:
    """The view that suits ``console``; the terminal is as before when it closes."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(console)
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield _Screen(live)


class _Lines:
    """For logs: a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def follow(self, run: Run, title: str) -> None:
        self.say(title)
        last = 0.0

        def report(*_: object) -> None:
            nonlocal last
            if run.elapsed - last >= _REPORT_SECONDS:
                last = run.elapsed
                counts = ", ".join(f"{count} {name}" for name, count in _counts(run).items())
                self.say(
                    f"{run.elapsed:4.0f} s  {counts}; pool {_usage(run):.0%} used; "
                    f"{_speed(run):.0f} tokens/s; yielded: {_yielded(run)}"
                )

        run.engine.listeners.append(report)


class _Screen:
    """For terminals: everything at once, several times a second."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._summary = ""

    def say(self, text: str) -> None:
        self._live.update(Text(text), refresh=True)

    def follow(self, run: Run, title: str) -> None:
        last = -_REDRAW_SECONDS

        def redraw(*_: object) -> None:
            nonlocal last
            # Drawing takes time from the engine, so not after every step.
            if run.elapsed - last >= _REDRAW_SECONDS:
                last = run.elapsed
                width, height = self._live.console.size
                self._live.update(render(run, title, width, height), refresh=True)

        run.engine.listeners.append(redraw)


def render(run: Run, title: str, width: int, height: int) -> Group:
    """The run as it stands, in at most ``height`` lines of at most ``width`` columns."""
    lines = [*_header(run, title, width), Text()]
    footer = _footer(run)
    lines += _rows(run, width, height - len(lines) - len(footer))
    lines += [Text()] * (height - len(lines) - len(footer)) + footer
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return Group(*lines[:height])


def _header(run: Run, title: str, width: int) -> list[Text]:
    description, statistics = run.engine.description, run.engine.statistics
    num_held = round(statistics.kv_cache_usage * description.num_blocks)
    num_swapped = round(statistics.swap_space_usage * description.num_swap_blocks)
    clock = f"{run.elapsed:.1f} s"
    title_line = Text(title, "bold")
    title_line.pad_right(max(1, width - len(title) - len(clock)))
    title_line.append(clock, "bold")

    pool = f" {num_held}/{description.num_blocks} blocks"
    swap = f"  swap {num_swapped}" if num_swapped else ""
    bar_width = max(5, min(60, width - len(pool) - len(swap) - 9))
    filled = round(statistics.kv_cache_usage * bar_width)
    pool_line = Text.assemble(
        "KV pool ", ("█" * filled, "green" if statistics.kv_cache_usage < 0.9 else "yellow"),
        ("░" * (bar_width - filled), "bright_black"), pool, (swap, "magenta"),
    )  # fmt: skip

    counts = Text(f"{NUM_SLOTS} slots  ")
    styles = {status.value: style for status, style in _STATUS_STYLES.items()}
    for name, count in _counts(run).items():
        counts.append(f"{name} ", "bright_black").append(f"{count}  ", styles.get(name, ""))
    yielded = Text.assemble(
        ("tokens/s ", "bright_black"), f"{_speed(run):.0f}", ("  yielded ", "bright_black"),
        _yielded(run),
    )  # fmt: skip
    urgent = [record for record in run.requests if record.priority == URGENT_PRIORITY]
    ttfts = [
        record.first_token_time - record.arrival_time
        for record in urgent
        if record.first_token_time is not None
    ]
    served = Text.assemble(
        ("urgent ", _URGENT), f"{len(urgent)} arrived, {len(ttfts)} begun",
        f", first token after {percentile(ttfts, 50):.2f} s (median)" if ttfts else "",
    )  # fmt: skip
    return [title_line, pool_line, counts, yielded, served]


def _footer(run: Run) -> list[Text]:
    legend = Text()
    for phase, (character, style) in _LOOKS.items():
        if phase is not Phase.PREEMPTED:
            legend.append(character * 2, style).append(f" {phase.value}  ", "bright_black")
    legend.append("▆▆", _URGENT).append(" urgent", "bright_black")
    latest = Text()
    answers = [record for record in run.finished if record.priority == URGENT_PRIORITY]
    text = " ".join(answers[-1].text.split()) if answers else ""
    if text:
        latest = Text.assemble((f"{answers[-1].request_id}  ", _URGENT), (f"“{text}”", "italic"))
    return [latest, legend]


def _rows(run: Run, width: int, room: int) -> list[Text]:
    """Requests, those that are under way first, as far as there is room."""
    now = run.engine.clock()
    ordered = sorted(run.requests, key=_listing)
    if len(ordered) <= room:
        return [_row(run, record, now, width) for record in ordered]
    if room < 1:
        return []
    hidden = Counter(_state(record) for record in ordered[room - 1 :])
    more = ", ".join(f"{count} {name}" for name, count in hidden.items())
    rows = [_row(run, record, now, width) for record in ordered[: room - 1]]
    return [*rows, Text(f"… and {more}", "bright_black")]


def _listing(record: RequestRecord) -> tuple[int, int, float, str]:
    """Under way, then waiting, then finished (the latest first); urgent ones first in each."""
    if record.finish_time is not None:
        return 2, 0, -record.finish_time, record.request_id
    group = 1 if record.status is RequestStatus.WAITING else 0
    return group, record.priority, record.arrival_time, record.request_id


def _row(run: Run, record: RequestRecord, now: float, width: int) -> Text:
    is_urgent = record.priority == URGENT_PRIORITY
    row = Text(f"{record.request_id:<10}", _URGENT if is_urgent else "cyan")
    row.append(f"{_state(record):<10}", _STATUS_STYLES.get(record.status, "bright_black"))
    row.append(f"{len(record.token_ids):>4}/{record.arrival.max_tokens:<4} ")
    lane_width = width - len(row)
    if lane_width >= 8:
        row.append_text(_lane(run, record, now, lane_width))
    return row


def _lane(run: Run, record: RequestRecord, now: float, width: int) -> Text:
    """The request's life so far on a line; the whole width is as long as the run should take."""
    horizon = max(run.load.seconds, run.elapsed)
    cells = [(" ", "")] * width
    for segment in run.segments(record, now):
        character, style = _LOOKS[segment.phase]
        if record.priority == URGENT_PRIORITY and segment.phase in (Phase.PREFILL, Phase.DECODE):
            style = _URGENT
        first = int((segment.start - run.start) / horizon * width)
        last = int((segment.end - run.start) / horizon * width)
        for column in range(max(first, 0), min(last, width - 1) + 1):
            cells[column] = (character, style)
    return Text.assemble(*cells)


def _state(record: RequestRecord) -> str:
    return "finished" if record.status.is_finished else record.status.value


def _counts(run: Run) -> dict[str, int]:
    states = Counter(_state(record) for record in run.requests)
    names = ["running", "paused", "swapped", "preempted", "waiting", "finished"]
    return {name: states[name] for name in names if states[name] or name != "preempted"}


def _usage(run: Run) -> float:
    return run.engine.statistics.kv_cache_usage


def _speed(run: Run) -> float:
    return run.num_output_tokens / run.elapsed if run.elapsed > 0 else 0.0


def _yielded(run: Run) -> str:
    counts = run.num_preemptions
    shown = (PreemptionMode.PAUSE, PreemptionMode.TAIL, PreemptionMode.SWAP)
    text = "  ".join(f"{mode.value} {counts[mode]}" for mode in shown)
    recompute = counts[PreemptionMode.RECOMPUTE]
    return f"{text}  recompute {recompute}" if recompute else text
