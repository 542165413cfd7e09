"""What the commands show on a terminal: help by topic, and the startup bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from headway.engine.config import Progress

__all__ = ["TopicCommand", "startup_bar"]


class TopicCommand(TyperCommand):
    """Lists the options in its help by topic, which is their ``rich_help_panel``."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        topics: dict[str, list[Any]] = {"Arguments": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                topic = getattr(param, "rich_help_panel", None) or default
                topics.setdefault(topic, []).append(record)
        for topic, records in topics.items():
            if not records:
                continue
            with formatter.section(topic):
                formatter.write_dl(records)


_STAGES = {
    "download": "downloading the model",
    "extract": "unpacking the model",
    "checksum": "verifying the file",
    "convert": "converting the weights",
    "compile": "compiling the kernels",
    "try": "trying the kernels",
    "warm up": "warming up",
}


@contextmanager
def startup_bar() -> Iterator[Progress]:
    """Shows the stages of getting a model ready, if standard error is a terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=1.0)

        def progress(stage: str, fraction: float) -> None:
            bar.update(task, description=_STAGES.get(stage, stage), completed=fraction)

        yield progress
