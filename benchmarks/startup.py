"""How long from starting Python to the first token, the first time and later, and in what memory.

The first time, the model's file is there; the kernels are not compiled, the weights not packed, and
which kernels are the fastest is not known. Every start is a process of its own. What the system
keeps of files in memory is left as it is: a start that follows another finds it warm.

Memory is what a process has resident, mapped weights included, after a prompt of a whole step and
steps of all slots; without the part of the KV pool that has been written to.
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
TARGETS = {"first": 40.0, "later": 1.5}
#: Beside the pool.
MAX_MEMORY_MB = 350.0

#: What a user's first program does; it tells how long each stage took, and, after a load, where its
#: memory is.
_PROGRAM = """
import json, time
begin = time.perf_counter()
stages, latest = {}, None
def progress(stage, fraction):
    global latest
    now = time.perf_counter()
    if latest is not None:  # stages take turns: kernels are compiled, tried, others compiled
        stages[latest[0]] = stages.get(latest[0], 0.0) + now - latest[1]
    latest = stage, now
from headway import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(progress=progress)
loaded = time.perf_counter()
llm.generate("The capital of France is", SamplingParams(max_tokens=1, temperature=0.0))
generated = time.perf_counter()
seconds = {"import": imported - begin, "load": loaded - imported, "generate": generated - loaded}
seconds |= {f"load: {stage}": took for stage, took in stages.items()}
print(json.dumps(seconds), flush=True)

import ctypes, mmap, os
import numpy as np
params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
llm.generate([[number] * 300 for number in range(100, 108)] * 8, params, use_tqdm=False)
with open("/proc/self/statm") as file:
    resident = int(file.read().split()[1]) * mmap.PAGESIZE
pool = llm.engine.executor._store.pool
pages = np.zeros(-(-pool.nbytes // mmap.PAGESIZE), np.uint8)
mincore = ctypes.CDLL(None, use_errno=True).mincore
mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
if mincore(pool.ctypes.data, pool.nbytes, pages.ctypes.data):
    raise OSError(ctypes.get_errno(), "mincore")
touched = int((pages & 1).sum()) * mmap.PAGESIZE
memory = {"resident": resident, "touched pool": touched, "beside the pool": resident - touched}
print(json.dumps({name: size / 1e6 for name, size in memory.items()}), flush=True)
llm.close()
"""


def start(home: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds until the first token and of the stages on the way, and memory in MB."""
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
        memory_line = process.stdout.readline()
    if process.returncode:
        sys.exit(f"the program ended with status {process.returncode}")
    return {"total": total, **json.loads(line)}, json.loads(memory_line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="first starts; twice as many later")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    model = resolve(DEFAULT_MODEL)
    place = model.relative_to(default_home())
    runs: dict[str, list[dict[str, float]]] = {"first": [], "later": [], "memory MB": []}
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as directory:
            home = Path(directory)
            (home / place).parent.mkdir(parents=True)
            (home / place).symlink_to(model.resolve())
            runs["first"].append(start(home)[0])
            for _ in range(2):
                seconds, memory = start(home)
                runs["later"].append(seconds)
                runs["memory MB"].append(memory)
    results: dict[str, Any] = {
        name: {figure: machine.summary([run[figure] for run in of]) for figure in of[0]}
        for name, of in runs.items()
    }
    beside = results["memory MB"]["beside the pool"]
    met = {name: results[name]["total"]["median"] <= TARGETS[name] for name in TARGETS}
    met["memory"] = beside["median"] <= MAX_MEMORY_MB
    targets = TARGETS | {"memory MB beside the pool": MAX_MEMORY_MB}
    file = machine.write("startup", results | {"targets": targets, "met": met})
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return not all(met.values())
    for name, target in TARGETS.items():
        total = results[name]["total"]
        print(
            f"{name + ' start':<12} {total['median']:6.2f} s to the first token "
            f"(target {target:g} s, best {total['min']:.2f} s)"
        )
        for stage, seconds in results[name].items():
            if stage != "total":
                print(f"  {stage:<16} {seconds['median']:6.2f} s")
    print(
        f"memory beside the pool {beside['median']:.0f} MB (target {MAX_MEMORY_MB:.0f} MB); of the "
        f"pool, {results['memory MB']['touched pool']['median']:.0f} MB had been written to"
    )
    print(f"written to {file}")
    return not all(met.values())


if __name__ == "__main__":
    sys.exit(main())
