"""What the kernels' parts should compute, in plain numpy.

Nothing here is taken from :mod:`headway.models.packing`: the layout is written down once more, as
tables of where each weight of a group of a panel is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

INT4, INT8 = 4, 8

_GROUP_BYTES = {INT4: 640, INT8: 1088}
_SCALES_AT = {INT4: 512, INT8: 1024}


class Weights(NamedTuple):
    """A packed matrix, taken apart.

    Attributes:
        q: ``[outputs, inputs]`` int64: 0 … 15, or −128 … 127.
        d, m: ``[outputs, inputs / 32]`` float32, of ``d · q + m``; ``m`` is zero in ``INT8``.
    """

    q: IntArray
    d: FloatArray
    m: FloatArray

    def values(self) -> FloatArray:
        """``[outputs, inputs]``: each weight, rounded once (``d · q`` alone is exact)."""
        d, m = (np.repeat(part.astype(np.float64), 32, axis=1) for part in (self.d, self.m))
        return (d * self.q + m).astype(np.float32)


def unpack(data: npt.NDArray[np.uint8], outputs: int, inputs: int, weight_format: int) -> Weights:
    """The weights of a packed matrix, whose sizes are multiples of 32."""
    panels, groups = outputs // 32, inputs // 32
    packed = data.reshape(panels, groups, _GROUP_BYTES[weight_format])
    places, shifts = _table(weight_format)
    # [panel, group, output, input] → [outputs, inputs]
    found = packed[:, :, places].astype(np.int64)
    found = (found >> shifts & 15) if weight_format == INT4 else found - 128
    q = found.transpose(0, 2, 1, 3).reshape(outputs, inputs)
    begin = _SCALES_AT[weight_format]
    d = _scales(packed[:, :, begin : begin + 64], outputs)
    m = _scales(packed[:, :, begin + 64 :], outputs) if weight_format == INT4 else np.zeros_like(d)
    return Weights(q, d, m)


def _table(weight_format: int) -> tuple[IntArray, IntArray]:
    """``[32 outputs, 32 inputs]`` of a group: the byte, and the bits to shift it by."""
    places, shifts = np.zeros((2, 32, 32), np.int64)
    for output in range(32):
        half, row = divmod(output, 16)
        for k in range(32):
            step, rest = divmod(k, 8)
            if weight_format == INT4:
                j, h = divmod(rest, 2)
                chunk = 2 * step + half
                places[output, k] = chunk * 64 + row * 4 + h * 2 + j // 2
                shifts[output, k] = j % 2 * 4
            else:
                word = 2 * step + (rest in (2, 6, 3, 7))
                place = ((2, 6, 3, 7) if word % 2 else (0, 4, 1, 5)).index(rest)
                places[output, k] = (word * 2 + half) * 64 + row * 4 + place
    return places, shifts


def _scales(packed: npt.NDArray[np.uint8], outputs: int) -> FloatArray:
    halves = np.ascontiguousarray(packed).view("<f2")
    return halves.transpose(0, 2, 1).reshape(outputs, -1).astype(np.float32)


class Activations(NamedTuple):
    """Rows of activations as a product takes them.

    Attributes:
        q: ``[rows, inputs]`` float64, whole numbers: −127 … 127.
        scale: ``[rows, inputs / 32]`` float32, of ``scale · q``.
    """

    q: DoubleArray
    scale: FloatArray


def quantize_activations(x: FloatArray) -> Activations:
    """Activations in groups of 32, to the bit as the kernels round them.

    The scale is the largest magnitude by 127; what is multiplied is not its inverse, but 127 by
    that magnitude, rounded to float32 as well. A group below 1e-30 is zero.
    """
    rows, inputs = x.shape
    groups = x.reshape(rows, inputs // 32, 32)
    largest = np.abs(groups).max(axis=-1).astype(np.float32)
    scale = largest / np.float32(127)
    tiny = largest <= np.float32(1e-30)
    inverse = np.where(tiny, np.float32(0), np.float32(127) / np.where(tiny, 1, largest))
    q = np.rint(groups * inverse.astype(np.float32)[..., None])  # in float32, halves to even
    return Activations(q.astype(np.float64).reshape(rows, inputs), scale)


def round_bf16(x: FloatArray) -> FloatArray:
    """Rounded to bfloat16, halves to even; finite values only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def matmul_int8(weights: Weights, x: FloatArray) -> DoubleArray:
    """``[rows, outputs]``: x · weightsᵀ with activations of 8 bits, and no other rounding.

    The integer sums are exact in the kernels as well; they round where a group is scaled and where
    groups are added, which is what a comparison has to allow for (``matmul_error``).
    """
    activations = quantize_activations(x)
    return _products(weights, activations.q, activations.scale.astype(np.float64)).sum(axis=-1)


def matmul_bf16(weights: Weights, x: FloatArray) -> DoubleArray:
    """``[rows, outputs]``: x · weightsᵀ with activations in bfloat16, and no other rounding."""
    rounded = round_bf16(x).astype(np.float64)
    ones = np.ones((len(x), x.shape[1] // 32))
    return _products(weights, rounded, ones).sum(axis=-1)


def matmul_error(weights: Weights, x: FloatArray) -> DoubleArray:
    """``[rows, outputs]``: how far float32 sums may be from ``matmul_int8`` or ``matmul_bf16``.

    A rounding costs at most 2⁻²⁴ of a partial sum, which is at most the sum of the magnitudes; a
    value goes through a few of them within its group, and one for each group that follows.
    """
    size = Weights(np.abs(weights.q), np.abs(weights.d), np.abs(weights.m))
    # To round to 8 bits adds at most half a step, 1/254 of the group's largest, to each of 32.
    magnitudes = np.abs(x).astype(np.float64) * (1 + 32 / 254)
    ones = np.ones((len(x), x.shape[1] // 32))
    total = _products(size, magnitudes, ones).sum(axis=-1)
    return total * (40 + 2 * weights.d.shape[1]) * 2.0**-24


def _products(weights: Weights, q: DoubleArray, scale: DoubleArray) -> DoubleArray:
    """``[rows, outputs, groups]``: what each group adds to a product."""
    rows, outputs = len(q), len(weights.q)
    by_group = q.reshape(rows, 1, -1, 32)
    dots = (by_group * weights.q.reshape(1, outputs, -1, 32)).sum(axis=-1)
    sums = by_group.sum(axis=-1)
    return (dots * weights.d.astype(np.float64) + sums * weights.m.astype(np.float64)) * (
        scale[:, None, :]
    )


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> DoubleArray:
    """``[rows, hidden_size]``."""
    values = x.astype(np.float64)
    mean = (values**2).mean(axis=-1, keepdims=True)
    return np.asarray(values / np.sqrt(mean + eps) * weight)


def rotate(heads: DoubleArray, cosines: FloatArray, sines: FloatArray) -> DoubleArray:
    """RoPE in the half-split form.

    Args:
        heads: ``[tokens, heads, head_dim]``.
        cosines, sines: ``[tokens, head_dim / 2]`` of the tokens' positions.
    """
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cosine, sine = cosines[:, None, :].astype(np.float64), sines[:, None, :].astype(np.float64)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def swiglu(gate: DoubleArray, up: DoubleArray) -> DoubleArray:
    """Gate · sigmoid(gate) · up."""
    return np.asarray(gate / (1.0 + np.exp(-gate)) * up)
