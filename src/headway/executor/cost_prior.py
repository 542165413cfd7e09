"""What a step of a model costs on the CPU, guessed from the sizes of both.

A first guess for the cost model, right to within a small factor until steps have been measured. It
scales what a known model takes: by the numbers that are multiplied for a token (the matrices and,
apart from them, a token's attention), by the vocabulary for what is done with logits, and by the
threads.
"""

from __future__ import annotations

from typing import Final

from headway.core.cost_model import SMALL_CPU_COSTS, Coefficients
from headway.models.gguf import ModelConfig

__all__ = ["cost_prior"]

#: What ``SMALL_CPU_COSTS`` are about: SmolLM2-135M on two threads.
_MATRICES: Final = 134_500_000
_ATTENTION: Final = 30 * 9 * 64
_VOCABULARY: Final = 49_152
_THREADS: Final = 2


def cost_prior(config: ModelConfig, num_threads: int) -> Coefficients:
    """Milliseconds that a step, and each of its features, may take."""
    qkv_size = config.q_size + 2 * config.kv_size
    layer = config.hidden_size * (qkv_size + config.q_size + 3 * config.intermediate_size)
    matrices = config.num_layers * layer + config.vocab_size * config.hidden_size
    speed = num_threads / _THREADS
    by_matrices = matrices / _MATRICES / speed
    by_attention = config.num_layers * config.q_size / _ATTENTION / speed
    known = SMALL_CPU_COSTS
    return Coefficients(
        step=known.step * by_matrices,
        prefill_token=known.prefill_token * by_matrices,
        decode_seq=known.decode_seq * by_matrices,
        context_token=known.context_token * by_attention,
        prefill_context=known.prefill_context * by_attention,
        # Logits are read by one thread, whatever the number of threads.
        logit_row=known.logit_row * config.vocab_size / _VOCABULARY,
    )
