"""A decoder's configuration and weights, read from a GGUF file and checked.

The header is parsed by :mod:`headway.models.gguf_metadata`; this module gives it a meaning. What it
returns is what the graph wants: one :class:`ModelConfig` of plain numbers, and weight matrices as
float32 ``[out, in]`` arrays in the half-split RoPE form whatever the file's own convention; or as
the rows of blocks that the file has, for those who keep its own quantisation.

Everything a file can get wrong is refused here, with one line that names the file, the value and
the limit, so that others can take shapes for granted.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from headway.core.errors import DamagedModel, UnsupportedModel
from headway.models.gguf_metadata import GGUFMetadata, TensorInfo, read_metadata

__all__ = ["ARCHITECTURES", "GGUFWeights", "ModelConfig", "RawMatrix", "read_config"]

FloatArray = npt.NDArray[np.float32]

#: Architectures that the kernels compute, by the name that GGUF files give them.
ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")

#: Those whose query and key rows are stored for interleaved RoPE.
_INTERLEAVED_ROPE: Final = frozenset({"llama"})

# The attention kernel is vectorised over the head: it takes multiples of its vector width only.
_HEAD_DIM_MULTIPLE: Final = 16
_MAX_LAYERS: Final = 1024


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers that shape a decoder.

    Attributes:
        architecture: one of ``ARCHITECTURES``.
        name: the model's own name for itself, for people.
        num_layers, hidden_size, intermediate_size, vocab_size: of the network.
        num_heads, num_kv_heads, head_dim: of its attention; ``num_heads`` is a multiple of
            ``num_kv_heads``.
        context_length: the longest context it was trained for, in tokens.
        rms_norm_eps: added to the mean square before its root.
        rope_theta: base of the rotary frequencies.
        rope_scale: positions are divided by it (linear scaling; 1 = none).
        tied_embeddings: the LM head is the token embedding.
        has_qkv_bias, has_qk_norm: parts that only some models have.
    """

    architecture: str
    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_scale: float
    tied_embeddings: bool
    has_qkv_bias: bool
    has_qk_norm: bool

    @property
    def q_size(self) -> int:
        """Width of a token's queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_sizes(self) -> tuple[tuple[str, int], ...]:
        """The names of queries, keys and values in a file, and their widths, in this order."""
        return ("q", self.q_size), ("k", self.kv_size), ("v", self.kv_size)


def read_config(metadata: GGUFMetadata) -> ModelConfig:
    """The configuration that a header describes.

    Raises:
        UnsupportedModel: an architecture, RoPE scaling or head size that the kernels have not.
        DamagedModel: a number is missing, of the wrong type, or impossible.
    """
    return _ConfigReader(metadata).read()


class _ConfigReader:
    def __init__(self, metadata: GGUFMetadata) -> None:
        self._metadata = metadata
        self._path = metadata.path
        self._arch = metadata.string("general.architecture")
        self._tensors = {tensor.name: tensor for tensor in metadata.tensors}

    def read(self) -> ModelConfig:
        arch, tensors = self._arch, self._tensors
        if arch not in ARCHITECTURES:
            raise UnsupportedModel(
                f"{self._path}: architecture {arch!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        if self._metadata.values.get(f"{arch}.expert_count"):
            raise UnsupportedModel(f"{self._path}: mixtures of experts are not supported")
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise DamagedModel(f"{self._path}: there is no matrix 'token_embd.weight'")
        hidden_size = self._positive("embedding_length")
        num_heads = self._positive("attention.head_count")
        num_kv_heads = self._positive("attention.head_count_kv", num_heads)
        head_dim = self._positive("attention.key_length", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise DamagedModel(
                f"{self._path}: {num_heads} heads do not divide among {num_kv_heads} KV heads"
            )
        if self._positive("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModel(f"{self._path}: keys and values of different length")
        if head_dim % _HEAD_DIM_MULTIPLE:
            raise UnsupportedModel(
                f"{self._path}: the head size is {head_dim}, "
                f"must be a multiple of {_HEAD_DIM_MULTIPLE}"
            )
        rotary = self._positive("rope.dimension_count", head_dim)
        if rotary != head_dim:
            raise UnsupportedModel(
                f"{self._path}: RoPE over {rotary} of {head_dim} dimensions is not supported"
            )
        num_layers = self._positive("block_count")
        if num_layers > _MAX_LAYERS:
            raise DamagedModel(f"{self._path}: {num_layers} layers; the limit is {_MAX_LAYERS}")
        name = self._metadata.values.get("general.name")
        return ModelConfig(
            architecture=arch,
            name=name if isinstance(name, str) else self._path.stem,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=self._positive("feed_forward_length"),
            vocab_size=embedding.shape[1],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context_length=self._positive("context_length"),
            rms_norm_eps=self._real("attention.layer_norm_rms_epsilon"),
            rope_theta=self._real("rope.freq_base", 10000.0),
            rope_scale=self._rope_scale(),
            tied_embeddings="output.weight" not in tensors,
            has_qkv_bias="blk.0.attn_q.bias" in tensors,
            has_qk_norm="blk.0.attn_q_norm.weight" in tensors,
        )

    def _rope_scale(self) -> float:
        kind = self._metadata.values.get(f"{self._arch}.rope.scaling.type", "none")
        if kind == "none":
            return self._real("rope.scale_linear", 1.0)
        if kind == "linear":
            return self._real("rope.scaling.factor")
        raise UnsupportedModel(
            f"{self._path}: RoPE scaling {kind!r} is not supported; supported are none and linear "
            f"(and Llama 3's, which is a tensor of the file)"
        )

    def _positive(self, key: str, default: int | None = None) -> int:
        key = f"{self._arch}.{key}"
        value = self._metadata.values.get(key)
        if isinstance(value, list):
            # One number a layer: the kernels compute all of them alike.
            if len(set(map(str, value))) != 1:
                raise UnsupportedModel(f"{self._path}: {key!r} differs from layer to layer")
            value = value[0]
        elif value is None:
            value = self._metadata.integer(key, default)
        if type(value) is not int or value < 1:
            raise DamagedModel(f"{self._path}: {key!r} is {value!r}, must be a positive integer")
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        key = f"{self._arch}.{key}"
        value = self._metadata.values.get(key, default)
        number = float(value) if isinstance(value, (int, float)) else math.nan
        if not 0.0 < number < math.inf:
            raise DamagedModel(f"{self._path}: {key!r} is {value!r}, must be a positive number")
        return number


class RawMatrix(NamedTuple):
    """Rows of a matrix as the file has them.

    Attributes:
        name: of the tensor.
        ggml_type: the file's number for its format.
        inputs: values in a row.
        data: ``[rows, bytes of a row]`` uint8: of each row the blocks, one after the other.
    """

    name: str
    ggml_type: int
    inputs: int
    data: npt.NDArray[np.uint8]


class GGUFWeights:
    """The weights of one file, tensor by tensor as they are asked for.

    The file stays mapped until the object is dropped; nothing is kept in memory beside it.

    Args:
        path: of the GGUF file. The header is read and checked at once, the tensors are not.

    Raises:
        DamagedModel, UnsupportedModel: as :func:`read_metadata` and :func:`read_config`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata = read_metadata(self.path)
        self.config = read_config(self.metadata)
        self._tensors = {tensor.name: tensor for tensor in self.metadata.tensors}
        self._bytes: npt.NDArray[np.uint8] = np.asarray(
            np.memmap(self.path, dtype=np.uint8, mode="r")
        )

    def output_norm(self) -> FloatArray:
        """``[hidden_size]``."""
        return self._tensor("output_norm.weight", (self.config.hidden_size,))

    def norm(self, layer: int, name: str) -> FloatArray:
        """``[hidden_size]``; ``name`` is ``attn_norm`` or ``ffn_norm``."""
        return self._tensor(f"blk.{layer}.{name}.weight", (self.config.hidden_size,))

    def qk_norm(self, layer: int, name: str) -> FloatArray:
        """``[head_dim]``; ``name`` is ``attn_q_norm`` or ``attn_k_norm``."""
        return self._tensor(f"blk.{layer}.{name}.weight", (self.config.head_dim,))

    def qkv_bias(self, layer: int) -> FloatArray:
        """``[q_size + 2·kv_size]``."""
        parts = [
            self._tensor(f"blk.{layer}.attn_{name}.bias", (size,))
            for name, size in self.config.qkv_sizes
        ]
        return np.concatenate(parts)[self.qkv_order()]

    def rope_frequencies(self) -> npt.NDArray[np.float64]:
        """``[head_dim / 2]``: radians by which a position turns each pair of dimensions."""
        config = self.config
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        frequencies = config.rope_theta**-exponents / config.rope_scale
        if "rope_freqs.weight" in self._tensors:
            # Llama 3's scaling: the file holds the factor by which each frequency is lowered.
            factors = self._tensor("rope_freqs.weight", (config.head_dim // 2,))
            if not (factors > 0).all():
                raise DamagedModel(f"{self.path}: 'rope_freqs.weight' has factors below 0")
            frequencies = frequencies / factors
        return np.asarray(frequencies, dtype=np.float64)

    def raw_matrix(self, name: str, outputs: int, inputs: int) -> RawMatrix:
        """The tensor ``name`` as it is in the file: mapped, neither copied nor checked.

        Raises:
            DamagedModel: there is no such tensor, or it has another shape.
            UnsupportedModel: its type is not known.
        """
        info = self._info(name, (outputs, inputs))
        return RawMatrix(name, info.ggml_type, inputs, self._blocks(info).reshape(outputs, -1))

    def dequantize(self, matrix: RawMatrix) -> FloatArray:
        """``[rows, inputs]``: what the rows of ``matrix``, all or some of the file's, stand for.

        Raises:
            DamagedModel: a value is not finite.
            UnsupportedModel: the format cannot be dequantised.
        """
        rows = len(matrix.data)
        values = self._dequantize(matrix.name, matrix.ggml_type, matrix.data.reshape(-1))
        return self._checked(matrix.name, values.reshape(rows, matrix.inputs))

    def qkv_order(self) -> npt.NDArray[np.intp]:
        """``[q_size + 2·kv_size]``: the file's row for each row of queries, keys and values.

        In the file's order for interleaved RoPE, pair i of a query's or key's head is rows 2i and
        2i + 1; here it is rows i and i + head_dim/2.
        """
        config = self.config
        order = np.arange(config.q_size + 2 * config.kv_size)
        if config.architecture in _INTERLEAVED_ROPE:
            turned = order[: config.q_size + config.kv_size]
            turned[:] = turned.reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
        return order

    def _tensor(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        info = self._info(name, shape)
        values = self._dequantize(name, info.ggml_type, self._blocks(info))
        return self._checked(name, values.reshape(shape))

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise DamagedModel(f"{self.path}: the tensor {name!r} is missing")
        if tuple(reversed(info.shape)) != shape:
            raise DamagedModel(
                f"{self.path}: tensor {name!r} has the shape {list(reversed(info.shape))}, "
                f"must be {list(shape)}"
            )
        return info

    def _checked(self, name: str, values: FloatArray) -> FloatArray:
        if not np.isfinite(values).all():
            raise DamagedModel(f"{self.path}: tensor {name!r} holds values that are not finite")
        return values

    def _kind(self, name: str, ggml_type: int) -> tuple[Any, int, int]:
        """The type's ``GGMLQuantizationType``, the values of a block, and its bytes."""
        # Imported here: a start that finds the converted model never needs it.
        import gguf  # noqa: PLC0415

        try:
            kind = gguf.GGMLQuantizationType(ggml_type)
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} has the unknown type {ggml_type}"
            ) from None
        return kind, per_block, block_bytes

    def _blocks(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, which are those of whole rows."""
        _, per_block, block_bytes = self._kind(info.name, info.ggml_type)
        if info.shape[0] % per_block:
            raise DamagedModel(
                f"{self.path}: tensor {info.name!r} has rows of {info.shape[0]} values, in blocks "
                f"of {per_block}"
            )
        length = math.prod(info.shape) // per_block * block_bytes
        start = self.metadata.data_offset + info.offset
        data = self._bytes[start : start + length]
        if data.size != length:
            raise DamagedModel(f"{self.path}: tensor {info.name!r} reaches past the end of file")
        return data

    def _dequantize(self, name: str, ggml_type: int, data: npt.NDArray[np.uint8]) -> FloatArray:
        import gguf  # noqa: PLC0415

        kind, _, block_bytes = self._kind(name, ggml_type)
        # `dequantize` loops in Python over groups of 16 rows. A tensor cut into 16 long rows is
        # one group, which is several times faster; blocks are independent of one another.
        rows = 16 if data.size // block_bytes % 16 == 0 else 1
        if kind is gguf.GGMLQuantizationType.F32:
            return np.array(data.view(np.float32))
        try:
            # What is not finite is refused by its value; it need not be warned of as well.
            with np.errstate(all="ignore"):
                values: FloatArray = gguf.dequantize(data.reshape(rows, -1), kind)
            return values.reshape(-1)
        except NotImplementedError:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} has the type {kind.name}, "
                f"which cannot be dequantised"
            ) from None
