"""One decoder graph for the Llama family, built from OpenVINO operators.

``build_model`` turns a :class:`ModelConfig` and its converted weights into an ``ov.Model`` that
computes one step of continuous batching: T tokens of S sequences, laid end to end, each attending
to its own cache through a block table that we own. What a model lacks (biases, q/k norms) is simply
not in its graph.

Inputs, all int32 (T tokens, S sequences, R sampled rows, B blocks)::

    input_ids, position_ids  [T]     the tokens and where in their sequences they stand
    past_lens                [S]     tokens of each sequence that are in the cache already
    subsequence_begins       [S+1]   prefix sums of each sequence's tokens of this step
    block_indices            [B]     the block tables, laid end to end
    block_indices_begins     [S+1]   prefix sums of their lengths
    max_context_len          []      the longest past + new
    sample_rows              [R]     those whose next token is asked for, as indices into T
    logit_rows               [L]     those whose logits are wanted, as indices into R
    key_cache.i, value_cache.i       [blocks, kv_heads, …]: one pair a layer, written in place

Outputs::

    tokens  [R]     int32, the likeliest next token of each sampled row
    maxima  [R]     float32, its logit; NaN where all logits of the row are
    logits  [L, V]  float32

Logits cost more to hand over than the layers to compute, so the rows are gathered before the LM
head, the greedy choice is made in the graph, and ``logit_rows`` is empty unless a request samples
or wants to know probabilities.

Cosines and sines are tables of constants, gathered by position. Computing ``position × frequency``
in the graph rounds positions above 256 under bf16 arithmetic: the output still reads well, and is
wrong (KL 0.6 at 1,000 tokens).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as op
from openvino.op import _PagedAttentionExtension

from headway.models.conversion import ConvertedWeights
from headway.models.gguf import ModelConfig

__all__ = ["CACHE_NAMES", "GRAPH_VERSION", "INPUT_NAMES", "build_model"]

#: The inputs of a step, in the order of the graph's parameters; the caches follow.
INPUT_NAMES: Final = (
    "input_ids",
    "position_ids",
    "past_lens",
    "subsequence_begins",
    "block_indices",
    "block_indices_begins",
    "max_context_len",
    "sample_rows",
    "logit_rows",
)

#: Name formats of a layer's two caches.
CACHE_NAMES: Final = ("key_cache.{}", "value_cache.{}")

#: To be raised with every change that may lead the plug-in to other kernels.
GRAPH_VERSION: Final = 3

_ZERO_POINT: Final = 128


def build_model(config: ModelConfig, weights: ConvertedWeights, max_model_len: int) -> ov.Model:
    """The graph of one step.

    Args:
        config: of the model.
        weights: its arrays, which the graph refers to without copying: they must outlive it.
        max_model_len: positions to have cosines and sines for.
    """
    return _Builder(config, weights, max_model_len).build()


class _Builder:
    def __init__(self, config: ModelConfig, weights: ConvertedWeights, max_model_len: int) -> None:
        self._config = config
        self._weights = weights
        self._max_model_len = max_model_len
        self._parameters = {
            name: _parameter(name, [] if name == "max_context_len" else [-1], ov.Type.i32)
            for name in INPUT_NAMES
        }
        self._constants: dict[str, Any] = {}
        self._axis0 = op.constant(np.int32(0))
        # An operator's unused inputs: empty, but of the type that it expects.
        self._no_ints = op.constant(np.zeros(0, np.int32))
        self._no_floats = op.constant(np.zeros(0, np.float32))
        self._no_bytes = op.constant(np.zeros(0, np.uint8))
        self._no_sinks = op.constant(np.zeros((0, 0, 0, 0), np.float32))
        self._zero = op.constant(np.int32(0))

    def build(self) -> ov.Model:
        config, parameters = self._config, self._parameters
        cosines, sines = self._rotations()
        embedding = self._constant("embedding")
        hidden = op.gather(embedding, parameters["input_ids"], self._axis0)
        if self._weights["embedding"].dtype != np.float32:
            hidden = op.convert(hidden, "f32")
        caches: list[Any] = []
        for layer in range(config.num_layers):
            hidden = self._layer(layer, hidden, cosines, sines, caches)
        hidden = op.gather(hidden, parameters["sample_rows"], self._axis0)
        hidden = self._rms_norm(hidden, "output_norm")
        head = "lm_head" if "lm_head" in self._weights else "embedding"
        logits = self._linear(hidden, head)
        top = op.topk(logits, op.constant(np.int32(1)), -1, "max", "none", index_element_type="i32")
        outputs = {
            "tokens": _reshape(top.output(1), [-1]),
            "maxima": _reshape(top.output(0), [-1]),
            "logits": op.gather(logits, parameters["logit_rows"], self._axis0),
        }
        for name, node in outputs.items():
            node.output(0).get_tensor().set_names({name})
        return ov.Model(
            [node.output(0) for node in outputs.values()],
            [*parameters.values(), *caches],
            "headway",
        )

    def _layer(self, layer: int, hidden: Any, cosines: Any, sines: Any, caches: list[Any]) -> Any:
        config = self._config
        # One product for queries, keys and values, and one for gate and up: at small batches the
        # time goes by the number of products. The splits behind them have a second purpose: they
        # keep the plug-in from fusing the activation into the product, which would move it to a
        # kernel whose result depends on the number of rows.
        qkv = self._linear(self._rms_norm(hidden, f"{layer}.attn_norm"), f"{layer}.qkv")
        if config.has_qkv_bias:
            qkv = op.add(qkv, self._constant(f"{layer}.qkv_bias"))
        query, key, value = _split(qkv, [config.q_size, config.kv_size, config.kv_size])
        query = self._heads(query, config.num_heads, f"{layer}.q_norm", cosines, sines)
        key = self._heads(key, config.num_kv_heads, f"{layer}.k_norm", cosines, sines)
        pair = [
            _parameter(name.format(layer), [-1, -1, -1, -1], ov.Type.dynamic)
            for name in CACHE_NAMES
        ]
        caches.extend(pair)
        attended = self._attention(query, key, value, pair)
        hidden = op.add(hidden, self._linear(attended, f"{layer}.attn_output"))
        normed = self._rms_norm(hidden, f"{layer}.ffn_norm")
        size = config.intermediate_size
        gate, up = _split(self._linear(normed, f"{layer}.gate_up"), [size, size])
        return op.add(hidden, self._linear(op.multiply(op.swish(gate), up), f"{layer}.down"))

    def _attention(self, query: Any, key: Any, value: Any, caches: list[Any]) -> Any:
        config, parameters = self._config, self._parameters
        inputs = [
            query,
            key,
            value,
            *caches,
            parameters["past_lens"],
            parameters["subsequence_begins"],
            parameters["block_indices"],
            parameters["block_indices_begins"],
            op.constant(np.float32(config.head_dim**-0.5)),
            self._zero,  # sliding window: none
            self._no_floats,  # ALiBi slopes
            parameters["max_context_len"],
            self._no_ints,  # score aggregation window
            self._no_ints,  # rotated blocks, their deltas and their table
            self._no_ints,
            self._no_floats,
            self._no_floats,  # sparse attention: threshold, block size, stride
            self._zero,
            self._zero,
            self._no_sinks,
            self._zero,  # adaptive eviction: start, sizes, diversity blocks and their begins
            self._no_ints,
            self._no_ints,
            self._no_ints,
            self._no_ints,  # token types
            self._no_bytes,  # query-query bias, and its begins
            self._no_ints,
        ]
        node = _PagedAttentionExtension(
            [one if isinstance(one, ov.Output) else one.output(0) for one in inputs]
        )
        info = node.get_rt_info()
        for name in ("num_k_heads", "num_v_heads"):
            info[name] = config.num_kv_heads
        for name in ("k_head_size", "v_head_size"):
            info[name] = config.head_dim
        return node.output(0)

    def _rotations(self) -> list[Any]:
        """Cosines and sines of the step's tokens, ``[T, 1, 1, head_dim]`` each."""
        frequencies = self._weights["rope_frequencies"]
        angles = np.outer(np.arange(self._max_model_len, dtype=np.float64), frequencies)
        angles = np.concatenate([angles, angles], axis=-1)
        return [
            _reshape(
                op.gather(
                    op.constant(table.astype(np.float32)),
                    self._parameters["position_ids"],
                    self._axis0,
                ),
                [-1, 1, 1, self._config.head_dim],
            )
            for table in (np.cos(angles), np.sin(angles))
        ]

    def _heads(self, values: Any, heads: int, norm: str, cosines: Any, sines: Any) -> Any:
        """Normalise each head, if the model does, and turn it by its position: ``[T, h·d]``."""
        head_dim = self._config.head_dim
        # Four dimensions, and a split by lengths: the form that the plug-in knows as RoPE, and
        # computes in one pass instead of six.
        values = _reshape(values, [0, heads, 1, head_dim])
        if self._config.has_qk_norm:
            values = self._rms_norm(values, norm)
        first, second = _split(values, [head_dim // 2, head_dim // 2], axis=3)
        turned = op.concat([op.multiply(second, op.constant(np.float32(-1.0))), first], -1)
        values = op.add(op.multiply(values, cosines), op.multiply(turned, sines))
        return _reshape(values, [0, heads * head_dim])

    def _rms_norm(self, values: Any, name: str) -> Any:
        square = op.power(values, op.constant(np.float32(2.0)))
        mean = op.reduce_mean(square, op.constant(np.array([-1], np.int64)), True)
        root = op.sqrt(op.add(mean, op.constant(np.float32(self._config.rms_norm_eps))))
        inverse = op.divide(op.constant(np.float32(1.0)), root)
        return op.multiply(op.multiply(values, inverse), self._constant(name))

    def _linear(self, values: Any, name: str) -> Any:
        return op.matmul(values, self._matrix(name), False, True)

    def _matrix(self, name: str) -> Any:
        """``[out, in]``; in the pattern that the plug-in keeps compressed, if it is."""
        if self._weights.weight_format == "f32":
            return self._constant(name)
        quantized = op.convert(self._constant(name), "f16")
        zero_point = op.convert(op.constant(np.full((1, 1, 1), _ZERO_POINT, np.uint8)), "f16")
        values = op.subtract(quantized, zero_point)
        values = op.multiply(values, self._constant(f"{name}.scale"))
        rows, groups, group = self._weights[name].shape
        return op.convert(_reshape(values, [rows, groups * group]), "f32")

    def _constant(self, name: str) -> Any:
        if name not in self._constants:
            self._constants[name] = op.constant(
                ov.Tensor(self._weights[name], shared_memory=True), shared_memory=True
            )
        return self._constants[name]


def _parameter(name: str, shape: list[int], kind: ov.Type) -> Any:
    parameter = op.parameter(shape, kind)
    parameter.set_friendly_name(name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _reshape(values: Any, shape: list[int]) -> Any:
    """Reshape; 0 keeps the dimension."""
    return op.reshape(values, op.constant(np.array(shape, np.int64)), True)


def _split(values: Any, sizes: list[int], axis: int = 1) -> list[Any]:
    lengths: npt.NDArray[np.int64] = np.array(sizes, np.int64)
    return list(
        op.variadic_split(values, op.constant(np.int64(axis)), op.constant(lengths)).outputs()
    )
