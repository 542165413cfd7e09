"""What the commands have in common: help by topic, engine settings, sizes, the startup bar."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand

from headway.core.config import PreemptionMode
from headway.core.policy import POLICIES

if TYPE_CHECKING:
    from headway.engine.config import Progress

__all__ = [
    "ENGINE_TOPIC",
    "KVCacheBytes",
    "MaxModelLen",
    "MaxNumBatchedTokens",
    "MaxNumSeqs",
    "PreemptionModeName",
    "PrefixCaching",
    "SchedulingPolicyName",
    "SwapSpaceBytes",
    "TopicCommand",
    "parse_bytes",
    "startup_bar",
]


class TopicCommand(TyperCommand):
    """Lists the options in its help by topic, which is their ``rich_help_panel``."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        topics: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                topic = getattr(param, "rich_help_panel", None) or default
                topics.setdefault(topic, []).append(record)
        for topic, records in topics.items():
            with formatter.section(topic):
                formatter.write_dl(records)


_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """``512M``, ``2GiB``, ``1.5G`` → bytes. K, Ki, KiB are 1024; KB is 1000.

    Raises:
        typer.BadParameter: it is no number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B?)", text.strip().upper())
    if match is None or (not match[2] and match[3] not in ("", "B")):
        raise typer.BadParameter(f"{text!r} is not a size such as 512M, 2GiB or 1000000")
    if not match[2]:
        return int(float(match[1]))
    return int(float(match[1]) * (1000 if match[3] == "B" else 1024) ** _UNITS[match[2]])


#: Of the options below.
ENGINE_TOPIC: Final = "Engine settings"

SchedulingPolicyName = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join(POLICIES)}]", help="Who goes next.", rich_help_panel=ENGINE_TOPIC
    ),
]
PreemptionModeName = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join(mode.value for mode in PreemptionMode)}]",
        help="How memory is taken from less urgent requests.",
        rich_help_panel=ENGINE_TOPIC,
    ),
]
MaxNumSeqs = Annotated[
    int, typer.Option(help="Requests in a step, at most.", rich_help_panel=ENGINE_TOPIC)
]
MaxNumBatchedTokens = Annotated[
    int, typer.Option(help="Tokens in a step, at most.", rich_help_panel=ENGINE_TOPIC)
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Longest context in tokens.", show_default="the model's", rich_help_panel=ENGINE_TOPIC
    ),
]
KVCacheBytes = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        show_default="a quarter of the free memory",
        help="Memory for keys and values, such as 512M or 2GiB.",
        rich_help_panel=ENGINE_TOPIC,
    ),
]
SwapSpaceBytes = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        show_default="1GiB, if there is room",
        help="Memory for what has to leave the KV cache; 0 for none.",
        rich_help_panel=ENGINE_TOPIC,
    ),
]
PrefixCaching = Annotated[
    bool, typer.Option(help="Compute equal beginnings once.", rich_help_panel=ENGINE_TOPIC)
]


_STAGES = {
    "download": "downloading the model",
    "extract": "unpacking the model",
    "checksum": "verifying the file",
    "convert": "converting the weights",
    "compile": "compiling",
    "check": "checking the arithmetic",
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
