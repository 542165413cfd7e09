"""Tiny random models as GGUF files, and what they should compute, in plain numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

#: GPT-2's alphabet: the character that stands for each byte in a byte-level vocabulary.
_HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
_ALPHABET = [chr(256 + _HIDDEN.index(n)) if n in _HIDDEN else chr(n) for n in range(256)]

#: Of ``add_byte_tokenizer``.
BYTE_VOCAB_SIZE = 258

#: The formats with blocks of 256 that gguf reads and cannot write: where in a block its float16
#: scales are.
_K_SCALES = {
    gguf.GGMLQuantizationType.Q2_K: (80, 82),
    gguf.GGMLQuantizationType.Q3_K: (108,),
    gguf.GGMLQuantizationType.Q4_K: (0, 2),
    gguf.GGMLQuantizationType.Q5_K: (0, 2),
    gguf.GGMLQuantizationType.Q6_K: (208,),
}


def encode(values: FloatArray, kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """``[rows, bytes of a row]``: a matrix in a file's format.

    In a K-quant format, which gguf cannot write, it is another random matrix, as large.
    """
    if kind not in _K_SCALES:
        return np.asarray(gguf.quantize(values, kind)).view(np.uint8)
    rows, columns = values.shape
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert columns % per_block == 0, f"{kind.name} has blocks of {per_block}, not {columns}"
    random = np.random.default_rng(rows)
    blocks = random.integers(0, 256, (rows * columns // per_block, block_bytes), np.uint8)
    scale = np.float16(1.0)
    for _ in range(2):  # with scales of 1, to see how large the values are; then with the right one
        for place in _K_SCALES[kind]:
            blocks[:, place : place + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        decoded = gguf.dequantize(blocks, kind)
        scale = np.float16(values.std() / decoded.std())
    return blocks.reshape(rows, -1)


def add_byte_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A tokenizer in which every byte is a token of the same number; token 256 ends a text."""
    pair = _ALPHABET[0] + _ALPHABET[1]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*_ALPHABET, "<|end|>", pair])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges([" ".join(pair)])
    writer.add_eos_token_id(256)


@dataclass
class TinyModel:
    """A random model of one architecture, and its reference forward pass in float32."""

    architecture: str = "llama"
    num_layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 96
    vocab_size: int = 160
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    context_length: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tied: bool = True
    rope_factors: FloatArray | None = None
    seed: int = 0
    extra: dict[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)

        def matrix(rows: int, columns: int) -> FloatArray:
            values = random.standard_normal((rows, columns)) / np.sqrt(columns)
            return (values * 1.5).astype(np.float32)

        def vector(length: int, mean: float) -> FloatArray:
            return (mean + 0.2 * random.standard_normal(length)).astype(np.float32)

        hidden, q_size = self.hidden_size, self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        self.tensors: dict[str, FloatArray] = {
            "token_embd.weight": matrix(self.vocab_size, hidden),
            "output_norm.weight": vector(hidden, 1.0),
        }
        if not self.tied:
            self.tensors["output.weight"] = matrix(self.vocab_size, hidden)
        if self.rope_factors is not None:
            self.tensors["rope_freqs.weight"] = self.rope_factors
        for layer in range(self.num_layers):
            parts = {
                "attn_norm.weight": vector(hidden, 1.0),
                "ffn_norm.weight": vector(hidden, 1.0),
                "attn_q.weight": matrix(q_size, hidden),
                "attn_k.weight": matrix(kv_size, hidden),
                "attn_v.weight": matrix(kv_size, hidden),
                "attn_output.weight": matrix(hidden, q_size),
                "ffn_gate.weight": matrix(self.intermediate_size, hidden),
                "ffn_up.weight": matrix(self.intermediate_size, hidden),
                "ffn_down.weight": matrix(hidden, self.intermediate_size),
            }
            if self.architecture == "qwen2":
                parts["attn_q.bias"] = vector(q_size, 0.0)
                parts["attn_k.bias"] = vector(kv_size, 0.0)
                parts["attn_v.bias"] = vector(kv_size, 0.0)
            if self.architecture == "qwen3":
                parts["attn_q_norm.weight"] = vector(self.head_dim, 1.0)
                parts["attn_k_norm.weight"] = vector(self.head_dim, 1.0)
            self.tensors |= {f"blk.{layer}.{name}": values for name, values in parts.items()}

    def write(
        self,
        path: Path,
        quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    ) -> Path:
        """Write the file; matrices in ``quantization`` (and take over its rounding).

        ``kinds`` has other formats for single matrices, by a part of their name. With a vocabulary
        of ``BYTE_VOCAB_SIZE`` the file has a tokenizer.
        """
        writer = gguf.GGUFWriter(path, self.architecture)
        if self.vocab_size == BYTE_VOCAB_SIZE:
            add_byte_tokenizer(writer)
        writer.add_name(f"tiny {self.architecture}")
        writer.add_block_count(self.num_layers)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self.intermediate_size)
        writer.add_context_length(self.context_length)
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_freq_base(self.rope_theta)
        writer.add_layer_norm_rms_eps(self.rms_norm_eps)
        for key, value in self.extra.items():
            name = f"{self.architecture}.{key}"
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            else:
                writer.add_uint32(name, value)
        kinds = kinds or {}
        for name, values in self.tensors.items():
            kind = next((kinds[part] for part in kinds if part in name), quantization)
            if values.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
                packed = encode(values, kind)
                self.tensors[name] = gguf.dequantize(packed, kind)
                writer.add_tensor(name, packed, raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float64]:
        """``[len(tokens), vocab_size]``: the logits after each token. No cache, no tricks."""
        tensors = self.tensors
        hidden = tensors["token_embd.weight"][tokens].astype(np.float64)
        count = len(tokens)
        mask = np.where(np.tri(count, dtype=bool), 0.0, -np.inf)
        for layer in range(self.num_layers):
            part = {
                name: tensors[f"blk.{layer}.{name}"].astype(np.float64)
                for name in self._names(layer)
            }
            normed = self._rms_norm(hidden, part["attn_norm.weight"])
            rows = []
            for name, heads in (("q", self.num_heads), ("k", self.num_kv_heads), ("v", 0)):
                values = normed @ part[f"attn_{name}.weight"].T
                values += part.get(f"attn_{name}.bias", 0.0)
                values = values.reshape(count, -1, self.head_dim)
                if heads:
                    if f"attn_{name}_norm.weight" in part:
                        values = self._rms_norm(values, part[f"attn_{name}_norm.weight"])
                    values = self._rotate(values)
                rows.append(values)
            query, key, value = rows
            repeats = self.num_heads // self.num_kv_heads
            key, value = key.repeat(repeats, axis=1), value.repeat(repeats, axis=1)
            scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(self.head_dim) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            attended = np.einsum("hqk,khd->qhd", scores, value).reshape(count, -1)
            hidden = hidden + attended @ part["attn_output.weight"].T
            normed = self._rms_norm(hidden, part["ffn_norm.weight"])
            gate = normed @ part["ffn_gate.weight"].T
            gate = gate / (1.0 + np.exp(-gate))
            up = normed @ part["ffn_up.weight"].T
            hidden = hidden + (gate * up) @ part["ffn_down.weight"].T
        head = tensors.get("output.weight", tensors["token_embd.weight"])
        return np.asarray(self._rms_norm(hidden, tensors["output_norm.weight"]) @ head.T)

    def _names(self, layer: int) -> list[str]:
        prefix = f"blk.{layer}."
        return [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]

    def _rms_norm(self, values: npt.NDArray[np.float64], weight: FloatArray) -> FloatArray:
        mean = (values**2).mean(-1, keepdims=True)
        return np.asarray(values / np.sqrt(mean + self.rms_norm_eps) * weight)

    def _rotate(self, values: FloatArray) -> FloatArray:
        """RoPE as the file's architecture has it: pairs (2i, 2i+1), or (i, i + d/2)."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-np.arange(half) / half)
        if self.rope_factors is not None:
            frequencies = frequencies / self.rope_factors
        if "rope.scaling.factor" in self.extra:
            frequencies = frequencies / float(self.extra["rope.scaling.factor"])
        angles = np.outer(np.arange(len(values)), frequencies)[:, None, :]
        cosine, sine = np.cos(angles), np.sin(angles)
        interleaved = self.architecture == "llama"
        first = values[..., 0::2] if interleaved else values[..., :half]
        second = values[..., 1::2] if interleaved else values[..., half:]
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        if interleaved:
            return np.stack(turned, axis=-1).reshape(values.shape)
        return np.concatenate(turned, axis=-1)
