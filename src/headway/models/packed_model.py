"""A model's packed weights: converted once, kept, and mapped into memory at a start, not read.

The packed model lives in one directory per key::

    <key>/weights.bin     the bytes of the arrays and matrices, at multiples of 64 and of 4,096
    <key>/index.json      their names, types, shapes and offsets; and a checksum

A directory appears under its name only when it is whole (a temporary neighbour is renamed); one
that does not add up is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from headway.core.errors import ModelError
from headway.models.conversion import check_sizes, matrices, packed_slabs, vectors
from headway.models.gguf import GGUFWeights, ModelConfig
from headway.models.packing import PANEL_SIZE, PackedMatrix, packed_bytes

__all__ = ["PackedMatrix", "PackedModel", "Progress", "load_packed"]

AnyArray = npt.NDArray[Any]
ByteArray = npt.NDArray[np.uint8]

#: Called with the stage and the fraction of it that is done, 0 … 1.
Progress = Callable[[str, float], None]

#: Part of the key: to be raised whenever the same file would be packed differently.
_LAYOUT_VERSION: Final = 1

_ARRAY_ALIGNMENT: Final = 64
#: A page, so that a matrix can be advised about and touched by itself.
_MATRIX_ALIGNMENT: Final = 4096


@dataclass(frozen=True)
class PackedModel:
    """A model's weights as the kernels want them; read-only, and mapped while any of them is held.

    Attributes:
        config: of the model.
        arrays: by name: ``output_norm`` ``[hidden_size]``, ``rope_frequencies``
            ``[head_dim / 2]``, and per layer ``<i>.attn_norm``, ``<i>.ffn_norm``
            ``[hidden_size]``, ``<i>.qkv_bias`` ``[q_size + 2·kv_size]``, ``<i>.q_norm``,
            ``<i>.k_norm`` ``[head_dim]`` (biases and q/k norms where the model has them). float32,
            but for the frequencies, which are float64.
        matrices: by name: ``embedding`` and ``lm_head`` ``[vocab_size, hidden_size]`` (``lm_head``
            is absent if it is the embedding), and per layer ``<i>.qkv``
            ``[q_size + 2·kv_size, hidden_size]`` in the half-split RoPE form, ``<i>.attn_output``
            ``[hidden_size, q_size]``, ``<i>.gate_up`` ``[2·intermediate_size, hidden_size]``, 16
            rows of gate, then the same 16 of up, and so on, and ``<i>.down``
            ``[hidden_size, intermediate_size]``.
        directory: to keep derived facts in. It may be gone: see ``load_packed``.
    """

    config: ModelConfig
    arrays: Mapping[str, AnyArray]
    matrices: Mapping[str, PackedMatrix]
    directory: Path


def load_packed(path: Path, home: Path, progress: Progress | None = None) -> PackedModel:
    """The packed weights of a GGUF file: from the cache, or converted and put there.

    Args:
        path: of the file.
        home: directory of the cache; made if it is missing. If it cannot be, the weights are kept
            in a temporary directory for the life of the process, which has no name any more.
        progress: told of the stages ``checksum`` and ``convert``; not called on a cache hit.

    Raises:
        DamagedModel, UnsupportedModel: the file cannot be used.
        ModelError: there is no room for the result.
    """
    weights = GGUFWeights(path)
    check_sizes(weights)
    report = progress or _ignore
    source = f"{_checksum(path, home, report)} packed"
    key = hashlib.sha256(f"{source} {_LAYOUT_VERSION}".encode()).hexdigest()[:32]
    entry = _load(home / key) or _build(weights, home, key, source, report)
    return PackedModel(weights.config, entry.arrays, entry.matrices, entry.directory)


class _Entry(NamedTuple):
    arrays: Mapping[str, AnyArray]
    matrices: Mapping[str, PackedMatrix]
    directory: Path


def _build(weights: GGUFWeights, home: Path, key: str, source: str, report: Progress) -> _Entry:
    """Convert, and give the result its name in ``home``, if there can be one."""
    target, parent = home / key, home
    try:
        try:
            home.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=home))
        except OSError:
            parent = Path(tempfile.gettempdir())
            scratch = Path(tempfile.mkdtemp(prefix="headway-"))
        try:
            _write(scratch, source, weights, report)
            if parent is home:
                _publish(scratch, target, source)
            entry = _load(target if parent is home else scratch)
        finally:
            # What is mapped stays readable after its name is gone.
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{weights.path}: the converted model cannot be written to {parent}: "
            f"{error.strerror or error}"
        ) from error
    assert entry is not None, f"{target} was just written"
    return entry


def _publish(scratch: Path, target: Path, source: str) -> None:
    """Give a whole entry its name, and remove those of the same source that it replaces."""
    # A damaged entry is in the way of the rename. Another process may win the race, and then its
    # entry is as good as ours.
    shutil.rmtree(target, ignore_errors=True)
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    for other in target.parent.iterdir():
        if other != target and not other.name.startswith("."):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads((other / "index.json").read_text())["source"] == source:
                    shutil.rmtree(other, ignore_errors=True)


def _ignore(stage: str, fraction: float) -> None:
    """Progress that is not asked for."""


class _Output:
    """A file that is written array by array, and the sum of its 64-bit words."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sum = 0

    def align(self, alignment: int) -> int:
        """Fill up with zeros; returns the size, which is where the next array begins."""
        self.size += self._file.write(b"\0" * (-self.size % alignment))
        return self.size

    def write(self, values: AnyArray) -> None:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.size += self._file.write(data.data)
        self.sum = (self.sum + _sum_words(data)) % 2**64


def _sum_words(data: ByteArray) -> int:
    """Finds what goes wrong by itself: a torn write, a flipped bit."""
    return int(data.view(np.uint64).sum(dtype=np.uint64))


def _write(directory: Path, source: str, weights: GGUFWeights, report: Progress) -> None:
    found = list(matrices(weights))
    done, total = 0, sum(len(matrix.order) * matrix.inputs for matrix in found)
    index: dict[str, Any] = {"source": source, "arrays": {}, "matrices": {}}
    with (directory / "weights.bin").open("wb") as file:
        output = _Output(file)
        for name, values in vectors(weights):
            index["arrays"][name] = {
                "dtype": values.dtype.str,
                "shape": values.shape,
                "offset": output.align(_ARRAY_ALIGNMENT),
            }
            output.write(values)
        for matrix in found:
            index["matrices"][matrix.name] = {
                "outputs": -(-len(matrix.order) // PANEL_SIZE) * PANEL_SIZE,
                "inputs": matrix.inputs,
                "format": matrix.format,
                "offset": output.align(_MATRIX_ALIGNMENT),
            }
            for rows, data in packed_slabs(matrix, weights):
                output.write(data)
                done += rows * matrix.inputs
                report("convert", done / total)
    index |= {"size": output.size, "sum": output.sum}
    (directory / "index.json").write_text(json.dumps(index))


def _load(directory: Path) -> _Entry | None:
    """The entry, or None if there is none or it does not add up. Maps; copies nothing."""
    try:
        index = json.loads((directory / "index.json").read_text())
        file = directory / "weights.bin"
        if file.stat().st_size != index["size"]:
            return None
        data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
        if _sum_words(data) != index["sum"]:
            return None
        arrays = {}
        for name, entry in index["arrays"].items():
            dtype, shape, offset = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["offset"]
            length = math.prod(shape) * dtype.itemsize
            arrays[name] = data[offset : offset + length].view(dtype).reshape(shape)
        packed = {}
        for name, entry in index["matrices"].items():
            outputs, inputs, weight_format = (entry[key] for key in ("outputs", "inputs", "format"))
            length = packed_bytes(outputs, inputs, weight_format)
            panels = data[entry["offset"] : entry["offset"] + length]
            if panels.size != length:
                return None
            packed[name] = PackedMatrix(panels, outputs, inputs, weight_format)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return _Entry(arrays, packed, directory)


def _checksum(path: Path, home: Path, report: Progress) -> str:
    """sha256 of a file, remembered by its path, size and time of change."""
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    memory = home / "checksums" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    try:
        remembered = memory.read_text()
        if len(remembered) == hashlib.sha256().digest_size * 2:
            return remembered
    except (OSError, ValueError):
        pass
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            done += len(piece)
            report("checksum", done / max(1, status.st_size))
    checksum = digest.hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        scratch = memory.with_suffix(f".{os.getpid()}")
        scratch.write_text(checksum)
        scratch.replace(memory)
    except OSError:
        pass  # it is computed again next time
    return checksum
