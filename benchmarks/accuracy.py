"""Is what Headway computes what the model says? Against ``transformers``, on the same file.

    pip install -e ".[accuracy]"
    python benchmarks/accuracy.py

Two parts: the ids that tokenizer and chat template give for 200 texts (``accuracy_tokenizer.py``),
and the distribution over the next token at a thousand positions each of prefill and decode
(``accuracy_model.py``), whose logits must be the same, bit for bit. Exits with status 1 if a figure
misses its target.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from headway.core.errors import HeadwayError
from headway.executor.precision import PRECISIONS
from headway.models.registry import DEFAULT_MODEL, resolve

_PARTS = ("tokenizer", "model")

#: The targets, for prefill and decode alike.
MAX_MEAN_KL = 0.005
MAX_NLL_DIFFERENCE = 0.01
MIN_TOP1_AGREEMENT = 0.95


_VERDICTS = {True: "[green]met[/]", False: "[red]missed[/]", None: "no target"}


class Figure(NamedTuple):
    """One line of the outcome; ``met`` is None where there is no target."""

    name: str
    value: str
    target: str
    met: bool | None


def main() -> int:
    """Run the parts that were asked for, print the figures, and write them down."""
    options = _options()
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            print(f'{package} is missing: pip install -e ".[accuracy]"', file=sys.stderr)
            return 2
    # Everything is local; without this, transformers asks the hub about a directory of one file.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn())
    results: dict[str, Any] = {"model": options.model}
    figures: list[Figure] = []
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            path = resolve(options.model, _download_progress(progress))
            if "tokenizer" in options.parts:
                results["tokenizer"] = _tokenizer(path, options.llama_server, progress)
                figures += _tokenizer_figures(results["tokenizer"])
            if "model" in options.parts:
                results["logits"] = _model(path, options, progress)
                figures += _model_figures(results["logits"])
    except HeadwayError as error:
        print(error, file=sys.stderr)
        return 2
    results["targets_met"] = all(figure.met is not False for figure in figures)
    _print(figures, Console())
    if options.json:
        record = {"benchmark": "accuracy", "machine": machine.describe(), "results": results}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        written = options.json
    else:
        written = machine.write("accuracy", results)
    console.print(f"written to {written}")
    return 0 if results["targets_met"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or .gguf path")
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to compare (both)"
    )
    parser.add_argument(
        "--positions", type=_positive, default=1_000, help="of prefill, and of decode (1000)"
    )
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results/")
    parser.add_argument(
        "--llama-server", metavar="URL", help="a llama-server of the same file, to compare ids with"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="of activations, a run each (both)",
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _download_progress(progress: Progress) -> Any:
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total >> 20)
        progress.update(tasks[stage], completed=done >> 20)

    return report


def _tokenizer(path: Path, llama_server: str | None, progress: Progress) -> dict[str, Any]:
    import accuracy_tokenizer as part  # noqa: PLC0415

    task = progress.add_task("tokenizer", total=part.NUM_TEXTS + part.NUM_CHATS)
    return part.compare(path, llama_server, lambda: progress.advance(task))


def _model(path: Path, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    import accuracy_model as part  # noqa: PLC0415

    from headway.engine.tokenizer import Tokenizer  # noqa: PLC0415
    from headway.executor.native import NativeExecutor  # noqa: PLC0415

    texts = part.sequences(Tokenizer(path), count=max(2, -(-options.positions // part.CONTEXT)))
    task = progress.add_task("reference", total=len(texts) * part.CONTEXT)
    reference = part.reference_logits(path, texts, lambda n: progress.advance(task, n))
    results: dict[str, Any] = {
        "reference": "transformers, float32, the same file dequantised",
        "context": part.CONTEXT,
        "text_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "runs": [],
    }
    for precision in options.precision:
        executor = NativeExecutor(
            path,
            max_num_seqs=part.STREAMS,
            max_model_len=part.CONTEXT,
            swap_space_bytes=0,
            precision=precision,
        )
        try:
            known = (executor, texts, reference, options.positions)
            advance = _bar(progress, f"{precision} prefill", options.positions)
            prefilled, digests = part.prefill(*known, advance)
            advance = _bar(progress, f"{precision} decode", options.positions)
            decoded, num_equal = part.decode(*known, digests, advance)
            run = {
                "precision": precision,
                "executor": executor.describe(),
                "prefill": prefilled.summary(),
                "decode": decoded.summary(),
            }
            run["decode"]["positions_with_the_bits_of_prefill"] = num_equal
            results["runs"].append(run)
        finally:
            executor.close()
    return results


def _bar(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    """A bar that goes on by so much with each call."""
    return functools.partial(progress.advance, progress.add_task(name, total=total))


def _tokenizer_figures(result: dict[str, Any]) -> list[Figure]:
    total, declared = result["texts"], "transformers_with_declared_pre_tokenizer"
    figures = []
    for name, equal in result["equal"].items():
        # As converted, transformers ignores the pre-tokenizer that the file declares: it is the
        # target only where that makes no difference.
        wanted = name != "transformers_as_converted" or equal >= result["equal"][declared]
        target, met = (str(total), equal == total) if wanted else ("", None)
        figures.append(Figure(f"same ids, {name}", f"{equal}/{total}", target, met))
    chats, equal = result["chat_prompts"], result["chat_prompts_equal"]
    figures.append(Figure("same chat prompts", f"{equal}/{chats}", str(chats), equal == chats))
    return figures


def _model_figures(result: dict[str, Any]) -> list[Figure]:
    figures = []
    for run in result["runs"]:
        for name in ("prefill", "decode"):
            found = run[name]
            kl, agreement = found["mean_kl"], found["top1_agreement"]
            difference = found["nll_difference"]
            label = f"{run['precision']} {name}"
            figures += [
                Figure(f"{label}: mean KL", f"{kl:.2g}", f"≤ {MAX_MEAN_KL}", kl <= MAX_MEAN_KL),
                Figure(
                    f"{label}: NLL {found['nll_headway']:.4f} for {found['nll_reference']:.4f}",
                    f"{difference:+.4f}",
                    f"within {MAX_NLL_DIFFERENCE}",
                    abs(difference) <= MAX_NLL_DIFFERENCE,
                ),
                Figure(
                    f"{label}: top-1 agreement",
                    f"{agreement:.1%}",
                    f"≥ {MIN_TOP1_AGREEMENT:.0%}",
                    agreement >= MIN_TOP1_AGREEMENT,
                ),
            ]
        decoded = run["decode"]
        equal, positions = decoded["positions_with_the_bits_of_prefill"], decoded["positions"]
        figures.append(
            Figure(
                f"{run['precision']} decode: logits bitwise those of prefill",
                f"{equal:,}",
                f"{positions:,}",
                equal == positions,
            )
        )
    return figures


def _print(figures: list[Figure], console: Console) -> None:
    table = Table("figure", "value", "target", "")
    for figure in figures:
        table.add_row(figure.name, figure.value, figure.target, _VERDICTS[figure.met])
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
