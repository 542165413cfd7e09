"""Tiny models on our kernels, step by step, over a pool in which nothing is a number at first."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from tiny_models import TinyModel

from headway.executor.base import ModelRunnerOutput
from headway.executor.batch import StepBatch, StepResult
from headway.executor.execution import Execution
from headway.executor.native_model import BLOCK_SIZE, NativeModel
from headway.executor.precision import Precision
from headway.kernels.library import Cache, Step, open_library
from headway.kernels.loader import available_paths, load
from headway.models.packed_model import PackedModel, load_packed
from headway.models.registry import default_home

FloatArray = npt.NDArray[np.float32]

#: Fills a pool: every bfloat16 and every float32 of such bytes is a NaN.
POISON = 0xFF

#: What this machine can run, and what each can do.
PATHS = available_paths()
PRECISIONS: tuple[Precision, ...] = ("int8", "bf16")

_ROPE_FACTORS = np.linspace(1.0, 8.0, 16).astype(np.float32)

#: Between them: every architecture, tied and untied, each way to turn by a position, 1, 2, 3, 4 and
#: 7 heads of queries for one of keys, all head sizes, and vocabularies that fill no panel.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied": {"tied": False, "num_kv_heads": 4, "vocab_size": 150},
    "llama 3 rope": {
        "rope_factors": _ROPE_FACTORS,
        "rope_theta": 5e5,
        "hidden_size": 96,
        "num_heads": 3,
        "num_kv_heads": 1,
    },
    "llama, linear rope": {"extra": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    "qwen2": {"architecture": "qwen2", "num_heads": 7, "num_kv_heads": 1, "head_dim": 64},
    "qwen3": {
        "architecture": "qwen3",
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 128,
        "tied": False,
        "vocab_size": 97,
    },
}


@functools.cache
def library(path: str) -> Any:
    """The kernels of a path; compiled once for all tests, in the cache that is always used."""
    return open_library(load(path, default_home() / "kernels"))


class Packed(NamedTuple):
    """A model's weights: those that the file has, and the same in panels."""

    tiny: TinyModel
    packed: PackedModel


@functools.cache
def packed_model(name: str, kind: str = "Q8_0") -> Packed:
    """One of ``MODELS``, from a file in a format that keeps its numbers when it is packed."""
    return pack(TinyModel(**MODELS[name]), kind)


def pack(tiny: TinyModel, kind: str = "Q8_0") -> Packed:
    """The weights of a model, as they come out of a file in the format ``kind``."""
    with tempfile.TemporaryDirectory() as directory:
        path = tiny.write(Path(directory) / "m.gguf", gguf.GGMLQuantizationType[kind])
        # It stays mapped when the directory is gone.
        return Packed(tiny, load_packed(path, Path(directory) / "packed"))


class Models:
    """Makes models, each once, and closes all of them."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], NativeModel] = {}

    def get(
        self,
        path: str,
        name: str,
        precision: Precision = "int8",
        *,
        num_threads: int = 2,
        kind: str = "Q8_0",
    ) -> NativeModel:
        """One of ``MODELS`` on a path."""
        key = (path, name, precision, num_threads, kind)
        if key not in self._made:
            self._made[key] = native_model(
                path, packed_model(name, kind).packed, precision, num_threads
            )
        return self._made[key]

    def close(self) -> None:
        for model in self._made.values():
            model.close()


def native_model(
    path: str,
    packed: PackedModel,
    precision: Precision = "int8",
    num_threads: int = 2,
    *,
    max_tokens: int = 256,
    max_model_len: int = 512,
) -> NativeModel:
    """A model that its caller closes."""
    return NativeModel(
        library(path),
        packed,
        precision=precision,
        num_threads=num_threads,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
    )


class Text:
    """Tokens that are computed piece by piece.

    Attributes:
        token_ids: all of them.
        num_computed: of these, how many are in the pool.
        table: its blocks.
    """

    def __init__(self, token_ids: Iterable[int]) -> None:
        self.token_ids = list(token_ids)
        self.num_computed = 0
        self.table: list[int] = []
        self._logits: list[FloatArray] = []

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def logits(self) -> FloatArray:
        """``[num_computed, vocab_size]``, after each token."""
        return np.concatenate(self._logits)

    def take(self, logits: FloatArray) -> None:
        """Take in what was computed of the next tokens."""
        self._logits.append(logits)
        self.num_computed += len(logits)


#: A step: so many next tokens of each text.
Work = Sequence[tuple[Text, int]]


class Bench:
    """Runs steps over a pool of its own, and hands out its blocks, scattered and uncleared.

    Steps may be given another model than the first, with as much in a block.
    """

    def __init__(self, model: NativeModel, num_blocks: int = 40, seed: int = 0) -> None:
        self.model = model
        self.pool = np.full((num_blocks, model.block_bytes), POISON, np.uint8)
        self.cache = Cache(self.pool.ctypes.data, num_blocks)
        self.free: list[int] = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def release(self, text: Text) -> None:
        """Its blocks may be had by others, with what is in them."""
        self.free += text.table
        text.table = []

    def batch(self, work: Work) -> StepBatch:
        """The arrays of a step that asks for the logits after every token."""
        for text, count in work:
            while len(text.table) * BLOCK_SIZE < text.num_computed + count:
                text.table.append(self.free.pop())
        return make_batch(
            [
                (text.token_ids[text.num_computed : text.num_computed + count], text.num_computed)
                for text, count in work
            ],
            [text.table for text, _ in work],
        )

    def begin(self, work: Work, model: NativeModel | None = None) -> Execution:
        return Execution(model or self.model, self.cache, self.batch(work), _unread)

    def finish(self, execution: Execution, work: Work) -> None:
        """Compute the rest of a step, and let the texts take in what it says."""
        while not execution.advance():
            pass
        parts = np.split(execution.result.logits, np.cumsum([count for _, count in work])[:-1])
        for (text, _), logits in zip(work, parts, strict=True):
            text.take(logits)

    def run(self, *work: tuple[Text, int], model: NativeModel | None = None) -> None:
        """Compute a step."""
        self.finish(self.begin(work, model), work)


def whole_logits(model: NativeModel, token_ids: Iterable[int]) -> FloatArray:
    """``[tokens, vocab_size]``: what a model says after each token, if they are one step alone."""
    text = Text(token_ids)
    Bench(model, -(-len(text.token_ids) // BLOCK_SIZE)).run((text, len(text.token_ids)))
    return text.logits


def random_tokens(model: NativeModel, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count).tolist()


def make_batch(
    chunks: Sequence[tuple[Sequence[int], int]], tables: Sequence[Sequence[int]]
) -> StepBatch:
    """The arrays of a step that asks for the logits after every token.

    Args:
        chunks: of each sequence, the tokens and how many there are before them.
        tables: of each sequence, its blocks.
    """
    token_ids = [token_id for tokens, _ in chunks for token_id in tokens]
    every = np.arange(len(token_ids), dtype=np.int32)
    return StepBatch(
        token_ids=np.array(token_ids, np.int32),
        past_lens=np.array([past for _, past in chunks], np.int32),
        begins=_sums([len(tokens) for tokens, _ in chunks]),
        block_indices=np.array([block for table in tables for block in table], np.int32),
        block_begins=_sums([len(table) for table in tables]),
        sample_rows=every,
        logit_rows=every,
        sampled=[],
        with_logits=[],
        rated=[],
    )


class RawStep:
    """A step as the kernels are given it, and the arrays that they write."""

    def __init__(self, batch: StepBatch, model: NativeModel) -> None:
        config = model.config
        self.batch = batch
        self.hidden = np.full((len(batch.token_ids), config.hidden_size), np.nan, np.float32)
        self.tokens = np.full(len(batch.sample_rows), -1, np.int32)
        self.maxima = np.full(len(batch.sample_rows), np.nan, np.float32)
        self.logits = np.full((len(batch.logit_rows), config.vocab_size), np.nan, np.float32)
        self.stop = np.zeros(1, np.int32)
        self.step = Step(
            len(batch.token_ids),
            len(batch.past_lens),
            len(batch.block_indices),
            len(batch.sample_rows),
            len(batch.logit_rows),
            0,
            model.num_stages,
            *(values.ctypes.data for values in batch[:7]),
            *(values.ctypes.data for values in self.outputs),
            self.stop.ctypes.data,
        )

    @property
    def outputs(self) -> tuple[npt.NDArray[Any], ...]:
        return self.hidden, self.tokens, self.maxima, self.logits


def assert_same_bits(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> None:
    """Also of zeros and of NaNs."""
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint8), np.ascontiguousarray(want).view(np.uint8)
    )


def _sums(lengths: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _unread(result: StepResult) -> ModelRunnerOutput:
    raise AssertionError("these tests read the result itself")
