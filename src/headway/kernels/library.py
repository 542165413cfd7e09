"""The kernels' C interface (``headway.h``) as ctypes has it.

Structures have the fields of the header, in its order, and a test compares their sizes. Arrays are
handed over as addresses: whoever fills in a structure keeps the arrays alive.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any, Final

from headway.core.errors import KernelError

__all__ = ["VERSION", "Cache", "Layer", "Matrix", "Shape", "Step", "Weights", "open_library"]

#: Of ``headway.h``.
VERSION: Final = 1


class Matrix(Structure):
    """``hw_matrix``."""

    _fields_ = (
        ("data", c_void_p),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("format", c_int32),
        ("unused", c_int32),
    )


class Shape(Structure):
    """``hw_shape``."""

    _fields_ = (
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("vocab_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("max_model_len", c_int32),
        ("rms_norm_eps", c_float),
        ("precision", c_int32),
        ("num_threads", c_int32),
        ("max_tokens", c_int32),
    )


class Layer(Structure):
    """``hw_layer``."""

    _fields_ = (
        ("attn_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("qkv_bias", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Matrix),
        ("attn_output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Weights(Structure):
    """``hw_weights``."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("embedding", Matrix),
        ("lm_head", Matrix),
        ("output_norm", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


class Cache(Structure):
    """``hw_cache``."""

    _fields_ = (("pool", c_void_p), ("num_blocks", c_int32))


class Step(Structure):
    """``hw_step``."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_seqs", c_int32),
        ("num_blocks", c_int32),
        ("num_sampled", c_int32),
        ("num_logits", c_int32),
        ("first_stage", c_int32),
        ("last_stage", c_int32),
        ("token_ids", c_void_p),
        ("past_lens", c_void_p),
        ("begins", c_void_p),
        ("block_indices", c_void_p),
        ("block_begins", c_void_p),
        ("sample_rows", c_void_p),
        ("logit_rows", c_void_p),
        ("hidden", c_void_p),
        ("tokens", c_void_p),
        ("maxima", c_void_p),
        ("logits", c_void_p),
        ("stop", c_void_p),
    )


def open_library(path: str | os.PathLike[str]) -> Any:
    """Load a library of kernels, with the types of its functions.

    Raises:
        KernelError: it cannot be loaded, or has another version of the interface.
    """
    try:
        library = ctypes.CDLL(os.fspath(path))
        functions: dict[str, tuple[Any, list[Any]]] = {
            "hw_version": (c_int32, []),
            "hw_path": (c_char_p, []),
            "hw_model_new": (c_void_p, [POINTER(Shape), POINTER(Weights)]),
            "hw_model_free": (None, [c_void_p]),
            "hw_model_pin": (None, [c_void_p, c_int32]),
            "hw_block_bytes": (c_int64, [POINTER(Shape)]),
            "hw_scratch_bytes": (c_int64, [POINTER(Shape)]),
            "hw_run": (c_int32, [c_void_p, POINTER(Cache), POINTER(Step)]),
            "hw_error": (c_char_p, [c_int32]),
            "hw_matmul": (None, [c_void_p, POINTER(Matrix), c_int32, c_void_p, c_void_p]),
        }
        for name, (result, arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"the kernels {path} cannot be loaded: {error}") from error
    version = library.hw_version()
    if version != VERSION:
        raise KernelError(f"the kernels {path} have version {version}, must be {VERSION}")
    return library
