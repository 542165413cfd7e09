"""A model in the kernels' hands: its weights, its threads, and the memory that its steps take."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from headway.core.errors import ConfigError, InternalError
from headway.executor.precision import PRECISIONS, Precision
from headway.kernels.library import Cache, Layer, Matrix, Shape, Step, Weights
from headway.models.gguf import ModelConfig
from headway.models.packed_model import PackedModel

__all__ = ["BLOCK_SIZE", "NativeModel"]

#: Tokens in a block of the KV cache.
BLOCK_SIZE: Final = 32


class NativeModel:
    """Runs steps of a model, one at a time.

    Args:
        library: of the kernels; see ``headway.kernels.library``.
        packed: the model. It is kept: the kernels read its arrays where they are.
        precision: of the activations.
        num_threads: that compute, the caller's included.
        max_model_len: positions to have cosines and sines for.
        max_tokens: that a step may have.

    Raises:
        ConfigError: there is no memory or no room for so many threads.
    """

    def __init__(
        self,
        library: Any,
        packed: PackedModel,
        *,
        precision: Precision = "int8",
        num_threads: int = 1,
        max_model_len: int,
        max_tokens: int,
    ) -> None:
        config = packed.config
        self.config: ModelConfig = config
        self.max_model_len = max_model_len
        self.max_tokens = max_tokens
        self._library = library
        self._packed = packed
        #: The vectors that the kernels have addresses of.
        self._vectors: list[npt.NDArray[Any]] = []
        self._shape = Shape(
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            max_model_len,
            config.rms_norm_eps,
            PRECISIONS.index(precision),
            num_threads,
            max_tokens,
        )
        weights = self._weights()
        self._model = library.hw_model_new(ctypes.byref(self._shape), ctypes.byref(weights))
        if not self._model:
            raise ConfigError(
                f"the kernels cannot begin with {num_threads} threads and steps of {max_tokens} "
                "tokens: there is no memory, or no room for so many threads"
            )

    def _weights(self) -> Weights:
        arrays = self._packed.arrays

        def vector(name: str) -> int | None:
            return self._address(arrays[name]) if name in arrays else None

        layers = (Layer * self.config.num_layers)()
        for index in range(self.config.num_layers):
            vectors = ("attn_norm", "ffn_norm", "qkv_bias", "q_norm", "k_norm")
            matrices = ("qkv", "attn_output", "gate_up", "down")
            layers[index] = Layer(
                *(vector(f"{index}.{name}") for name in vectors),
                *(self._matrix(f"{index}.{name}") for name in matrices),
            )
        angles = np.outer(np.arange(self.max_model_len), arrays["rope_frequencies"])
        embedding = self._matrix("embedding")
        return Weights(
            layers,
            embedding,
            self._matrix("lm_head") if "lm_head" in self._packed.matrices else embedding,
            vector("output_norm"),
            self._address(np.cos(angles).astype(np.float32)),
            self._address(np.sin(angles).astype(np.float32)),
        )

    def _matrix(self, name: str) -> Matrix:
        found = self._packed.matrices[name]
        return Matrix(found.data.ctypes.data, found.outputs, found.inputs, found.format)

    def _address(self, values: npt.NDArray[Any]) -> int:
        self._vectors.append(values)
        return values.ctypes.data

    @property
    def num_stages(self) -> int:
        """Stages of a step: one a layer, and the head."""
        return self.config.num_layers + 1

    @property
    def block_bytes(self) -> int:
        """Bytes that a block takes in the pool."""
        return int(self._library.hw_block_bytes(ctypes.byref(self._shape)))

    @property
    def scratch_bytes(self) -> int:
        """Bytes beside weights and pool, once steps of ``max_tokens`` have run."""
        tables = sum(values.nbytes for values in self._vectors)
        return int(self._library.hw_scratch_bytes(ctypes.byref(self._shape))) + tables

    def pin(self, pinned: bool) -> None:
        """Bind each thread but the caller's to a processor of its own, or to none in particular."""
        self._library.hw_model_pin(self._model, pinned)

    def run(self, cache: Cache, step: Step, first_stage: int, last_stage: int) -> int:
        """Run the stages of a step from ``first_stage`` up to ``last_stage``, which is left out.

        Returns:
            The stage to go on with: ``last_stage``, or an earlier one if the step was stopped.

        Raises:
            InternalError: an array of the step is wrong, or the model is closed; nothing has been
                computed.
        """
        if not self._model:
            raise InternalError("the model is closed")
        step.first_stage, step.last_stage = first_stage, last_stage
        reached = int(self._library.hw_run(self._model, ctypes.byref(cache), ctypes.byref(step)))
        if reached < 0:
            words = self._library.hw_error(reached).decode()
            raise InternalError(
                f"the step of {step.num_tokens} tokens cannot be computed: {words} (tokens at "
                f"most {self.max_tokens}, positions {self.max_model_len}, blocks "
                f"{cache.num_blocks})"
            )
        return reached

    def matmul(self, name: str, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """``x · matrixᵀ`` for the matrix called ``name``, as a step computes it."""
        matrix = self._matrix(name)
        values = np.ascontiguousarray(x, np.float32)
        result = np.empty((len(values), matrix.outputs), np.float32)
        self._library.hw_matmul(
            self._model,
            ctypes.byref(matrix),
            len(values),
            values.ctypes.data,
            result.ctypes.data,
        )
        return result

    def close(self) -> None:
        """End the threads and release the memory; idempotent. Not while a step runs."""
        if self._model:
            self._library.hw_model_free(self._model)
            self._model = None
            self._vectors.clear()
            del self._packed
