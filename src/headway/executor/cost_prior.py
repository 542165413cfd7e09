"""What a step costs with our kernels, guessed from the sizes of the model and of the machine.

A first guess for the cost model, right to within a small factor until steps have been measured. A
step reads all weights once, however many tokens it computes; each token multiplies with all of
them, and its attention goes over its context. The speeds are those of a processor with AVX2; the
memory's is shared by the threads, and each thread adds arithmetic of its own.
"""

from __future__ import annotations

from typing import Final

from headway.core.cost_model import Coefficients
from headway.models.gguf import ModelConfig

__all__ = ["cost_prior"]

#: Bytes a millisecond.
_MEMORY_SPEED: Final = 20e6
#: Multiplications a millisecond of one thread: of weights, and of keys and values.
_MATRIX_SPEED: Final = 80e6
_ATTENTION_SPEED: Final = 25e6
#: Of a packed model: groups of 32 take 0.625 bytes a weight with 4 bits, 1.0625 with 8.
_BYTES_PER_WEIGHT: Final = 0.72
#: In the KV cache, of a key or value's number.
_BYTES_PER_NUMBER: Final = 2
#: Milliseconds that one thread takes to read a logit and choose among them.
_LOGIT_MS: Final = 5e-6


def cost_prior(config: ModelConfig, num_threads: int) -> Coefficients:
    """Milliseconds that a step, and each of its features, may take."""
    qkv_size = config.q_size + 2 * config.kv_size
    layer = config.hidden_size * (qkv_size + config.q_size + 3 * config.intermediate_size)
    layers, head = config.num_layers * layer, config.vocab_size * config.hidden_size
    kv_bytes = config.num_layers * 2 * config.kv_size * _BYTES_PER_NUMBER
    attention_ms = config.num_layers * 2 * config.q_size / (_ATTENTION_SPEED * num_threads)
    return Coefficients(
        step=(layers + head) * _BYTES_PER_WEIGHT / _MEMORY_SPEED,
        # Of a prompt's tokens, only the last one goes through the head.
        prefill_token=layers / (_MATRIX_SPEED * num_threads),
        decode_seq=(layers + head) / (_MATRIX_SPEED * num_threads),
        # Nobody shares a decoding sequence's keys and values: reading them may take longer.
        context_token=max(attention_ms, kv_bytes / _MEMORY_SPEED),
        prefill_context=attention_ms,
        logit_row=config.vocab_size * _LOGIT_MS,
    )
