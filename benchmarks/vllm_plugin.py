"""vLLM with and without the plug-in, in turn: urgent requests under load, overhead, outputs.

16: the load of ``urgent_under_load.py`` at 16 sequences. The background streams start at once and
    stay in step, as when a batch is submitted: an urgent request arrives in the middle of a wave.
    With ``--spread``, also with streams out of step.
64: the same at 64 sequences, more streams, and a KV cache of a quarter of what 64 sequences need.
overhead: what the plug-in adds to ``schedule``, and what aborting a waiting request takes.
outputs: greedy outputs with and without it, compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import urgent_under_load as load
import uvloop
import vllm_plugin_outputs
from openai_load import Client, Prompts, Server, allow_open_files, serve
from tokenizers import Tokenizer
from vllm_plugin_server import BLOCK_SIZE, VLLM, num_preemptions

from headway.models import registry

ROOT = Path(__file__).parent.parent
#: As ``tests_vllm/convert_model.py`` writes it.
MODEL = registry.default_home() / "models" / f"{registry.DEFAULT_MODEL}-hf-bf16"
SECTIONS = ("16", "64", "overhead", "outputs")
STREAMS_64 = 96

#: Ratios to plain vLLM: figure → at most (<) or at least (>) this.
TTFT, END_TO_END = "plain's urgent ttft p99 / its", "plain's urgent end-to-end p99 / its"
KEPT = "background tokens/s of plain's"
DEFAULT_TARGETS = {TTFT: (">", 30.0), END_TO_END: (">", 6.0), KEPT: (">", 0.98)}
SHARE_TARGETS = {TTFT: (">", 30.0), END_TO_END: (">", 18.0), KEPT: (">", 0.85)}
SHORT_OF_BLOCKS_TARGETS = {TTFT: (">", 3.0)}
#: With equals, and when urgent ones displace others.
OWN = "{}: own time of plain's schedule"
OVERHEAD_TARGETS = {OWN.format(steps): ("<", 0.10) for steps in ("equals", "urgent")}
OVERHEAD_TARGETS["abort"] = ("<", 0.001)

LOAD_ROWS = (
    *load.ROWS,
    ("preemptions", "", 1),
    (TTFT, "×", 1),
    (END_TO_END, "×", 1),
    (KEPT, "%", 100),
)
OVERHEAD_ROWS = (
    *(
        row
        for steps in ("equals", "urgent")
        for row in (
            (f"{steps}: schedule", "µs", 1e6),
            (f"{steps}: own time", "µs", 1e6),
            (OWN.format(steps), "%", 100),
            (f"{steps}: update_from_output", "µs", 1e6),
        )
    ),
    ("abort", "µs", 1e6),
    ("longest abort", "µs", 1e6),
)
#: section → the title and rows of its table.
TABLES = {
    "16": ("16 sequences, streams in step", LOAD_ROWS),
    "16 spread": ("16 sequences, streams out of step", LOAD_ROWS),
    "64": ("64 sequences, a quarter of the blocks", LOAD_ROWS),
    "overhead": ("scheduler alone: 256 running, 10,000 waiting (abort: 100,000)", OVERHEAD_ROWS),
}


def say(text: str) -> None:
    """Progress, beside the results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def measure(server: Server, what: load.Load) -> dict[str, Any]:
    client = Client(server.base_url)
    figures = await load.measure(client, what, server)
    return figures | {"preemptions": await num_preemptions(client)}


def compare_load(
    title: str,
    vllm: VLLM,
    max_num_seqs: int,
    flags: list[str],
    what: load.Load,
    plugins: dict[str, tuple[dict[str, Any], dict[str, tuple[str, float]]]],
) -> dict[str, Any]:
    """Figures of plain vLLM and of each plug-in: name → settings, targets."""
    results: dict[str, Any] = {}
    for name, (headway, targets) in {"plain": (None, {}), **plugins}.items():
        say(f"{title}: {name}")
        command = vllm.serve(max_num_seqs, *flags, headway=headway)
        with serve(command) as server:
            say(f"{title}: {name} answers")
            figures = uvloop.run(measure(server, what))
        plain = results.get("plain", figures)
        for ratio, figure in ((TTFT, "ttft"), (END_TO_END, "end-to-end")):
            p99 = f"urgent {figure} p99"
            figures[ratio] = round(plain[p99] / figures[p99], 3)
        figures[KEPT] = round(figures["background tokens/s"] / plain["background tokens/s"], 4)
        results[name] = load.judged(figures, targets) | {"command": command}
    return results


def quarter_of_need(model: Path, num_seqs: int) -> int:
    """Blocks for a quarter of so many background completions at their full lengths."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompt = tokenizer.encode(Prompts(0).next(load.BACKGROUND_WORDS)).ids
    blocks = -(-(len(prompt) + load.BACKGROUND_TOKENS) // BLOCK_SIZE)
    return num_seqs * blocks // 4


def measure_overhead(vllm: VLLM, share: str) -> dict[str, Any]:
    script = ROOT / "benchmarks" / "vllm_plugin_overhead.py"
    measured = vllm.run(str(script), "--model-dir", str(vllm.model), "--share", share)
    results: dict[str, Any] = {}
    for name, figures in measured.items():
        for steps in ("equals", "urgent"):
            plain = measured["plain"][f"{steps}: schedule"]
            figures[OWN.format(steps)] = figures[f"{steps}: own time"] / plain
        rounded = {figure: round(value, 7) for figure, value in figures.items()}
        results[name] = load.judged(rounded, {} if name == "plain" else OVERHEAD_TARGETS)
    return results


def compare_outputs(vllm: VLLM) -> dict[str, Any]:
    """The plug-in against plain vLLM; and, in bf16, plain against itself in another order."""
    results: dict[str, Any] = {}
    for dtype, servers in vllm_plugin_outputs.ROUNDS.items():
        rounds: dict[str, vllm_plugin_outputs.Round] = {}
        for name, headway, seeds in servers:
            say(f"outputs: {dtype}, {name}")
            flags = (*vllm_plugin_outputs.FLAGS, "--dtype", dtype)
            command = vllm.serve(vllm_plugin_outputs.MAX_NUM_SEQS, *flags, headway=headway)
            with serve(command) as server:
                for seed in seeds:
                    client = Client(server.base_url)
                    rounds[f"{name}, {seed}"] = uvloop.run(vllm_plugin_outputs.run(client, seed))
        first, *others = rounds
        for other in others:
            compared = vllm_plugin_outputs.compare(rounds[first], rounds[other])
            results[f"{dtype}: {first} and {other}"] = compared
    return results


def show_outputs(results: dict[str, Any]) -> None:
    for name, found in results.items():
        print(
            f"{name}: {found['differ']} of {found['requests']} outputs differ; "
            f"preemptions {' and '.join(f'{number:.0f}' for number in found['preemptions'])}"
        )
        if found["differ"]:
            print(
                f"  first at token {found['first at token'][0]} to {found['first at token'][-1]}; "
                f"there the chosen token led by {statistics.median(found['margins there']):.3f} in "
                f"the median, {found['margins there'][-1]:.3f} at most "
                f"({found['margin of all tokens, median']:.2f}: median of all tokens); "
                f"{found['chose the other way round']} of them chose the other's next best"
            )
        print(
            f"  the log-probability of a token that both chose differs by "
            f"{found['noise, p50']:.2g} in the median, {found['noise, p99']:.2g} in the 99th "
            f"percentile, {found['noise, largest']:.2g} at most"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--spread", action="store_true", help="also 16 with streams out of step")
    parser.add_argument("--share", default="40ms", help="the step time of the third server")
    load.add_load_options(parser)
    parser.add_argument(
        "--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="where vLLM is"
    )
    parser.add_argument("--model-dir", type=Path, default=MODEL, help="a Hugging Face directory")
    parser.add_argument("--eager", action="store_true", help="start vLLM sooner, do not compile")
    parser.add_argument(
        "--results", default="vllm_plugin", help="name of the file in benchmarks/results"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    vllm = VLLM(arguments.vllm_python, arguments.model_dir, arguments.eager)
    allow_open_files(4096)
    in_step = load.load_of(arguments, spread=False)
    shared = f"share {arguments.share}"
    plugins = {
        "plug-in": ({}, DEFAULT_TARGETS),
        shared: ({"share": arguments.share}, SHARE_TARGETS),
    }
    short_of_blocks = [
        *("--block-size", str(BLOCK_SIZE)),
        *("--num-gpu-blocks-override", str(quarter_of_need(vllm.model, 64))),
    ]
    spread, many = replace(in_step, spread=True), replace(in_step, streams=STREAMS_64)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "16": lambda: compare_load("16", vllm, 16, [], in_step, plugins),
        "16 spread": lambda: compare_load("16 spread", vllm, 16, [], spread, plugins),
        "64": lambda: compare_load(
            "64", vllm, 64, short_of_blocks, many, {"plug-in": ({}, SHORT_OF_BLOCKS_TARGETS)}
        ),
        "overhead": lambda: measure_overhead(vllm, arguments.share),
        "outputs": lambda: compare_outputs(vllm),
    }
    results: dict[str, Any] = {"vllm": vllm.describe(), "load": vars(in_step)}
    say(", ".join(f"{name} {value}" for name, value in results["vllm"].items()))
    for name, measure_section in sections.items():
        if name in arguments.only or (name == "16 spread" and arguments.spread):
            say(name)
            results[name] = measure_section()
            path = machine.write(arguments.results, results)  # of what was measured so far
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return
    for name, (title, rows) in TABLES.items():
        if name in results:
            load.show(results[name], title, rows)
    if "outputs" in results:
        show_outputs(results["outputs"])
    print(f"written to {path}")


if __name__ == "__main__":
    main()
