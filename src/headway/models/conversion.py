"""From a file's weights to the arrays the graph is built from, and the cache that keeps them.

Two formats, chosen by what the processor multiplies fastest *and* the same way at every batch size
(``docs/architecture.md`` has the measurements):

``u8``
    groups of 32 weights along the input, each ``scale · (q − 128)`` with a float16 scale. With
    bf16 arithmetic it is the fastest one, and a quarter of the size.
``f32``
    the dequantised weights themselves. Without bf16 the 8-bit kernels are slower than plain
    float32 in a prefill, and choose their blocking by the number of rows.

The converted arrays live in one directory per key::

    converted/<key>/weights.bin     the arrays' bytes, each at a multiple of 64
    converted/<key>/index.json      their names, types, shapes and offsets; and a checksum

Neither OpenVINO's own model file nor its compiled blob can hold a paged-attention operator built
this way (reading them back fails), so what is cached is ours: mapped into memory at a start, not
read. A directory appears under its name only when it is whole (a temporary neighbour is renamed);
one that does not add up is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from headway.core.errors import ModelError
from headway.models.gguf import GGUFWeights

__all__ = [
    "GROUP_SIZE",
    "ConvertedWeights",
    "Progress",
    "WeightFormat",
    "convert",
    "load_converted",
]

AnyArray = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

WeightFormat = Literal["u8", "f32"]

#: Called with the stage and the fraction of it that is done, 0 … 1.
Progress = Callable[[str, float], None]

#: Input weights that share a scale in the ``u8`` format.
GROUP_SIZE: Final = 32

#: Part of the key: to be raised whenever the arrays of the same file would come out differently.
_LAYOUT_VERSION: Final = 2
_ALIGNMENT: Final = 64
_ZERO_POINT: Final = 128


class ConvertedWeights(Mapping[str, AnyArray]):
    """The arrays by name, and the directory to keep derived facts in.

    Names: ``embedding``, ``output_norm``, ``rope_frequencies``, ``lm_head`` (absent if tied), and
    per layer ``<i>.attn_norm``, ``<i>.qkv``, ``<i>.qkv_bias``, ``<i>.q_norm``, ``<i>.k_norm``,
    ``<i>.attn_output``, ``<i>.ffn_norm``, ``<i>.gate_up``, ``<i>.down`` (biases and q/k norms only
    where the model has them). A matrix in the ``u8`` format is ``[out, groups, group]`` uint8 with
    its scales ``[out, groups, 1]`` under ``<name>.scale``; all else is float32 (``embedding`` is
    float16 in the ``u8`` format, and the LM head then has its own matrix even where it is tied).
    """

    def __init__(
        self, arrays: Mapping[str, AnyArray], weight_format: WeightFormat, directory: Path
    ) -> None:
        self._arrays = arrays
        self.weight_format = weight_format
        self.directory = directory

    def __getitem__(self, name: str) -> AnyArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def convert(weights: GGUFWeights, weight_format: WeightFormat) -> Iterator[tuple[str, AnyArray]]:
    """The converted arrays one after the other, so that only one of them is in memory."""
    assert weight_format in get_args(WeightFormat)
    config = weights.config

    def matrix(name: str, values: FloatArray) -> Iterator[tuple[str, AnyArray]]:
        if weight_format == "f32":
            yield name, values
        else:
            quantized, scales = quantize_u8(values)
            yield name, quantized
            yield f"{name}.scale", scales

    embedding = weights.embedding()
    if weight_format == "f32":
        yield "embedding", embedding
        if not config.tied_embeddings:
            yield "lm_head", weights.lm_head()
    else:
        yield "embedding", embedding.astype(np.float16)
        yield from matrix("lm_head", embedding if config.tied_embeddings else weights.lm_head())
    del embedding
    yield "output_norm", weights.output_norm()
    yield "rope_frequencies", weights.rope_frequencies()
    for layer in range(config.num_layers):
        yield f"{layer}.attn_norm", weights.norm(layer, "attn_norm")
        yield from matrix(f"{layer}.qkv", weights.qkv(layer))
        if config.has_qkv_bias:
            yield f"{layer}.qkv_bias", weights.qkv_bias(layer)
        if config.has_qk_norm:
            yield f"{layer}.q_norm", weights.qk_norm(layer, "attn_q_norm")
            yield f"{layer}.k_norm", weights.qk_norm(layer, "attn_k_norm")
        yield from matrix(f"{layer}.attn_output", weights.attention_output(layer))
        yield f"{layer}.ffn_norm", weights.norm(layer, "ffn_norm")
        yield from matrix(f"{layer}.gate_up", weights.gate_up(layer))
        yield from matrix(f"{layer}.down", weights.down(layer))


def quantize_u8(values: FloatArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Round ``[out, in]`` to 8 bits, symmetric about 128, in groups along the input.

    Groups are of ``GROUP_SIZE``, or of the largest power of two below it that divides the input.
    """
    rows, columns = values.shape
    group = math.gcd(columns, GROUP_SIZE)
    groups = values.reshape(rows, columns // group, group)
    scales = np.abs(groups).max(axis=-1, keepdims=True)
    scales /= 127.0
    # Smaller than any scale that matters, and representable: a group of zeros stays zero.
    scales = np.maximum(scales, np.float32(2.0**-24)).astype(np.float16)
    quantized = groups / scales.astype(np.float32)
    np.rint(quantized, out=quantized)
    quantized += _ZERO_POINT
    np.clip(quantized, 1, 255, out=quantized)
    return quantized.astype(np.uint8), scales


def load_converted(
    path: Path,
    weight_format: WeightFormat,
    home: Path,
    version: str = "",
    progress: Progress | None = None,
) -> tuple[GGUFWeights, ConvertedWeights]:
    """The converted weights of a GGUF file: from the cache, or converted and put there.

    Args:
        path: of the file.
        weight_format: to convert to.
        home: directory of the cache; made if it is missing. If it cannot be, the arrays are kept
            in a temporary directory for the life of the process.
        version: of what the arrays are for. An entry of another version is replaced.
        progress: told of the stages ``checksum`` and ``convert``; not called on a cache hit.

    Raises:
        DamagedModel, UnsupportedModel: the file cannot be used.
        ModelError: there is no room for the result.
    """
    weights = GGUFWeights(path)
    report = progress or _ignore
    source = f"{_checksum(path, home, report)} {weight_format}"
    key = hashlib.sha256(f"{source} {_LAYOUT_VERSION} {version}".encode()).hexdigest()[:32]
    target = home / key
    cached = _load(target, weight_format)
    if cached is not None:
        return weights, cached
    try:
        home.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=home))
        lasting = True
    except OSError:
        scratch = Path(tempfile.mkdtemp(prefix="headway-"))
        lasting = False
    try:
        _write(scratch, source, convert(weights, weight_format), weights.config.num_layers, report)
        if lasting:
            _publish(scratch, target, source)
        converted = _load(target if lasting else scratch, weight_format)
    except OSError as error:
        raise ModelError(
            f"{path}: the converted model cannot be written to {scratch.parent}: "
            f"{error.strerror or error}"
        ) from error
    finally:
        # What is mapped stays readable after its name is gone.
        shutil.rmtree(scratch, ignore_errors=True)
    assert converted is not None, f"{target} was just written"
    return weights, converted


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


def _write(
    directory: Path,
    source: str,
    arrays: Iterator[tuple[str, AnyArray]],
    num_layers: int,
    report: Progress,
) -> None:
    index: dict[str, Any] = {"source": source, "arrays": {}}
    with (directory / "weights.bin").open("wb") as file:
        for name, values in arrays:
            contiguous = np.ascontiguousarray(values)
            padding = -contiguous.nbytes % _ALIGNMENT
            data = contiguous.reshape(-1).view(np.uint8)
            index["arrays"][name] = {
                "dtype": contiguous.dtype.str,
                "shape": contiguous.shape,
                "offset": file.tell(),
            }
            file.write(data.tobytes() + b"\0" * padding)
            layer, _, _ = name.partition(".")
            if layer.isdigit():
                report("convert", (int(layer) + 1) / (num_layers + 1))
        index["size"] = file.tell()
    words = np.memmap(directory / "weights.bin", dtype=np.uint64, mode="r")
    index["sum"] = int(words.sum(dtype=np.uint64))
    (directory / "index.json").write_text(json.dumps(index))
    report("convert", 1.0)


def _load(directory: Path, weight_format: WeightFormat) -> ConvertedWeights | None:
    """The entry, or None if there is none or it does not add up. Maps; copies nothing."""
    try:
        index = json.loads((directory / "index.json").read_text())
        file = directory / "weights.bin"
        if file.stat().st_size != index["size"]:
            return None
        # Mode "c", private and writable: OpenVINO shares no memory that cannot be written.
        data = np.asarray(np.memmap(file, dtype=np.uint8, mode="c"))
        # A sum over words finds what goes wrong by itself (a torn write, a flipped bit); compiling
        # touches every page anyway, so it costs little.
        if int(data.view(np.uint64).sum(dtype=np.uint64)) != index["sum"]:
            return None
        arrays = {}
        for name, entry in index["arrays"].items():
            dtype, shape, offset = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["offset"]
            length = math.prod(shape) * dtype.itemsize
            arrays[name] = data[offset : offset + length].view(dtype).reshape(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ConvertedWeights(arrays, weight_format, directory)


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
