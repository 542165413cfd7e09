"""The kernels neither read nor write outside the arrays that they are given.

They are compiled with every access and every operation checked (AddressSanitizer and UBSan), and
run in a process that has the sanitizer's library loaded: ``fuzz_steps.py``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_runs import PATHS

from headway.kernels.build import build
from headway.kernels.compilers import Compiler, compilers
from headway.models.registry import default_home

_SCRIPT = Path(__file__).with_name("fuzz_steps.py")
_SOURCE = Path(__file__).parents[2] / "src"

#: How a process ends that the sanitizer stops; Python itself ends with 1.
STOPPED = 77
#: Of a run, in seconds: a hundred times what it takes.
TIMEOUT = 1000

#: What can be wrong with a step.
REFUSALS = {
    "the numbers of tokens, sequences, blocks or samples do not fit together",
    "a token id is outside the vocabulary",
    "a sequence is longer than the context",
    "the sequences' tokens do not follow each other",
    "a block is outside the pool",
    "a block table is too short for its sequence",
    "a sampled row is outside the step",
    "the rows of logits are not sampled, or do not ascend",
    "the step has more tokens than there is scratch space for",
    "the stages do not ascend",
}


class Sanitizer(NamedTuple):
    """A compiler that has AddressSanitizer, and the library that does the checking."""

    compiler: Compiler
    runtime: Path


@pytest.fixture(scope="module")
def sanitizer() -> Sanitizer:
    for compiler in compilers():
        if compiler.is_zig or "clang" in compiler.version:
            continue  # they have none, or one that is found in another way
        question = [*compiler.command, "-print-file-name=libasan.so"]
        answer = subprocess.run(question, capture_output=True, text=True, check=False)
        runtime = Path(answer.stdout.strip())
        if not runtime.is_absolute():
            continue  # not installed
        contents = runtime.read_bytes()
        # Some systems have a text here, which tells the linker where the library is.
        named = re.search(rb"/\S+/libasan\.so[\w.]*", contents)
        if not contents.startswith(b"\x7fELF") and named:
            runtime = Path(named[0].decode())
        return Sanitizer(compiler, runtime)
    pytest.skip("there is no GCC with AddressSanitizer")


@pytest.fixture(scope="module", params=list(dict.fromkeys((PATHS[0], "portable"))))
def library(request: pytest.FixtureRequest, sanitizer: Sanitizer) -> Path:
    """The kernels of the best path of this machine, and of the one of all machines."""
    # A report names lines. Where variables are would double the time that GCC takes.
    words = [*sanitizer.compiler.command, "-fno-var-tracking"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join(words))
        return build(str(request.param), default_home() / "kernels", sanitize=True)


def run(
    sanitizer: Sanitizer, library: Path, mode: str, *, is_report_read: bool
) -> tuple[dict[str, int], str]:
    """What the script prints, and what the sanitizer says.

    ``is_report_read``: whether a report names functions and lines, which are slow to find.
    """
    options = f"exitcode={STOPPED}:symbolize={is_report_read:d}"
    environment = {
        "PYTHONPATH": str(_SOURCE),
        "LD_PRELOAD": str(sanitizer.runtime),
        # As much as can be is kept free beside every array, so that what is far outside it is
        # outside all others. Python does not give back all that it has when it ends.
        "ASAN_OPTIONS": f"{options}:redzone=2048:detect_leaks=0",
        "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
        # numpy has threads of its own, and nothing here for them to do.
        "OPENBLAS_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, str(_SCRIPT), str(library), mode],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert process.returncode == 0, f"status {process.returncode}:\n{process.stderr}"
    found: dict[str, int] = json.loads(process.stdout)
    return found, process.stderr


def test_steps_at_random_stay_inside_their_arrays(sanitizer: Sanitizer, library: Path) -> None:
    """The script itself checks what is refused, and what is written; see there."""
    outcomes, _ = run(sanitizer, library, "random", is_report_read=True)
    assert set(outcomes) == {"sound", "suspended", "computed", "products"} | REFUSALS
    # None of it is so rare that it would not be there with other random numbers.
    assert min(outcomes.values()) > 10, outcomes
    assert outcomes["sound"] > 150
    assert sum(outcomes[words] for words in REFUSALS) > 700


def test_an_array_that_is_one_element_short_is_noticed(sanitizer: Sanitizer, library: Path) -> None:
    """Each array in turn, of a step for which all elements of all arrays are needed."""
    ends, said = run(sanitizer, library, "cut", is_report_read=False)
    assert ends.pop("whole") == 0
    assert ends.pop("skewed") == STOPPED
    vectors = {"0.attn_norm", "0.ffn_norm", "0.qkv_bias", "0.q_norm", "0.k_norm", "output_norm"}
    matrices = {"0.qkv", "0.attn_output", "0.gate_up", "0.down", "embedding", "lm_head"}
    tables = {"layers", "cosines", "sines", "pool"}
    inputs = {"token_ids", "past_lens", "begins", "block_indices", "block_begins"}
    rows = {"sample_rows", "logit_rows", "stop"}
    outputs = {"hidden", "tokens", "maxima", "logits"}
    product = {"x", "y"}
    assert set(ends) == vectors | matrices | tables | inputs | rows | outputs | product
    assert set(ends.values()) == {STOPPED}
    # Each report says where the first byte is that is not the array's.
    assert said.count("ERROR: AddressSanitizer") == len(ends)
    assert len(re.findall(r"is located 0 bytes (?:to the right of|after)", said)) == len(ends)
    assert said.count("runtime error: load of misaligned address") == 1
