"""From a file's weights to the packed matrices that the kernels read.

What a file holds in 4-bit groups of 32 (Q4_0, Q4_1) and 8-bit ones (Q8_0) keeps its own numbers;
anything else becomes 8-bit groups (``headway/models/packing.py`` has both formats). Matrices with
the same input are one: queries, keys and values, and gate and up. A row of blocks is a row of
weights in every format of a file, so rows are brought into their order before they are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from headway.core.errors import DamagedModel, UnsupportedModel
from headway.models.gguf import GGUFWeights, RawMatrix
from headway.models.packing import (
    GROUP_SIZE,
    INT4,
    INT8,
    PANEL_SIZE,
    pack_int4,
    pack_int8,
    quantize_int8,
    read_q4_0,
    read_q4_1,
    read_q8_0,
)

__all__ = ["FusedMatrix", "check_sizes", "matrices", "packed_slabs", "vectors"]

AnyArray = npt.NDArray[Any]
ByteArray = npt.NDArray[np.uint8]

#: Weights that are decoded at a time: enough for numpy, and few enough to stay in a cache.
_SLAB_WEIGHTS: Final = 1 << 20

#: Readers of the formats that keep their numbers, by the file's number for them.
_Reader = Callable[[ByteArray], tuple[AnyArray, ...]]
_INT4_READERS: Final[Mapping[int, _Reader]] = {2: read_q4_0, 3: read_q4_1}
_INT8_READERS: Final[Mapping[int, _Reader]] = {8: read_q8_0}

#: Rows of gate that lie together, before as many of up.
_GATE_ROWS: Final = 16


def check_sizes(weights: GGUFWeights) -> None:
    """Refuse a model with widths that groups and panels do not divide.

    Raises:
        UnsupportedModel: a size is no multiple of 32.
    """
    config = weights.config
    for name, size in (
        ("head size", config.head_dim),
        ("hidden size", config.hidden_size),
        ("intermediate size", config.intermediate_size),
    ):
        if size % GROUP_SIZE:
            raise UnsupportedModel(
                f"{weights.path}: the {name} is {size}, must be a multiple of {GROUP_SIZE}"
            )


class FusedMatrix(NamedTuple):
    """A matrix to be packed: rows of one or more tensors, in an order."""

    name: str
    parts: tuple[RawMatrix, ...]
    #: For each row its place among the rows of all parts.
    order: npt.NDArray[np.intp]

    @property
    def inputs(self) -> int:
        """Columns."""
        return self.parts[0].inputs

    @property
    def format(self) -> int:
        """``INT4`` if all parts keep their own numbers in it, else ``INT8``."""
        return INT4 if all(part.ggml_type in _INT4_READERS for part in self.parts) else INT8


def vectors(weights: GGUFWeights) -> Iterator[tuple[str, AnyArray]]:
    """All arrays of a model that are not packed, by the names of ``PackedModel.arrays``."""
    config = weights.config
    yield "output_norm", weights.output_norm()
    yield "rope_frequencies", weights.rope_frequencies()
    for layer in range(config.num_layers):
        yield f"{layer}.attn_norm", weights.norm(layer, "attn_norm")
        yield f"{layer}.ffn_norm", weights.norm(layer, "ffn_norm")
        if config.has_qkv_bias:
            yield f"{layer}.qkv_bias", weights.qkv_bias(layer)
        if config.has_qk_norm:
            yield f"{layer}.q_norm", weights.qk_norm(layer, "attn_q_norm")
            yield f"{layer}.k_norm", weights.qk_norm(layer, "attn_k_norm")


def matrices(weights: GGUFWeights) -> Iterator[FusedMatrix]:
    """All matrices of a model, by the names of ``PackedModel.matrices``; none is read yet."""
    config = weights.config
    hidden, intermediate, vocab = config.hidden_size, config.intermediate_size, config.vocab_size

    def matrix(name: str, tensor: str, outputs: int, inputs: int) -> FusedMatrix:
        part = weights.raw_matrix(f"{tensor}.weight", outputs, inputs)
        return FusedMatrix(name, (part,), np.arange(outputs))

    yield matrix("embedding", "token_embd", vocab, hidden)
    if not config.tied_embeddings:
        yield matrix("lm_head", "output", vocab, hidden)
    qkv_order = weights.qkv_order()
    gate_up_order = (
        np.arange(2 * intermediate).reshape(2, -1, _GATE_ROWS).swapaxes(0, 1).reshape(-1)
    )
    for layer in range(config.num_layers):
        block = f"blk.{layer}"
        yield FusedMatrix(
            f"{layer}.qkv",
            tuple(
                weights.raw_matrix(f"{block}.attn_{name}.weight", size, hidden)
                for name, size in config.qkv_sizes
            ),
            qkv_order,
        )
        yield matrix(f"{layer}.attn_output", f"{block}.attn_output", hidden, config.q_size)
        yield FusedMatrix(
            f"{layer}.gate_up",
            tuple(
                weights.raw_matrix(f"{block}.ffn_{name}.weight", intermediate, hidden)
                for name in ("gate", "up")
            ),
            gate_up_order,
        )
        yield matrix(f"{layer}.down", f"{block}.ffn_down", hidden, intermediate)


def packed_slabs(matrix: FusedMatrix, weights: GGUFWeights) -> Iterator[tuple[int, ByteArray]]:
    """The packed matrix in slabs of whole panels, and the rows of each: little is in memory."""
    rows_of_slab = max(PANEL_SIZE, _SLAB_WEIGHTS // matrix.inputs // PANEL_SIZE * PANEL_SIZE)
    for start in range(0, len(matrix.order), rows_of_slab):
        rows = matrix.order[start : start + rows_of_slab]
        shape, groups = (len(rows), matrix.inputs), (len(rows), matrix.inputs // GROUP_SIZE)
        halves = np.empty((2, *groups), np.float16)
        slab: tuple[AnyArray, ...]
        if matrix.format == INT4:
            slab = (np.empty(shape, np.uint8), halves[0], halves[1])
        else:
            slab = (np.empty(shape, np.int8), halves[0])
        first = 0
        for part in matrix.parts:
            chosen = (rows >= first) & (rows < first + len(part.data))
            if chosen.any():
                source = part._replace(data=part.data[rows[chosen] - first])
                for whole, piece in zip(slab, _decode(source, matrix.format, weights), strict=True):
                    whole[chosen] = piece
            first += len(part.data)
        yield len(rows), pack_int4(*slab) if matrix.format == INT4 else pack_int8(*slab)


def _decode(rows: RawMatrix, weight_format: int, weights: GGUFWeights) -> tuple[AnyArray, ...]:
    """Rows of a file as groups: quantised values, scales, and minima in ``INT4``."""
    readers = _INT4_READERS if weight_format == INT4 else _INT8_READERS
    reader = readers.get(rows.ggml_type)
    groups = reader(rows.data) if reader else quantize_int8(weights.dequantize(rows))
    if not all(np.isfinite(scales).all() for scales in groups[1:]):
        raise DamagedModel(
            f"{weights.path}: tensor {rows.name!r} holds values that are not finite, or too large"
        )
    return groups
