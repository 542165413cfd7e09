"""The first guess of what steps cost: right for the model it is scaled from, and to scale."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headway.core.cost_model import SMALL_CPU_COSTS
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


def test_the_known_model_costs_what_is_known_of_it() -> None:
    assert cost_prior(SMOLLM2_135M, 2) == pytest.approx(SMALL_CPU_COSTS, rel=0.01)


def test_a_model_of_eight_times_the_size_costs_eight_times_as_much() -> None:
    twice_as_wide = replace(
        SMOLLM2_135M,
        num_layers=60,
        hidden_size=1152,
        intermediate_size=3072,
        num_heads=18,
        num_kv_heads=6,
        vocab_size=2 * 49_152 * 2,
    )
    assert cost_prior(twice_as_wide, 2) == pytest.approx(
        (
            8 * SMALL_CPU_COSTS.step,
            8 * SMALL_CPU_COSTS.prefill_token,
            8 * SMALL_CPU_COSTS.decode_seq,
            4 * SMALL_CPU_COSTS.context_token,
            4 * SMALL_CPU_COSTS.prefill_context,
            4 * SMALL_CPU_COSTS.logit_row,
        ),
        rel=0.01,
    )


def test_threads_share_the_arithmetic_but_not_the_reading_of_logits() -> None:
    few, many = cost_prior(SMOLLM2_135M, 2), cost_prior(SMOLLM2_135M, 8)
    assert many[:-1] == pytest.approx([cost / 4 for cost in few[:-1]])
    assert many.logit_row == few.logit_row
