"""Names the machine a benchmark ran on, and writes results where they are kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from headway.kernels.compilers import compilers
from headway.kernels.paths import available_paths

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "tokenizers", "torch", "transformers")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, kernels, versions: what a figure depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    flags = fields.get("flags", "").split()
    isa = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return {
        "processor": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cores": os.cpu_count(),
        "isa": [flag for flag in isa if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "kernels": {
            "paths": available_paths(),
            "compiler": next((compiler.version for compiler in compilers()), None),
        },
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def write(name: str, results: dict[str, Any]) -> Path:
    """Store ``results`` with machine, commit and date as ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": _commit(),
        "machine": describe(),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes, because the machine is shared."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": len(values),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        root = Path(__file__).parent
        git = partial(subprocess.run, cwd=root, capture_output=True, text=True)
        commit = git(["git", "rev-parse", "--short", "HEAD"], check=True).stdout.strip()
        # Results written a moment ago do not make the code another.
        changed = git(["git", "diff", "--quiet", "HEAD", "--", "../src", "*.py"]).returncode
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    json.dump(describe(), sys.stdout, indent=2)
