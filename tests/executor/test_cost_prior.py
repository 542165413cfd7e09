"""The first guess of what steps cost: right for a model that was measured, and to scale."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headway.core.cost_model import Coefficients
from headway.executor.cost_prior import cost_prior
from headway.models.gguf import ModelConfig

SMOLLM2_135M = ModelConfig(
    architecture="llama",
    name="SmolLM2 135M",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49_152,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    context_length=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    rope_scale=1.0,
    tied_embeddings=True,
    has_qkv_bias=False,
    has_qk_norm=False,
)


#: Measured on two cores with AVX2, weights of 4 bits, 8-bit activations (ms).
MEASURED = Coefficients(
    step=4.9,
    prefill_token=0.65,
    decode_seq=0.9,
    context_token=0.001,
    prefill_context=0.0007,
    logit_row=0.25,
)


def test_the_known_model_costs_what_is_known_of_it() -> None:
    assert cost_prior(SMOLLM2_135M, 2) == pytest.approx(MEASURED, rel=0.2)


def test_a_model_of_eight_times_the_size_costs_eight_times_as_much() -> None:
    twice_as_wide = replace(
        SMOLLM2_135M,
        num_layers=60,
        hidden_size=1152,
        intermediate_size=3072,
        num_heads=18,
        num_kv_heads=6,
        vocab_size=4 * 49_152,
    )
    factors = (8, 8, 8, 4, 4, 4)
    known = cost_prior(SMOLLM2_135M, 2)
    assert cost_prior(twice_as_wide, 2) == pytest.approx(
        [factor * cost for factor, cost in zip(factors, known, strict=True)]
    )


def test_threads_share_the_arithmetic_but_not_the_reading_of_weights_and_logits() -> None:
    few, many = cost_prior(SMOLLM2_135M, 2), cost_prior(SMOLLM2_135M, 8)
    for name in ("prefill_token", "decode_seq", "prefill_context"):
        assert getattr(many, name) == pytest.approx(getattr(few, name) / 4)
    for name in ("step", "context_token", "logit_row"):
        assert getattr(many, name) == getattr(few, name)


def test_decoding_is_bound_by_arithmetic_where_many_heads_share_their_keys() -> None:
    shared = replace(SMOLLM2_135M, num_kv_heads=1)
    costs = cost_prior(shared, 2)
    assert costs.context_token == costs.prefill_context
