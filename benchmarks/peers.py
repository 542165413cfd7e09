"""Other engines for CPUs and ours, in turn on one machine: speed, and urgent requests under load.

Speed: a prompt of 512 tokens, and decoding at batches of 1 to 64, each engine by its own library,
in a process of its own for each round; the engines take turns, and medians over the rounds count.
Under load: the load of ``urgent_under_load.py`` on each engine's server, at each number of slots.

Every engine computes the same model, made from the one GGUF file, and gets the same prompts. One
that is not installed, does not know what is known to be the answer, or ends by itself is left out,
and the reason is kept. ``docs/peers.md`` says how each is set up.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import urgent_under_load as load
import uvloop
from openai_load import Client, Prompts, allow_open_files, serve
from peers.engines import ENGINES, HEADWAY, Engine
from peers.workload import BATCHES, PREFILL_TOKENS, PROMPT_TOKENS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from headway.engine.tokenizer import Tokenizer
from headway.models import registry

#: Seconds that a round of one engine may take; compiling is most of it.
_PATIENCE = 900.0
#: Sets of prompts of each kind in a round; fewer of a batch that takes a minute.
_SETS = 3
_LARGE_BATCH = 16
_SEED = 11
#: A prompt that a sound model goes on with in a way that is known, however coarse its weights.
_CHECK, _KNOWN = "1, 2, 3, 4, 5, 6, 7,", "8, 9, 10"

RATES = (f"prefill {PREFILL_TOKENS}", *(f"decode {batch}" for batch in BATCHES))
#: Figure under load, its unit, by how much it is multiplied to be shown in it, and whether less is
#: better.
LOAD_COLUMNS = (
    ("idle ttft p50", "ms", 1e3, True),
    ("idle end-to-end p50", "ms", 1e3, True),
    ("urgent ttft p50", "ms", 1e3, True),
    ("urgent ttft p99", "ms", 1e3, True),
    ("urgent end-to-end p99", "ms", 1e3, True),
    ("background tokens/s", "", 1.0, False),
    ("background tokens/s without urgent", "", 1.0, False),
)


class Failure(Exception):
    """An engine cannot be measured; the text is the reason, in one line."""


class Run:
    """The engines that still take part, and what is known of the others.

    Attributes:
        models: name → what it reads, of those that take part.
        failures: name → why it does not.
    """

    def __init__(self, progress: Progress) -> None:
        self.models: dict[str, Path] = {}
        self.failures: dict[str, str] = {}
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def expect(self, num_parts: int) -> None:
        self._progress.update(self._task, total=num_parts)

    def part(self, name: str, what: str, do: Callable[..., Any], *arguments: Any) -> Any:
        """What ``do`` returns; None if it failed, which ends the engine's part."""
        self._progress.update(self._task, description=f"{name}: {what}")
        try:
            return do(*arguments)
        except Failure as failure:
            self.failures[name] = f"{what}: {failure}"
            self.models.pop(name, None)
            self._progress.console.print(f"{name} is left out. {what}: {failure}", markup=False)
            return None
        finally:
            self._progress.advance(self._task)


# --- speed ----------------------------------------------------------------------------------------


def make_work(tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Prompts for one round, as token ids; each differs from all others from its first words on."""
    texts = Prompts(seed)

    def prompt(length: int) -> list[int]:
        tokens = tokenizer.encode(texts.next(length))
        assert len(tokens) >= length  # a word is a token at least
        return tokens[:length]

    return {
        "check": tokenizer.encode(_CHECK),
        "warm up": {
            "prefill": prompt(PREFILL_TOKENS),
            "decode": [prompt(PROMPT_TOKENS) for _ in range(8)],
        },
        "prefill": [prompt(PREFILL_TOKENS) for _ in range(_SETS)],
        "decode": {
            batch: [
                [prompt(PROMPT_TOKENS) for _ in range(batch)]
                for _ in range(1 if batch >= _LARGE_BATCH else _SETS)
            ]
            for batch in BATCHES
        },
    }


def measure_speed(
    engine: Engine, model: Path, work: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    """The figures of one round, in a process of its own.

    Raises:
        Failure: there are none, or the model is not what it should be.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, output = Path(scratch) / "work.json", Path(scratch) / "figures.json"
        given.write_text(json.dumps(work))
        run_in(engine, str(engine.script), str(model), str(given), str(output))
        try:
            figures: dict[str, Any] = json.loads(output.read_text())
        except (OSError, ValueError) as error:
            raise Failure(f"no figures were written: {error}") from None
    answer = tokenizer.decode(figures.pop("check"))
    if _KNOWN not in answer:
        raise Failure(f"{_CHECK!r} is continued with {answer!r}")
    rates = {f"prefill {PREFILL_TOKENS}": figures["prefill"]}
    rates |= {f"decode {batch}": rate for batch, rate in figures["decode"].items()}
    return {"rates": rates, "about": figures["about"] | {"answer": answer}}


def run_in(engine: Engine, *arguments: str) -> list[str]:
    """Run Python in the engine's environment; the lines of its standard output.

    Raises:
        Failure: it did not end well, or not in time.
    """
    if not engine.is_installed:
        raise Failure(f"not installed; `{engine.install}` says why")
    # What this process imports from is of another environment.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen(
            [engine.python, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=complained,
            env=variables | engine.variables(),
            start_new_session=True,
        )
        try:
            status = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failure(f"no end within {_PATIENCE:.0f} s") from None
        finally:
            # An engine may have processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        lines = said.read().splitlines()
        if status:
            complained.seek(0)
            complaint = complained.read() or "\n".join(lines)
            raise Failure(f"{last_line(complaint)} (status {status})")
    return lines


def last_line(text: str) -> str:
    """Of what a program said before it ended: usually the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


# --- under load -----------------------------------------------------------------------------------


def measure_load(engine: Engine, model: Path, slots: int, what: load.Load) -> dict[str, Any]:
    """The figures of the engine's server.

    Raises:
        Failure: it did not start, or did not serve.
    """
    command = engine.serve(model, slots)
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints), serve(command) as server:
            figures = uvloop.run(load.measure(Client(server.base_url), what, server))
    except SystemExit as error:
        # A number is a status; the reason stands before the line that says which command it was.
        said = complaints.getvalue().rpartition("\n" + repr(command))[0]
        raise Failure(error.code if isinstance(error.code, str) else last_line(said)) from None
    return figures | {"command": command}


# --- tables ---------------------------------------------------------------------------------------


def compare(
    figures: dict[str, dict[str, float]], columns: Sequence[tuple[str, bool]]
) -> dict[str, float]:
    """Ours divided by the best peer's, for each column (its name, and whether less is better)."""
    ratios = {}
    for column, less_is_better in columns:
        others = [
            known[column] for name, known in figures.items() if name != HEADWAY and column in known
        ]
        ours = figures.get(HEADWAY, {}).get(column)
        if others and ours is not None:
            ratios[column] = round(ours / (min if less_is_better else max)(others), 3)
    return ratios


def show(results: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    if speed := results.get("speed"):
        table = Table("", title="tokens/s")
        for rate in RATES:
            table.add_column(rate, justify="right")
        for name, rates in speed.items():
            table.add_row(name, *(f"{rates[rate]['median']:,.0f}" for rate in RATES))
        ratios = results["speed ratios"]
        table.add_row(
            f"{HEADWAY} ÷ best peer",
            *(f"{ratios[rate]:.2f} ×" if rate in ratios else "–" for rate in RATES),
            style="bold",
        )
        console.print(table)
    for slots, servers in results.get("under load", {}).items():
        table = Table("", title=f"urgent requests under load, {slots}")
        for figure, unit, *_ in LOAD_COLUMNS:
            table.add_column(f"{figure} ({unit})" if unit else figure, justify="right")
        for name, figures in servers.items():
            failures = sum(figures["failures"].values())
            cells = [f"{figures[figure] * factor:,.0f}" for figure, _, factor, _ in LOAD_COLUMNS]
            table.add_row(f"{name} ({failures} requests failed)" if failures else name, *cells)
        ratios = results["load ratios"][slots]
        table.add_row(
            f"{HEADWAY} ÷ best peer",
            *(
                f"{ratios[figure]:.2f} ×" if figure in ratios else "–"
                for figure, *_ in LOAD_COLUMNS
            ),
            style="bold",
        )
        console.print(table)
    for name, reason in results["failures"].items():
        console.print(f"{name} is left out. {reason}", markup=False, highlight=False)


# --- all ------------------------------------------------------------------------------------------


class Results:
    """Written whenever something is known, so that a run that is stopped is not in vain."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Any] = {}

    def write(self, **values: Any) -> Path:
        self.values |= values
        return machine.write(self.name, self.values)


def measure_all(arguments: argparse.Namespace, progress: Progress, results: Results) -> None:
    what = load.load_of(arguments)
    names = [name for name in ENGINES if name in arguments.only]
    run = Run(progress)
    slots = [] if arguments.skip_load else arguments.slots
    rounds = 0 if arguments.skip_speed else arguments.rounds
    run.expect(len(names) * (1 + rounds + len(slots)))
    gguf = registry.resolve(registry.DEFAULT_MODEL)
    tokenizer = Tokenizer(gguf)

    for name in names:
        converted = run.part(name, "converting the model", convert, ENGINES[name], gguf)
        if converted is not None:
            run.models[name] = converted
    results.write(failures=run.failures)

    rates: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    about: dict[str, Any] = {}
    for number in range(rounds):
        work = make_work(tokenizer, _SEED + number)
        for name, model in list(run.models.items()):
            figures = run.part(
                name,
                f"speed, round {number + 1} of {rounds}",
                measure_speed,
                ENGINES[name],
                model,
                work,
                tokenizer,
            )
            if figures is None:
                continue
            about[name] = figures["about"]
            for rate, value in figures["rates"].items():
                rates[name][rate].append(value)
            results.write(**summarise(rates), engines=about, failures=run.failures)

    under_load: dict[str, dict[str, Any]] = {}
    ratios: dict[str, Any] = {}
    columns = [(figure, less_is_better) for figure, _, _, less_is_better in LOAD_COLUMNS]
    for number in slots:
        servers = under_load[f"{number} slots"] = {}
        for name, model in list(run.models.items()):
            figures = run.part(
                name,
                f"under load, {number} slots",
                measure_load,
                ENGINES[name],
                model,
                number,
                what,
            )
            if figures is not None:
                servers[name] = figures
            ratios[f"{number} slots"] = compare(servers, columns)
            loaded = {"under load": under_load, "load ratios": ratios, "load": vars(what)}
            results.write(**loaded, failures=run.failures)


def convert(engine: Engine, gguf: Path) -> Path:
    """The model as the engine reads it.

    Raises:
        Failure: it could not be made.
    """
    if engine.converter is None:
        return gguf
    directory = registry.default_home() / "models"
    return Path(run_in(engine, *engine.converter(gguf, directory))[-1])


def summarise(rates: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians and extremes of each rate, and ours to the best peer's."""
    measured = {name: kinds for name, kinds in rates.items() if kinds}
    speed = {
        name: {rate: machine.summary(values) for rate, values in kinds.items()}
        for name, kinds in measured.items()
    }
    medians = {
        name: {rate: statistics.median(values) for rate, values in kinds.items()}
        for name, kinds in measured.items()
    }
    return {"speed": speed, "speed ratios": compare(medians, [(rate, False) for rate in RATES])}


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Servers' complaints are collected while it is shown.
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, redirect_stderr=False, redirect_stdout=False) as bar:
        yield bar


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3, help="of speed; medians count")
    parser.add_argument("--skip-speed", action="store_true", help="only under load")
    parser.add_argument("--skip-load", action="store_true", help="only speed")
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[64, 16], help="of the servers, under load"
    )
    load.add_load_options(parser)
    parser.add_argument("--results", default="peers", help="name of the file in benchmarks/results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("argument --rounds: must be at least 1")
    allow_open_files(4096)
    results = Results(arguments.results)
    with progress_bar() as progress:
        measure_all(arguments, progress, results)
    if arguments.json:
        json.dump(results.values, sys.stdout, indent=2)
        return
    show(results.values)
    print(f"written to {results.write()}")


if __name__ == "__main__":
    main()
