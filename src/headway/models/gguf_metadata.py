"""The header of a GGUF file: its key-value metadata and the table of its tensors.

A GGUF file is a header, a padding up to the alignment, and the tensors' bytes (the format is
specified in ``docs/gguf.md`` of ggml-org/ggml). This module reads the header with :mod:`struct`
alone. The ``gguf`` package reads the same fields, but builds an array object for every element: a
vocabulary of 49,152 tokens takes it about 5 s, and takes this module about 0.05 s.

The file comes from anywhere, so every length in it is checked against the bytes that are left
before anything is allocated or looped over. A file that does not add up raises
:class:`~headway.core.errors.DamagedModel` with one line; no input makes this module raise anything
else, and none makes it allocate more than a small multiple of the file's size.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from headway.core.errors import DamagedModel

__all__ = ["GGUFMetadata", "MetadataValue", "TensorInfo", "read_metadata"]

MetadataValue: TypeAlias = "bool | int | float | str | list[MetadataValue]"

_MAGIC: Final = b"GGUF"
_SUPPORTED_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32

# Far above any real model, and low enough that reading a corrupt count that still fits into the
# file ends within about a second.
_MAX_ENTRIES: Final = 1 << 16
_MAX_ARRAY_LENGTH: Final = 1 << 22
_MAX_ARRAY_DEPTH: Final = 2
_MAX_DIMENSIONS: Final = 4
_MAX_ALIGNMENT: Final = 1 << 20

_TYPE_BOOL: Final = 7
_TYPE_STRING: Final = 8
_TYPE_ARRAY: Final = 9
#: Metadata type number → struct code, for the numbers of fixed size.
_NUMBERS: Final[Mapping[int, str]] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    10: "Q",
    11: "q",
    12: "d",
}

#: ggml tensor type → (elements in a block, bytes of a block). A type that is missing here is not
#: refused: only the check that its tensor lies inside the file is left out.
_TENSOR_BLOCKS: Final[Mapping[int, tuple[int, int]]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    30: (1, 2),  # BF16
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table.

    ``shape`` is in the file's order, fastest-varying dimension first; ``offset`` counts from
    :attr:`GGUFMetadata.data_offset`.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFMetadata:
    """The header of one file, as :func:`read_metadata` returns it.

    The typed getters (:meth:`string`, :meth:`integer`, …) return the default when the key is
    absent and raise :class:`DamagedModel` when it is absent without a default or holds another
    type, so that callers never meet a wrong type further down.
    """

    path: Path
    version: int
    values: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size: int

    def string(self, key: str, default: str | None = None) -> str:
        """The string at ``key``."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """The integer at ``key``."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer", value)
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """The boolean at ``key``."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "a boolean", value)
        return value

    def strings(self, key: str) -> list[str]:
        """The array of strings at ``key``, which must be there."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "an array of strings", value)
        return value  # type: ignore[return-value]  # the element type was checked just above

    def integers(self, key: str) -> list[int]:
        """The array of integers at ``key``, which must be there."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._wrong(key, "an array of integers", value)
        return value  # type: ignore[return-value]  # the element type was checked just above

    def floats(self, key: str) -> list[float]:
        """The array of floating-point numbers at ``key``, which must be there."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(item) is float for item in value):
            raise self._wrong(key, "an array of numbers", value)
        return value  # type: ignore[return-value]  # the element type was checked just above

    def _wrong(self, key: str, wanted: str, value: MetadataValue | None) -> DamagedModel:
        if value is None:
            return DamagedModel(f"{self.path}: the metadata has no {key!r}")
        return DamagedModel(f"{self.path}: metadata {key!r} is not {wanted}")


def read_metadata(path: str | os.PathLike[str]) -> GGUFMetadata:
    """Read and check the header of the GGUF file at ``path``.

    Checked are the magic, the version, every count and length, the text encoding, and that every
    tensor lies inside the file: a download that broke off is found here, not when the last weight
    is touched. The tensors' bytes are not read, so the time depends on the header alone.

    Raises:
        DamagedModel: the file cannot be read, or is not a whole GGUF file of version 2 or 3.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise DamagedModel(f"{path}: the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _Reader(path, buffer, size).read()
    except OSError as error:
        raise DamagedModel(f"{path}: cannot be read: {error.strerror or error}") from error


class _Reader:
    """A cursor over the mapped file. ``_position`` never passes ``_size``."""

    def __init__(self, path: Path, buffer: mmap.mmap, size: int) -> None:
        self._path = path
        self._buffer = buffer
        self._size = size
        self._position = 0

    def read(self) -> GGUFMetadata:
        magic = self._buffer[:4]
        if magic != _MAGIC:
            raise DamagedModel(f"{self._path}: not a GGUF file (it begins with {magic!r})")
        self._position = 4
        version = self._number("I")
        if version not in _SUPPORTED_VERSIONS:
            known = " and ".join(map(str, _SUPPORTED_VERSIONS))
            raise DamagedModel(f"{self._path}: GGUF version {version}; versions {known} are read")
        tensor_count = self._count("tensors", _MAX_ENTRIES)
        entry_count = self._count("metadata entries", _MAX_ENTRIES)
        values: dict[str, MetadataValue] = {}
        for _ in range(entry_count):
            key = self._string()
            if key in values:
                raise self._damaged(f"the metadata key {key[:80]!r} occurs twice")
            values[key] = self._value(self._number("I"), depth=0)
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
            raise self._damaged(f"the alignment is {alignment!r}")
        data_offset = -(-self._position // alignment) * alignment
        self._check_extents(tensors, data_offset)
        return GGUFMetadata(self._path, version, values, tensors, data_offset, self._size)

    def _damaged(self, what: str) -> DamagedModel:
        return DamagedModel(f"{self._path}: damaged GGUF file: {what} (at byte {self._position})")

    def _need(self, length: int) -> None:
        if length > self._size - self._position:
            raise self._damaged(f"{length} bytes are announced, but the file ends")

    def _number(self, code: str) -> int:
        return int(self._numbers(code, 1)[0])

    def _numbers(self, code: str, count: int) -> tuple[int | float, ...]:
        length = count * struct.calcsize("<" + code)
        self._need(length)
        numbers = struct.unpack_from(f"<{count}{code}", self._buffer, self._position)
        self._position += length
        return numbers

    def _count(self, what: str, limit: int) -> int:
        count = self._number("Q")
        if count > limit:
            raise self._damaged(f"{count} {what} are announced; the limit is {limit}")
        return count

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # The one hot loop of this module (a vocabulary and its merges are about 10**5 strings), so
        # it keeps its state in locals and the checks inline.
        buffer, size, position = self._buffer, self._size, self._position
        read_length = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                (length,) = read_length(buffer, position)
                start = position + 8
                position = start + length
                if position > size:
                    self._position = start
                    self._need(length)
                strings.append(str(buffer[start:position], "utf-8"))
        except struct.error:
            self._position = min(position, size)
            raise self._damaged("a string is announced, but the file ends") from None
        except UnicodeDecodeError:
            self._position = min(position, size)
            raise self._damaged("a string is not UTF-8") from None
        self._position = position
        return strings

    def _value(self, kind: int, depth: int) -> MetadataValue:
        if kind == _TYPE_STRING:
            return self._string()
        if kind == _TYPE_ARRAY:
            return self._array(depth)
        if kind == _TYPE_BOOL:
            return self._number("B") != 0
        code = _NUMBERS.get(kind)
        if code is None:
            raise self._damaged(f"unknown metadata type {kind}")
        return self._numbers(code, 1)[0]

    def _array(self, depth: int) -> list[MetadataValue]:
        kind = self._number("I")
        count = self._count("array elements", _MAX_ARRAY_LENGTH)
        if kind == _TYPE_STRING:
            self._need(8 * count)
            return list(self._strings(count))
        if kind == _TYPE_BOOL:
            return [number != 0 for number in self._numbers("B", count)]
        if kind == _TYPE_ARRAY:
            if depth + 1 >= _MAX_ARRAY_DEPTH:
                raise self._damaged("arrays are nested too deeply")
            self._need(12 * count)
            return [self._array(depth + 1) for _ in range(count)]
        code = _NUMBERS.get(kind)
        if code is None:
            raise self._damaged(f"unknown metadata type {kind}")
        return list(self._numbers(code, count))

    def _tensor(self) -> TensorInfo:
        name = self._string()
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(int(length) for length in self._numbers("Q", dimensions))
        return TensorInfo(name, shape, self._number("I"), self._number("Q"))

    def _check_extents(self, tensors: tuple[TensorInfo, ...], data_offset: int) -> None:
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self._damaged("a tensor name occurs twice")
        for tensor in tensors:
            elements = 1
            for length in tensor.shape:
                elements *= length
            per_block, block_bytes = _TENSOR_BLOCKS.get(tensor.ggml_type, (1, 0))
            if elements == 0 or tensor.shape[0] % per_block:
                raise self._damaged(f"tensor {tensor.name[:80]!r} has the shape {tensor.shape}")
            end = data_offset + tensor.offset + elements // per_block * block_bytes
            if end > self._size:
                raise DamagedModel(
                    f"{self._path}: tensor {tensor.name[:80]!r} ends at byte {end:,}, but the file "
                    f"has {self._size:,}: it is truncated or damaged"
                )
