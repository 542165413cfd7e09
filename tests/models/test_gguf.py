"""Configuration and weights of GGUF files: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import TinyModel

from headway.core.errors import DamagedModel, ModelError, UnsupportedModel
from headway.models.gguf import GGUFWeights


def test_reads_the_configuration(tmp_path: Path) -> None:
    model = TinyModel("qwen3", tied=False, rope_theta=5e5, context_length=300)
    config = GGUFWeights(model.write(tmp_path / "m.gguf")).config
    assert config.architecture == "qwen3"
    assert config.name == "tiny qwen3"
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (2, 64, 96)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 32)
    assert (config.q_size, config.kv_size) == (128, 64)
    assert (config.vocab_size, config.context_length) == (160, 300)
    assert (config.rope_theta, config.rope_scale) == (5e5, 1.0)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert not config.tied_embeddings
    assert config.has_qk_norm
    assert not config.has_qkv_bias


def matrix(weights: GGUFWeights, name: str) -> np.ndarray:
    """The values of a matrix, in the file's own order."""
    config = weights.config
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = dict.fromkeys(("ffn_gate", "ffn_up"), (wide, hidden))
    shapes |= {"ffn_down": (hidden, wide), "token_embd": (config.vocab_size, hidden)}
    shapes |= {f"attn_{part}": (size, hidden) for part, size in config.qkv_sizes}
    shape = shapes[name.rpartition(".")[2]]
    return weights.dequantize(weights.raw_matrix(f"{name}.weight", *shape))


def qkv(weights: GGUFWeights, layer: int) -> np.ndarray:
    """Queries, keys and values in the order in which they are computed."""
    parts = [matrix(weights, f"blk.{layer}.attn_{part}") for part in "qkv"]
    return np.concatenate(parts)[weights.qkv_order()]


def test_llama_rows_are_brought_into_the_half_split_order(tmp_path: Path) -> None:
    model = TinyModel("llama", head_dim=16)
    weights = GGUFWeights(model.write(tmp_path / "m.gguf"))
    stored = model.tensors["blk.0.attn_q.weight"]
    read = qkv(weights, 0)
    # Head 1: pair i of the file (rows 2i, 2i + 1) is rows i and i + 8 here.
    for pair in range(8):
        np.testing.assert_array_equal(read[16 + pair], stored[16 + 2 * pair])
        np.testing.assert_array_equal(read[16 + 8 + pair], stored[16 + 2 * pair + 1])
    np.testing.assert_array_equal(read[96:], model.tensors["blk.0.attn_v.weight"])


def test_qwen_rows_stay_as_they_are(tmp_path: Path) -> None:
    model = TinyModel("qwen2", head_dim=16)
    weights = GGUFWeights(model.write(tmp_path / "m.gguf"))
    np.testing.assert_array_equal(qkv(weights, 1)[:64], model.tensors["blk.1.attn_q.weight"])
    np.testing.assert_array_equal(weights.qkv_bias(1)[64:96], model.tensors["blk.1.attn_k.bias"])


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"], ids=str.lower
)
def test_dequantises_whole_tensors_as_gguf_does(tmp_path: Path, kind: str) -> None:
    # 5 layers' worth of odd row counts: not every tensor splits into 16 equal rows of blocks.
    model = TinyModel("qwen2", vocab_size=37, intermediate_size=160)
    path = model.write(tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    weights = GGUFWeights(path)
    np.testing.assert_array_equal(matrix(weights, "token_embd"), model.tensors["token_embd.weight"])
    np.testing.assert_array_equal(
        matrix(weights, "blk.1.ffn_down"), model.tensors["blk.1.ffn_down.weight"]
    )


def test_rope_frequencies(tmp_path: Path) -> None:
    factors = np.linspace(1.0, 8.0, 8).astype(np.float32)
    model = TinyModel("llama", head_dim=16, rope_factors=factors, rope_theta=1e4)
    frequencies = GGUFWeights(model.write(tmp_path / "m.gguf")).rope_frequencies()
    np.testing.assert_allclose(frequencies, 1e4 ** (-np.arange(8) / 8) / factors, rtol=1e-6)


@pytest.mark.parametrize(
    ("extra", "error", "words"),
    [
        ({"rope.scaling.type": "yarn"}, UnsupportedModel, "'yarn'"),
        ({"rope.scaling.type": "linear"}, DamagedModel, "rope.scaling.factor"),
        ({"rope.dimension_count": 8}, UnsupportedModel, "8 of 32"),
        ({"expert_count": 4}, UnsupportedModel, "experts"),
    ],
    ids=["yarn", "linear without factor", "partial rope", "experts"],
)
def test_refuses_what_the_graph_has_not(
    tmp_path: Path, extra: dict[str, str | int | float], error: type[ModelError], words: str
) -> None:
    path = TinyModel("llama", extra=extra).write(tmp_path / "m.gguf")
    with pytest.raises(error, match=words) as raised:
        GGUFWeights(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_refuses_an_unknown_architecture_by_name(tmp_path: Path) -> None:
    path = TinyModel("gemma3").write(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModel, match=r"'gemma3'.*llama, qwen2, qwen3"):
        GGUFWeights(path)


def test_refuses_impossible_heads(tmp_path: Path) -> None:
    path = TinyModel("llama", num_heads=4, num_kv_heads=3).write(tmp_path / "m.gguf")
    with pytest.raises(DamagedModel, match="4 heads do not divide among 3"):
        GGUFWeights(path)
    path = TinyModel("llama", head_dim=12).write(tmp_path / "n.gguf")
    with pytest.raises(UnsupportedModel, match="head size is 12"):
        GGUFWeights(path)


def test_names_a_missing_tensor(tmp_path: Path) -> None:
    model = TinyModel("llama", head_dim=16)
    del model.tensors["blk.1.ffn_up.weight"]
    weights = GGUFWeights(model.write(tmp_path / "m.gguf"))
    with pytest.raises(DamagedModel, match=r"'blk\.1\.ffn_up\.weight' is missing"):
        matrix(weights, "blk.1.ffn_up")


def test_names_a_wrong_shape(tmp_path: Path) -> None:
    model = TinyModel("llama", head_dim=16)
    model.tensors["blk.0.ffn_down.weight"] = np.zeros((64, 64), np.float32)
    weights = GGUFWeights(model.write(tmp_path / "m.gguf"))
    with pytest.raises(DamagedModel, match=r"\[64, 64\], must be \[64, 96\]"):
        matrix(weights, "blk.0.ffn_down")


def test_refuses_values_that_are_not_finite(tmp_path: Path) -> None:
    model = TinyModel("llama", head_dim=16)
    model.tensors["blk.0.ffn_down.weight"][3, 5] = np.nan
    weights = GGUFWeights(model.write(tmp_path / "m.gguf"))
    with pytest.raises(DamagedModel, match="not finite"):
        matrix(weights, "blk.0.ffn_down")


def test_refuses_a_truncated_file_before_any_weight_is_read(tmp_path: Path) -> None:
    path = TinyModel("llama", head_dim=16).write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DamagedModel, match="truncated"):
        GGUFWeights(path)
