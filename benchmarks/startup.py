"""How long from starting Python to the first token, the first time and later.

The first time, the model's file is there and its converted weights are not. Every start is a
process of its own. What the system keeps of files in memory is left as it is: a start that follows
another finds it warm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import machine

from headway.models.registry import DEFAULT_MODEL, default_home, resolve

#: Seconds.
TARGETS = {"first": 15.0, "later": 3.0}

#: What a user's first program does; it tells how long each stage took.
_PROGRAM = """
import json, time
begin = time.perf_counter()
stages = {}
def progress(stage, fraction):
    start, _ = stages.setdefault(stage, (time.perf_counter(), 0.0))
    stages[stage] = (start, time.perf_counter() - start)
from headway import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(progress=progress)
loaded = time.perf_counter()
llm.generate("The capital of France is", SamplingParams(max_tokens=1, temperature=0.0))
generated = time.perf_counter()
seconds = {"import": imported - begin, "load": loaded - imported, "generate": generated - loaded}
seconds |= {f"load: {stage}": took for stage, (_, took) in stages.items()}
print(json.dumps(seconds), flush=True)
llm.close()
"""


def start(home: Path) -> dict[str, float]:
    """Seconds until the first token, and of the stages on the way."""
    begin = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HEADWAY_HOME": str(home)},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        total = perf_counter() - begin
    if process.returncode:
        sys.exit(f"the program ended with status {process.returncode}")
    stages: dict[str, float] = json.loads(line)
    return {"total": total, **stages}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="first starts; twice as many later")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    model = resolve(DEFAULT_MODEL)
    place = model.relative_to(default_home())
    runs: dict[str, list[dict[str, float]]] = {"first": [], "later": []}
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as directory:
            home = Path(directory)
            (home / place).parent.mkdir(parents=True)
            (home / place).symlink_to(model.resolve())
            runs["first"].append(start(home))
            runs["later"] += [start(home), start(home)]
    results: dict[str, Any] = {
        name: {stage: machine.summary([one[stage] for one in starts]) for stage in starts[0]}
        for name, starts in runs.items()
    }
    met = {name: results[name]["total"]["median"] <= TARGETS[name] for name in TARGETS}
    file = machine.write("startup", results | {"targets": TARGETS})
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return not all(met.values())
    for name, stages in results.items():
        print(
            f"{name + ' start':<12} {stages['total']['median']:6.2f} s to the first token "
            f"(target {TARGETS[name]:.0f} s, best {stages['total']['min']:.2f} s)"
        )
        for stage, seconds in stages.items():
            if stage != "total":
                print(f"  {stage:<16} {seconds['median']:6.2f} s")
    print(f"written to {file}")
    return not all(met.values())


if __name__ == "__main__":
    sys.exit(main())
