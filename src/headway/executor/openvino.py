"""The executor: a decoder graph on OpenVINO's CPU plug-in, driven by our block tables.

A step is: move blocks as the scheduler says, lay the rows' tokens end to end, one inference, and a
token for every row that has a seed.

What must hold beyond correctness is **batch invariance**: the logits of a sequence are bitwise the
same whatever else is in the step and however its prompt was cut into chunks. Then a request that
was paused or swapped goes on exactly as if it had not been, which is tested, and a request's output
is reproducible, which users notice. It depends on the kernels that the plug-in chooses, hence on
the weight format, the precision and the number of rows; the choices below are the fastest ones that
have the property, and ``check_batch_invariance`` tests it on the machine at hand. It does not cover
drafts: attention computes a row of several tokens by another kernel than one token, so the logits
of a sequence with drafts may differ in the last bits from those of one without.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Literal

import numpy as np
import openvino as ov

from headway.core.cost_model import Coefficients
from headway.core.errors import ConfigError, InternalError
from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.executor.base import ModelRunnerOutput
from headway.executor.batch import StepBatch, StepResult, build_batch
from headway.executor.cost_prior import cost_prior
from headway.executor.huge_pages import use_huge_pages
from headway.executor.invariance import Invariance, remembered_invariance
from headway.executor.memory import available_memory
from headway.executor.readout import Readout
from headway.executor.swap import BlockStore
from headway.models.conversion import ConvertedWeights, Progress, WeightFormat, load_converted
from headway.models.gguf import ModelConfig
from headway.models.graph import CACHE_NAMES, GRAPH_VERSION, build_model
from headway.models.registry import default_home

__all__ = ["KVCacheDtype", "OpenVINOExecutor", "Precision"]

KVCacheDtype = Literal["bf16", "f16", "f32", "u8"]

_DEFAULT_SWAP_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Precision:
    """How numbers are held and multiplied.

    Attributes:
        weight_format: of the matrices.
        arithmetic: of the products: ``bf16`` or ``f32``.
        kv_cache_dtype: of keys and values in the pool. ``u8`` is half the size of ``f16``, and
            gives up chunk invariance: a block filled in two steps is quantised twice.
        min_rows: rows that a product needs for its result not to depend on the number of rows.
        pairs_lone_tokens: whether a prompt chunk of one token has to compute the token before it
            once more for its result not to depend on the chunks.
    """

    weight_format: WeightFormat
    arithmetic: Literal["bf16", "f32"]
    kv_cache_dtype: KVCacheDtype
    min_rows: int
    pairs_lone_tokens: bool


#: The fastest batch-invariant choice where the processor multiplies bf16, and where it does not.
_BF16: Final = Precision("f32", "bf16", "bf16", min_rows=2, pairs_lone_tokens=True)
_F32: Final = Precision("f32", "f32", "f16", min_rows=2, pairs_lone_tokens=True)


class OpenVINOExecutor:
    """Runs steps of one model; one at a time, from one thread.

    Args:
        model_path: of the GGUF file.
        kv_cache_bytes: for the pool; by default a quarter of the available memory, but no more than
            ``max_num_seqs`` full contexts take.
        swap_space_bytes: limit of the swap space, 0 for none; by default 1 GiB, but no more than
            an eighth of the available memory. Untouched slots cost nothing.
        max_num_seqs: sequences that a step has at most.
        max_model_len: the longest context to serve, in tokens; by default the model's own.
        num_threads: for the computation; by default what the plug-in thinks best.
        home: Headway's directory; by default ``$HEADWAY_HOME`` or ``~/.cache/headway``.
        kv_cache_dtype: of keys and values; by default the processor's best.
        weight_format: of the matrices; by default the processor's best.
        progress: told of the stages ``checksum`` and ``convert`` (each with the fraction done),
            ``compile`` and ``check``.

    Raises:
        ModelError: the file is damaged or not supported.
        ConfigError: a setting is out of range, or the bytes do not hold a single block.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_cache_bytes: int | None = None,
        swap_space_bytes: int | None = None,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        home: Path | None = None,
        kv_cache_dtype: KVCacheDtype | None = None,
        weight_format: WeightFormat | None = None,
        progress: Progress | None = None,
    ) -> None:
        _check_settings(kv_cache_bytes, swap_space_bytes, max_num_seqs, max_model_len, num_threads)
        report = progress or _ignore
        core = ov.Core()
        #: How numbers are held and multiplied.
        self.precision = _choose_precision(core, kv_cache_dtype, weight_format)
        weights, converted = load_converted(
            Path(model_path),
            self.precision.weight_format,
            (home or default_home()) / "converted",
            ov.__version__,
            progress,
        )
        self.model_config: ModelConfig = weights.config
        self.max_model_len = _checked_context(max_model_len, self.model_config)
        report("compile", 0.0)
        compiled = self._compile(core, converted, num_threads)
        report("compile", 1.0)
        self._allocate(compiled, kv_cache_bytes, swap_space_bytes, max_num_seqs)
        self._readout = Readout(self.model_config.vocab_size)
        self._closed = False
        self._pack_weights()
        report("check", 0.0)
        machine = f"{GRAPH_VERSION} {self.precision} {self._num_threads} {_processor()}"
        #: Whether results are independent of the batch on this machine, and how it was found.
        self.invariance: Invariance = remembered_invariance(self, converted.directory, machine)
        report("check", 1.0)

    def _compile(
        self, core: ov.Core, converted: ConvertedWeights, num_threads: int | None
    ) -> ov.CompiledModel:
        """Build the graph and let the plug-in compile it, for one request at a time."""
        model = build_model(self.model_config, converted, self.max_model_len)
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": self.precision.arithmetic,
            "KV_CACHE_PRECISION": self.precision.kv_cache_dtype,
        }
        if num_threads is not None:
            properties["INFERENCE_NUM_THREADS"] = num_threads
        try:
            compiled = core.compile_model(model, "CPU", properties)
        except RuntimeError as error:
            raise ConfigError(
                f"OpenVINO cannot compile {self.model_config.name!r} with {properties}: "
                f"{_last_line(error)}"
            ) from error
        #: The graph refers to these arrays without owning them; dropped after the request only.
        self._weights: ConvertedWeights | None = converted
        self._request: ov.InferRequest = compiled.create_infer_request()
        self._num_threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        return compiled

    def _allocate(
        self,
        compiled: ov.CompiledModel,
        kv_cache_bytes: int | None,
        swap_space_bytes: int | None,
        max_num_seqs: int,
    ) -> None:
        """Reserve pool and swap space, and hand the pool to the graph as its cache tensors."""
        caches = [
            (name, compiled.input(name))
            for layer in range(self.model_config.num_layers)
            for name in (form.format(layer) for form in CACHE_NAMES)
        ]
        shapes = [
            [dim.get_length() for dim in list(port.get_partial_shape())[1:]] for _, port in caches
        ]
        row_bytes = [
            int(np.prod(shape)) * port.get_element_type().size
            for shape, (_, port) in zip(shapes, caches, strict=True)
        ]
        #: Values are stored token by token in every precision, so their shape has the block size.
        self.block_size = int(shapes[1][1])
        self.bytes_per_block: int = sum(row_bytes)
        available = available_memory()
        self.num_blocks: int = self._num_blocks(kv_cache_bytes, available, max_num_seqs)
        if swap_space_bytes is None:
            swap_space_bytes = min(_DEFAULT_SWAP_BYTES, available // 8)
        self.num_swap_blocks: int = swap_space_bytes // self.bytes_per_block
        # Blocks that the scheduler does not know of (see ``build_batch``); no page of them is
        # touched unless they are needed.
        total_blocks = self.num_blocks + 1 + max_num_seqs
        self._scratch_blocks = range(self.num_blocks, total_blocks)
        self._store = BlockStore(row_bytes, total_blocks, self.num_swap_blocks)
        for (name, port), shape, rows in zip(caches, shapes, self._store.pool, strict=True):
            tensor = ov.Tensor(rows, ov.Shape([total_blocks, *shape]), port.get_element_type())
            self._request.set_tensor(name, tensor)

    def _num_blocks(self, kv_cache_bytes: int | None, available: int, max_num_seqs: int) -> int:
        if kv_cache_bytes is None:
            full = -(-self.max_model_len // self.block_size) * max_num_seqs
            return max(1, min(available // 4 // self.bytes_per_block, full))
        num_blocks = kv_cache_bytes // self.bytes_per_block
        if num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes is {kv_cache_bytes:,}, a single block of {self.block_size} tokens "
                f"takes {self.bytes_per_block:,}"
            )
        return num_blocks

    def _pack_weights(self) -> None:
        """Sample one token: the plug-in packs a matrix in the first inference that needs it."""
        scratch = tuple(self._scratch_blocks[:1])
        row = StepRow("first", 0, (0,), 0, scratch, 1, SamplingParams(), seeds=(0,))
        self.forward(self.batch([row]))
        use_huge_pages()

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step; see ``Executor.execute``. Modifies the pool and the swap space only.

        Raises:
            InternalError: the executor is closed, or the inference failed.
        """
        if self._closed:
            raise InternalError("the executor is closed")
        started = perf_counter()
        self._store.swap_out(output.swap_out)
        swap_seconds = perf_counter() - started
        self._store.copy(output.block_copies)
        started = perf_counter()
        self._store.swap_in(output.swap_in)
        swap_ms = (swap_seconds + perf_counter() - started) * 1e3
        if not output.rows:
            return ModelRunnerOutput([], swap_ms)
        batch = self.batch(output.rows)
        return self._readout.read(output.rows, batch, self.forward(batch), swap_ms)

    def batch(self, rows: Sequence[StepRow]) -> StepBatch:
        """The arrays of a step that consists of ``rows``."""
        return build_batch(
            rows,
            self.block_size,
            self._scratch_blocks,
            min_rows=self.precision.min_rows,
            pairs_lone_tokens=self.precision.pairs_lone_tokens,
            rounds_rows=True,
        )

    def forward(self, batch: StepBatch) -> StepResult:
        """One inference; the arrays are the graph's own.

        Raises:
            InternalError: the inference failed.
        """
        self._store.copy(batch.copies)
        try:
            self._request.infer(batch.inputs, share_inputs=True)
        except RuntimeError as error:
            raise InternalError(f"OpenVINO inference failed: {_last_line(error)}") from error
        return StepResult(*(self._request.get_tensor(name).data for name in StepResult._fields))

    @property
    def cost_prior(self) -> Coefficients:
        """A first guess of what a step costs (ms), from the sizes of model and machine."""
        return cost_prior(self.model_config, self._num_threads)

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self.model_config.vocab_size

    def describe(self) -> dict[str, str]:
        """What runs, for people: label → value."""
        config, precision = self.model_config, self.precision
        tokens = self.num_blocks * self.block_size
        return {
            "model": f"{config.name} ({config.architecture}, {config.num_layers} layers)",
            "weights": f"{precision.weight_format}, {precision.arithmetic} arithmetic",
            "threads": str(self._num_threads),
            "context": f"{self.max_model_len:,} tokens",
            "KV cache": (
                f"{self.num_blocks:,} blocks of {self.block_size} tokens = {tokens:,} tokens, "
                f"{precision.kv_cache_dtype}, "
                f"{self.num_blocks * self.bytes_per_block / 1e6:,.0f} MB"
            ),
            "swap space": (
                f"{self.num_swap_blocks:,} blocks, "
                f"{self.num_swap_blocks * self.bytes_per_block / 1e6:,.0f} MB"
            ),
            "batch invariance": self.invariance.summary,
        }

    def close(self) -> None:
        """Release memory and threads; idempotent."""
        if not self._closed:
            self._closed = True
            del self._request
            self._weights = None
            self._store.close()


def _check_settings(
    kv_cache_bytes: int | None,
    swap_space_bytes: int | None,
    max_num_seqs: int,
    max_model_len: int | None,
    num_threads: int | None,
) -> None:
    for name, value, least in (
        ("kv_cache_bytes", kv_cache_bytes, 1),
        ("swap_space_bytes", swap_space_bytes, 0),
        ("max_num_seqs", max_num_seqs, 1),
        ("max_model_len", max_model_len, 1),
        ("num_threads", num_threads, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}, must be at least {least}")


def _choose_precision(
    core: ov.Core, kv_cache_dtype: KVCacheDtype | None, weight_format: WeightFormat | None
) -> Precision:
    """The best for this processor, but for what the caller wants otherwise."""
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    best = _BF16 if "BF16" in capabilities else _F32
    return replace(
        best,
        weight_format=weight_format or best.weight_format,
        kv_cache_dtype=kv_cache_dtype or best.kv_cache_dtype,
        # A token written twice into a quantised block would quantise the block twice.
        pairs_lone_tokens=best.pairs_lone_tokens and kv_cache_dtype != "u8",
    )


def _checked_context(max_model_len: int | None, config: ModelConfig) -> int:
    context = config.context_length
    if max_model_len is not None and max_model_len > context:
        raise ConfigError(f"max_model_len is {max_model_len}, the model's context is {context}")
    return max_model_len or context


def _ignore(stage: str, fraction: float) -> None:
    """Progress that the caller does not want to hear of."""


def _last_line(error: Exception) -> str:
    """The last non-empty line of an OpenVINO exception: the others say where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("flags"):
                    return line
    except OSError:
        pass
    return platform.processor()
