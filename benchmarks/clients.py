"""Other people's load generators against ``headway serve``: what each of them measures.

Each runs a short load with its own ideas of arrivals, prompts and percentiles, so their figures are
not for comparing with each other. They show that the server answers what these clients send.
``docs/clients.md`` has the command for each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import machine
from clients_commands import GENERATORS, Generator, Job, Load
from clients_tokenizer import write_tokenizer
from openai_load import serve
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from headway.models import registry

#: Beyond the time of the load: to start, to make prompts, to wait for the last answers.
_PATIENCE = 300.0
#: Of what a failed generator said; vLLM's last 25 are about its own shutdown.
_LAST_LINES = 40

#: figure, its unit, and by how much it is multiplied to be shown in it.
_COLUMNS = (
    ("requests", "", 1),
    ("failed", "", 1),
    ("ttft p50", "ms", 1e3),
    ("ttft p99", "ms", 1e3),
    ("tpot p50", "ms", 1e3),
    ("tpot p99", "ms", 1e3),
    ("tokens/s", "", 1),
    ("probes", "", 1),
    ("probe p50", "ms", 1e3),
    ("probe p99", "ms", 1e3),
)


def measure(generator: Generator, job: Job) -> dict[str, Any]:
    """Run a generator once: its figures, or ``error`` beside them or instead of them.

    A generator whose every request is refused often ends as if all were well, so failed requests
    are an error, and so are no answered ones.
    """
    log = job.scratch / "output.log"
    environment = {k: v for k, v in (os.environ | generator.variables).items() if v}
    # What the server imports from is of another Python than the generator's.
    environment.pop("PYTHONPATH", None)
    command = [str(generator.environment / "bin" / generator.program), *generator.command(job)]
    with log.open("wb") as output, _running(command, output, environment, job.scratch) as process:
        try:
            status = process.wait(job.load.seconds + _PATIENCE)
            error = f"ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            error = f"no end within {job.load.seconds + _PATIENCE:.0f} s"
    figures: dict[str, Any] = {}
    try:
        figures = generator.figures(job.scratch)
    except (OSError, LookupError, TypeError, ValueError) as problem:
        error = error or f"its result cannot be read: {type(problem).__name__}: {problem}"
    else:
        why = figures.pop("why", None)
        if figures["failed"]:
            error = f"{figures['failed']} requests failed" + (f": {why}" if why else "")
        elif not figures["requests"]:
            error = error or "no request was answered"
    if error is not None:
        lines = log.read_text(errors="replace").splitlines()
        figures |= {"error": error, "said": [*lines[-_LAST_LINES:], error]}
    return figures


@contextmanager
def _running(
    command: list[str], output: Any, environment: dict[str, str], directory: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=directory,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def version(generator: Generator) -> str | None:
    """The installed version; None if the generator is not installed."""
    code = f"from importlib.metadata import version; print(version({generator.package!r}))"
    python = generator.environment / "bin" / "python"
    if not (generator.environment / "bin" / generator.program).exists():
        return None
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def run(
    names: list[str], command: str, model: str, load: Load, keep: Path | None
) -> dict[str, Any]:
    """Measure with each generator in turn, against one server.

    Args:
        command: that starts the server, without the model.
        keep: where the generators' own files stay; None if they need not.
    """
    results: dict[str, Any] = {}
    console = Console(stderr=True)
    for name in names:
        if found := version(GENERATORS[name]):
            results[name] = {"version": found}
        else:
            reason = f"not installed: {GENERATORS[name].needs}"
            results[name] = {"skipped": reason}
            console.print(f"{name}: skipped, {reason}", highlight=False)
    installed = [name for name in names if "version" in results[name]]
    if not installed:
        return results
    temporary = nullcontext(keep) if keep else tempfile.TemporaryDirectory()
    with temporary as directory, serve(f"{command} {shlex.quote(model)}") as server:
        tokenizer = Path(directory).resolve() / "tokenizer"
        write_tokenizer(registry.resolve(model), tokenizer)
        served = Path(model).name.removesuffix(".gguf")
        for name in installed:
            scratch = tokenizer.parent / name.replace(" ", "-")
            scratch.mkdir(parents=True, exist_ok=True)
            job = Job(server.base_url, served, tokenizer, scratch, load)
            title = f"{name} {results[name]['version']}"
            with _progress(console, title) as conclude:
                start = perf_counter()
                figures = measure(GENERATORS[name], job)
                figures["seconds"] = round(perf_counter() - start, 1)
                conclude(figures.get("error") or f"{figures['requests']} requests")
            if "error" in figures:
                said = figures.pop("said")
                console.print("\n".join(said), style="dim", markup=False, highlight=False)
            results[name] |= {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in figures.items()
            }
    return results


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Any]:
    columns = (SpinnerColumn(finished_text="•"), TextColumn("{task.description}", markup=False))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"{title} …", total=1)
        yield lambda outcome: progress.update(task, description=f"{title}: {outcome}", completed=1)


def show(results: dict[str, Any]) -> None:
    """Print the figures, a row for each generator that ran, as ``docs/clients.md`` has them."""
    rows = {name: result for name, result in results.items() if "requests" in result}
    table = Table(box=box.MARKDOWN)
    table.add_column("client", no_wrap=True)
    for figure, unit, _ in _COLUMNS:
        table.add_column(f"{figure} ({unit})" if unit else figure, justify="right")
    for name, result in rows.items():
        cells = [
            f"{result[figure] * factor:,.0f}" if figure in result else "–"
            for figure, _, factor in _COLUMNS
        ]
        table.add_row(f"{name} {result['version']}", *cells)
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GENERATORS, help="of the clients")
    parser.add_argument("--model", default=registry.DEFAULT_MODEL, help="a name or a .gguf file")
    parser.add_argument(
        "--serve",
        default="headway serve --port {port}",
        metavar="COMMAND",
        help="that starts the server; {port} stands for the port, and the model is appended",
    )
    parser.add_argument("--seconds", type=int, default=30, help="of each client's load")
    parser.add_argument("--streams", type=int, default=8, help="of guidellm and aiperf")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="of vllm and inference-perf, requests a second"
    )
    parser.add_argument("--probe-rate", type=float, default=2.0, help="of vllm, probes a second")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="new directory for what the clients write")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    if arguments.keep and arguments.keep.exists():
        parser.error(f"argument --keep: {arguments.keep} exists already")
    load = Load(
        arguments.seconds,
        arguments.streams,
        arguments.rate,
        arguments.probe_rate,
        arguments.prompt_tokens,
        arguments.output_tokens,
    )
    names = arguments.only or list(GENERATORS)
    results = run(names, arguments.serve, arguments.model, load, arguments.keep)
    path = machine.write("clients", results | {"load": load._asdict(), "command": arguments.serve})
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
    else:
        show(results)
        print(f"written to {path}")
    sys.exit(any("error" in result for result in results.values()))


if __name__ == "__main__":
    main()
