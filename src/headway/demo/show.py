"""The demo from end to end: measure, serve twice, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from headway.core.errors import ConfigError
from headway.demo.load import (
    DEFAULT_SECONDS,
    MAX_MODEL_LEN,
    NUM_BATCH,
    NUM_SLOTS,
    make_load,
    read_prompts,
)
from headway.demo.picture import draw
from headway.demo.report import as_data, conclusion, num_equal_outputs, summarize_runs, table
from headway.demo.run import Run, measure_speed, policy_engine
from headway.demo.view import make_view
from headway.engine.llm import LLM

__all__ = ["check_output", "settings", "show"]

_POLICIES = ("priority", "fcfs")
#: A run is cut off after so many times the seconds it should take.
_PATIENCE = 1.75


def settings(model: str, preemption_mode: str) -> dict[str, Any]:
    """What the demo's ``LLM`` is built with; its pool holds eight full contexts, to be cut down."""
    return {
        "model": model,
        "preemption_mode": preemption_mode,
        "max_num_seqs": NUM_SLOTS,
        "max_model_len": MAX_MODEL_LEN,
    }


def check_output(output: str) -> Path:
    """The path of the picture, refused before anything has taken time.

    Raises:
        ConfigError: it cannot be written there.
    """
    path = Path(output)
    try:
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write the picture to {output!r}: {error.strerror}") from None
    return path


def show(
    llm: LLM,
    picture: Path,
    seed: int = 0,
    seconds: float = DEFAULT_SECONDS,
    as_json: bool = False,
) -> None:
    """Serve the same load under each policy; then print the comparison and draw the picture.

    Progress goes to standard error, results to standard output.
    """

    def encode(prompt: str) -> list[int]:
        if llm.tokenizer.chat_template is None:
            return llm.tokenizer.encode(prompt)
        return llm.render_chat([{"role": "user", "content": prompt}])

    description = llm.engine.description
    with make_view(Console(stderr=True)) as view:
        view.say("measuring how fast this machine is …")
        speed = measure_speed(llm.engine, encode(read_prompts()["batch"][0]))
        load = make_load(
            encode, speed, description.block_size, description.num_blocks, seed, seconds
        )
        runs = []
        for number, policy in enumerate(_POLICIES, 1):
            run = Run(
                policy_engine(llm.engine, policy, load.num_blocks), load, limit=seconds * _PATIENCE
            )
            runs.append(run)
            view.follow(run, f"Headway demo · run {number} of {len(_POLICIES)}: {policy}")
            run.serve()
    summaries = summarize_runs(runs)
    equal = num_equal_outputs(runs)
    draw(runs, summaries, picture)
    if as_json:
        print(json.dumps(as_data(summaries, equal) | {"picture": str(picture)}))
        return
    num_urgent = max(len(run.records) for run in runs) - NUM_BATCH
    console = Console()
    console.print(
        f"\n{NUM_BATCH} batch requests and {num_urgent} urgent ones, {NUM_SLOTS} slots, a KV pool "
        f"of {load.num_blocks} blocks of {description.block_size} tokens",
        highlight=False,
    )
    console.print(table(summaries))
    console.print(conclusion(summaries[0], summaries[1], equal), style="bold", highlight=False)
    console.print(
        f"Every request's way through both runs: {picture}", highlight=False, soft_wrap=True
    )
