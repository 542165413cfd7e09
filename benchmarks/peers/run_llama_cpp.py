"""llama.cpp by its library: a batch with one sequence for each stream."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import workload

#: Tokens that a product is computed for at once.
_MICRO_BATCH = 512


class LlamaCpp:
    def __init__(self, model: Path) -> None:
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._path = model
        self._model = llama_cpp.llama_model_load_from_file(
            bytes(model), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size: int = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def about(self) -> dict[str, Any]:
        return {
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
            "model": self._path.name,
        }

    def steps(self, prompts: workload.Prompts, max_tokens: int) -> Iterator[dict[int, int]]:
        length = max(map(len, prompts))
        with self._context(len(prompts), length + max_tokens) as context:
            tokens: dict[int, int] = {}
            at_once = max(1, _MICRO_BATCH // length)
            for first in range(0, len(prompts), at_once):
                some = range(first, min(first + at_once, len(prompts)))
                begun = context.decode({stream: (prompts[stream], 0) for stream in some})
                tokens |= begun
                yield begun
            lengths = [len(prompt) for prompt in prompts]
            for generated in range(max_tokens - 1):
                tokens = context.decode(
                    {
                        stream: ([token], lengths[stream] + generated)
                        for stream, token in tokens.items()
                    }
                )
                yield tokens

    @contextmanager
    def _context(self, num_streams: int, context_length: int) -> Iterator[_Context]:
        context = _Context(self._model, self._vocab_size, num_streams, context_length)
        try:
            yield context
        finally:
            context.close()


class _Context:
    """A KV cache for some streams.

    Args:
        model: llama.cpp's.
        vocab_size: of the model.
        num_streams: sequences, each with a part of the cache.
        context_length: of each of them, at most.
    """

    def __init__(self, model: Any, vocab_size: int, num_streams: int, context_length: int) -> None:
        params = llama_cpp.llama_context_default_params()
        # The cache is read in pieces of 256 positions.
        params.n_ctx = num_streams * -(-context_length // 256) * 256
        params.n_seq_max = num_streams
        params.n_batch = params.n_ubatch = _MICRO_BATCH
        params.n_threads = params.n_threads_batch = workload.num_threads()
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._batch = llama_cpp.llama_batch_init(_MICRO_BATCH, 0, 1)
        self._vocab_size = vocab_size

    def decode(self, work: dict[int, tuple[list[int], int]]) -> dict[int, int]:
        """Compute the tokens of each stream from a position on; its likeliest next token."""
        batch = self._batch
        index = 0
        for stream, (tokens, position) in work.items():
            for offset, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = stream
                batch.logits[index] = offset == len(tokens) - 1
                index += 1
        batch.n_tokens = index
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        shape = (len(work), self._vocab_size)
        return dict(zip(work, _as_array(logits, shape).argmax(axis=1).tolist(), strict=True))

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


def _as_array(pointer: Any, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    array_type = ctypes.c_float * (shape[0] * shape[1])
    values = ctypes.cast(pointer, ctypes.POINTER(array_type)).contents
    return np.frombuffer(values, np.float32).reshape(shape)


if __name__ == "__main__":
    workload.main(LlamaCpp)
