"""Groups of quantised weights, and the panels in which the kernels read them.

A matrix is ``[outputs, inputs]``, both multiples of 32. Groups of 32 weights along the input share
a scale, and in one of the two formats a minimum::

    INT4   value = d · q + m   q in 0 … 15, d and m float16: the file's own numbers, unrounded
    INT8   value = d · q       q in −127 … 127 (−128 where a file has it), stored + 128

A kernel computes 32 outputs at once and goes through the inputs in order, so the bytes that it
needs next are those that lie next: **panel** p is the outputs 32p … 32p + 31, panels follow each
other, and in a panel the groups g, inputs 32g … 32g + 31, follow each other. A group of a panel is
its 32 × 32 weights, then the scales of the 32 outputs, then, in INT4, their minima.

The weights of a group are 32-bit words, ``[step][half][output]``: the 16 outputs of a half of the
panel fill the vector that one instruction multiplies by four activations. Step i of INT4 is the
inputs 8i … 8i + 7, whose low nibbles are the inputs 8i + 0, 4, 1, 5 and whose high ones are
8i + 2, 6, 3, 7; the steps 2i and 2i + 1 of INT8 have the same fours as bytes. In this order a word
of INT4 is also two 16-bit numbers, whose nibbles j are the inputs 8i + 2j and 8i + 2j + 1 side by
side, as the products of bfloat16 pairs take them.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "GROUP_SIZE",
    "INT4",
    "INT8",
    "PANEL_SIZE",
    "PackedMatrix",
    "dequantize",
    "pack_int4",
    "pack_int8",
    "packed_bytes",
    "quantize_int8",
    "read_q4_0",
    "read_q4_1",
    "read_q8_0",
    "unpack_int4",
    "unpack_int8",
]

AnyArray = npt.NDArray[Any]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
QuantArray = npt.NDArray[np.int8]

#: The formats, by the numbers that the kernels know them by.
INT4: Final = 4
INT8: Final = 8

#: Inputs that share a scale, and outputs that lie side by side.
GROUP_SIZE: Final = 32
PANEL_SIZE: Final = 32

_HALF: Final = 16
#: A group of a panel. The steps of INT8 are counted in pairs, as one of INT4 becomes two.
_INT4_GROUP: Final = np.dtype(
    [("words", "<u4", (4, 2, _HALF)), ("d", "<f2", PANEL_SIZE), ("m", "<f2", PANEL_SIZE)]
)
_INT8_GROUP: Final = np.dtype([("words", "<u4", (4, 2, 2, _HALF)), ("d", "<f2", PANEL_SIZE)])
_GROUPS: Final = {INT4: _INT4_GROUP, INT8: _INT8_GROUP}

#: Of 8 inputs, those whose bytes make up the first word and the second.
_WORD_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)

#: A file's blocks of 32 weights.
_Q4_0_BLOCK: Final = np.dtype([("d", "<f2"), ("q", "u1", 16)])
_Q4_1_BLOCK: Final = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
_Q8_0_BLOCK: Final = np.dtype([("d", "<f2"), ("q", "i1", 32)])

#: The smallest float16 above 0: a group of zeros needs a scale, too.
_LEAST_SCALE: Final = np.float32(2.0**-24)


class PackedMatrix(NamedTuple):
    """A matrix in panels.

    Attributes:
        data: its bytes, ``packed_bytes(outputs, inputs, format)`` of them.
        outputs: rows, a multiple of 32: where a matrix has fewer, rows of zeros follow.
        inputs: columns.
        format: ``INT4`` or ``INT8``.
    """

    data: ByteArray
    outputs: int
    inputs: int
    format: int


def packed_bytes(outputs: int, inputs: int, weight_format: int) -> int:
    """Bytes of a packed matrix; both sizes are multiples of 32."""
    return outputs // PANEL_SIZE * (inputs // GROUP_SIZE) * _GROUPS[weight_format].itemsize


def pack_int4(q: ByteArray, d: HalfArray, m: HalfArray) -> ByteArray:
    """The bytes of a matrix in the format ``INT4``.

    Args:
        q: ``[outputs, inputs]``, 0 … 15. Outputs are filled up to a multiple of 32 with zeros.
        d, m: ``[outputs, inputs / 32]``, of ``d · q + m``.
    """
    q, d, m = _filled(q), _filled(d), _filled(m)
    words = _words(q)
    nibbles = words[..., 0] | words[..., 1] << np.uint32(4)
    panels = _new_panels(q, _INT4_GROUP)
    by_row = nibbles.reshape(len(panels), 2, _HALF, -1, 4)
    panels["words"] = by_row.transpose(0, 3, 4, 1, 2)
    panels["d"] = _panel_scales(d)
    panels["m"] = _panel_scales(m)
    return panels.reshape(-1).view(np.uint8)


def unpack_int4(
    data: ByteArray, outputs: int, inputs: int
) -> tuple[ByteArray, HalfArray, HalfArray]:
    """What ``pack_int4`` was given: ``q``, ``d`` and ``m``, with the rows it has added."""
    panels = _panels(data, outputs, inputs, _INT4_GROUP)
    nibbles = panels["words"].transpose(0, 3, 4, 1, 2).reshape(outputs, -1)
    mask = np.uint32(0x0F0F0F0F)
    words = np.stack([nibbles & mask, nibbles >> np.uint32(4) & mask], axis=-1)
    d, m = (_scale_rows(panels[name]) for name in ("d", "m"))
    return _bytes(words, outputs, inputs), d, m


def pack_int8(q: QuantArray, d: HalfArray) -> ByteArray:
    """The bytes of a matrix in the format ``INT8``.

    Args:
        q: ``[outputs, inputs]``. Outputs are filled up to a multiple of 32 with zeros.
        d: ``[outputs, inputs / 32]``, of ``d · q``.
    """
    q, d = _filled(q), _filled(d)
    # To flip the uppermost bit is to add 128.
    words = _words(q.view(np.uint8) ^ np.uint8(128))
    panels = _new_panels(q, _INT8_GROUP)
    by_row = words.reshape(len(panels), 2, _HALF, -1, 4, 2)
    panels["words"] = by_row.transpose(0, 3, 4, 5, 1, 2)
    panels["d"] = _panel_scales(d)
    return panels.reshape(-1).view(np.uint8)


def unpack_int8(data: ByteArray, outputs: int, inputs: int) -> tuple[QuantArray, HalfArray]:
    """What ``pack_int8`` was given: ``q`` and ``d``, with the rows it has added."""
    panels = _panels(data, outputs, inputs, _INT8_GROUP)
    words = panels["words"].transpose(0, 4, 5, 1, 2, 3).reshape(outputs, -1)
    q = _bytes(words, outputs, inputs) ^ np.uint8(128)
    return q.view(np.int8), _scale_rows(panels["d"])


def quantize_int8(values: FloatArray) -> tuple[QuantArray, HalfArray]:
    """Round ``[outputs, inputs]`` to the format ``INT8``: ``q`` and ``d``.

    The largest magnitude of a group becomes ±127. A scale beyond float16 becomes infinite, which
    the caller has to refuse.
    """
    outputs, inputs = values.shape
    groups = values.reshape(outputs, inputs // GROUP_SIZE, GROUP_SIZE)
    scales = np.abs(groups).max(axis=-1)
    scales /= np.float32(127)
    with np.errstate(over="ignore"):
        d = np.maximum(scales, _LEAST_SCALE).astype(np.float16)
    rounded = groups / d.astype(np.float32)[..., None]
    np.rint(rounded, out=rounded)
    np.clip(rounded, -127, 127, out=rounded)
    return rounded.astype(np.int8).reshape(outputs, inputs), d


def dequantize(matrix: PackedMatrix) -> FloatArray:
    """``[outputs, inputs]`` float32: what a packed matrix stands for."""
    shape = (matrix.outputs, matrix.inputs // GROUP_SIZE, GROUP_SIZE)
    if matrix.format == INT4:
        q, d, m = unpack_int4(matrix.data, matrix.outputs, matrix.inputs)
        values = q.reshape(shape).astype(np.float32) * d.astype(np.float32)[..., None]
        values += m.astype(np.float32)[..., None]
    else:
        q8, d = unpack_int8(matrix.data, matrix.outputs, matrix.inputs)
        values = q8.reshape(shape).astype(np.float32) * d.astype(np.float32)[..., None]
    return values.reshape(matrix.outputs, matrix.inputs)


def read_q4_0(data: ByteArray) -> tuple[ByteArray, HalfArray, HalfArray]:
    """``q``, ``d`` and ``m`` of a file's rows ``[outputs, bytes]`` of Q4_0: ``d · (q − 8)``."""
    blocks = data.view(_Q4_0_BLOCK)
    d = blocks["d"]
    with np.errstate(over="ignore", invalid="ignore"):
        return _nibbles(blocks["q"]), d, d * np.float16(-8)


def read_q4_1(data: ByteArray) -> tuple[ByteArray, HalfArray, HalfArray]:
    """``q``, ``d`` and ``m`` of a file's rows ``[outputs, bytes]`` of Q4_1: ``d · q + m``."""
    blocks = data.view(_Q4_1_BLOCK)
    return _nibbles(blocks["q"]), blocks["d"], blocks["m"]


def read_q8_0(data: ByteArray) -> tuple[QuantArray, HalfArray]:
    """``q`` and ``d`` of a file's rows ``[outputs, bytes]`` of Q8_0: ``d · q``."""
    blocks = data.view(_Q8_0_BLOCK)
    return blocks["q"].reshape(len(data), -1), blocks["d"]


def _nibbles(packed: ByteArray) -> ByteArray:
    """``[outputs, blocks, 16]`` bytes: a block's first 16 weights are low, its last 16 high."""
    outputs, blocks, _ = packed.shape
    q = np.empty((outputs, blocks, 2, 16), np.uint8)
    np.bitwise_and(packed, 15, out=q[:, :, 0])
    np.right_shift(packed, 4, out=q[:, :, 1])
    return q.reshape(outputs, -1)


def _filled(rows: AnyArray) -> AnyArray:
    """With rows of zeros up to a whole panel."""
    missing = -len(rows) % PANEL_SIZE
    if not missing:
        return rows
    return np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])


def _words(values: ByteArray) -> npt.NDArray[np.uint32]:
    """``[outputs, inputs / 8, 2]``: every 8 bytes of a row as the two words they make up."""
    outputs, inputs = values.shape
    eights = values.reshape(outputs, inputs // 8, 8)
    ordered = np.empty_like(eights, order="C")
    for place, source in enumerate(_WORD_ORDER):
        ordered[..., place] = eights[..., source]
    return ordered.view("<u4")


def _bytes(words: npt.NDArray[np.uint32], outputs: int, inputs: int) -> ByteArray:
    """The reverse of ``_words``."""
    ordered = np.ascontiguousarray(words).view(np.uint8).reshape(outputs, inputs // 8, 8)
    eights = np.empty_like(ordered)
    for place, source in enumerate(_WORD_ORDER):
        eights[..., source] = ordered[..., place]
    return eights.reshape(outputs, inputs)


def _new_panels(q: AnyArray, group: np.dtype[Any]) -> AnyArray:
    outputs, inputs = q.shape
    return np.empty((outputs // PANEL_SIZE, inputs // GROUP_SIZE), group)


def _panels(data: ByteArray, outputs: int, inputs: int, group: np.dtype[Any]) -> AnyArray:
    return data.view(group).reshape(outputs // PANEL_SIZE, inputs // GROUP_SIZE)


def _panel_scales(scales: HalfArray) -> HalfArray:
    """``[panels, groups, 32]`` of ``[outputs, groups]``."""
    by_panel = scales.reshape(len(scales) // PANEL_SIZE, PANEL_SIZE, -1)
    grouped: HalfArray = by_panel.transpose(0, 2, 1)
    return grouped


def _scale_rows(scales: HalfArray) -> HalfArray:
    """The reverse of ``_panel_scales``."""
    panels, groups, _ = scales.shape
    by_row: HalfArray = scales.transpose(0, 2, 1).reshape(panels * PANEL_SIZE, groups)
    return by_row
