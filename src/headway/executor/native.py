"""The executor: our own kernels on the CPU, driven by our block tables.

A step is: move blocks as the scheduler says, lay the rows' tokens end to end, let the model compute
them, and choose a token for every row that has a seed.

What must hold beyond correctness is **batch invariance**: the logits of a sequence are bitwise the
same whatever else is in the step, however its tokens were cut into steps, and on however many
threads. The kernels have it by construction: they sum every number in one order. So a request that
was paused, swapped or recomputed goes on exactly as if it had not been, and a request's output is
reproducible, which users notice.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Final

from headway.core.cost_model import Coefficients
from headway.core.errors import ConfigError, InternalError
from headway.core.scheduler_output import SchedulerOutput
from headway.executor.base import ModelRunnerOutput
from headway.executor.batch import StepResult, build_batch
from headway.executor.cost_prior import cost_prior
from headway.executor.execution import Execution
from headway.executor.kernel_choice import KernelChoice, choose_kernels
from headway.executor.memory import available_memory
from headway.executor.native_model import BLOCK_SIZE, NativeModel
from headway.executor.precision import Precision, check_precision
from headway.executor.readout import Readout
from headway.executor.swap import BlockStore
from headway.kernels.library import Cache, open_library
from headway.kernels.loader import available_paths, load
from headway.kernels.paths import read_processor
from headway.models.gguf import ModelConfig
from headway.models.packed_model import Progress, load_packed
from headway.models.registry import default_home

__all__ = ["NativeExecutor"]

_DEFAULT_SWAP_BYTES: Final = 1 << 30


class NativeExecutor:
    """Runs steps of one model; one at a time, from one thread.

    Args:
        model_path: of the GGUF file.
        kv_cache_bytes: for the pool; by default a quarter of the available memory, but no more than
            ``max_num_seqs`` full contexts take.
        swap_space_bytes: limit of the swap space, 0 for none; by default 1 GiB, but no more than
            an eighth of the available memory. Untouched slots cost nothing.
        max_num_seqs: sequences that a step has at most.
        max_num_batched_tokens: tokens that a step has at most.
        max_model_len: the longest context to serve, in tokens; by default the model's own.
        num_threads: for the computation; by default one for each processor that may be used.
        precision: of the activations where they are multiplied: ``int8`` in groups of 32 is the
            fastest, ``bf16`` is nearer to float32.
        home: Headway's directory; by default ``$HEADWAY_HOME`` or ``~/.cache/headway``.
        progress: told of the stages ``compile``, ``checksum`` and ``convert`` (each with the
            fraction done), as far as they have not been done before, and ``try``.

    Raises:
        ModelError: the file is damaged or not supported.
        KernelError: the kernels must be compiled, and cannot be.
        ConfigError: a setting is out of range, or the bytes do not hold a single block.
    """

    #: Tokens in a block.
    block_size = BLOCK_SIZE

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_cache_bytes: int | None = None,
        swap_space_bytes: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        precision: Precision = "int8",
        home: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        for name, value, least in (
            ("kv_cache_bytes", kv_cache_bytes, 1),
            ("swap_space_bytes", swap_space_bytes, 0),
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("max_model_len", max_model_len, 1),
            ("num_threads", num_threads, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, must be at least {least}")
        check_precision(precision)
        home = home or default_home()
        report = progress or _ignore
        paths = available_paths()
        packed = load_packed(Path(model_path), home / "packed", progress)
        #: Of the model.
        self.model_config: ModelConfig = packed.config
        self.max_model_len: int = _checked_context(max_model_len, self.model_config)
        #: How activations are held where they are multiplied.
        self.precision: Precision = precision
        #: That compute.
        self.num_threads = num_threads or _num_processors()

        def make(path: str) -> NativeModel:
            library = load(path, home / "kernels", progress)
            report("try", 0.0)
            return NativeModel(
                open_library(library),
                packed,
                precision=precision,
                num_threads=self.num_threads,
                max_model_len=self.max_model_len,
                max_tokens=max_num_batched_tokens,
            )

        # The portable kernels are for processors on which no others run.
        self._choice, self._model = choose_kernels(
            paths[:-1] or paths,
            make,
            f"{self.model_config} {precision} {self.num_threads} {read_processor().identity}",
            home / "kernels",
        )
        report("try", 1.0)
        self._weight_bytes = sum(matrix.data.nbytes for matrix in packed.matrices.values())
        try:
            self._allocate(kv_cache_bytes, swap_space_bytes, max_num_seqs)
        except ConfigError:
            self._model.close()
            raise
        self._readout = Readout(self.vocab_size)
        self._closed = False

    def _allocate(
        self, kv_cache_bytes: int | None, swap_space_bytes: int | None, max_num_seqs: int
    ) -> None:
        """Reserve pool and swap space."""
        available = available_memory()
        #: Bytes of a block in the pool.
        self.bytes_per_block: int = self._model.block_bytes
        if kv_cache_bytes is None:
            full = -(-self.max_model_len // BLOCK_SIZE) * max_num_seqs
            kv_cache_bytes = min(available // 4, full * self.bytes_per_block)
            kv_cache_bytes = max(kv_cache_bytes, self.bytes_per_block)
        self.num_blocks: int = kv_cache_bytes // self.bytes_per_block
        if self.num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes is {kv_cache_bytes:,}, a single block of {BLOCK_SIZE} tokens "
                f"takes {self.bytes_per_block:,}"
            )
        if swap_space_bytes is None:
            swap_space_bytes = min(_DEFAULT_SWAP_BYTES, available // 8)
        self.num_swap_blocks: int = swap_space_bytes // self.bytes_per_block
        self._store = BlockStore(self.bytes_per_block, self.num_blocks, self.num_swap_blocks)
        self._cache = Cache(self._store.pool.ctypes.data, self.num_blocks)

    def begin(self, output: SchedulerOutput) -> Execution:
        """Do a step's block moves, and prepare its computation.

        The moves are done when this returns. Until the execution is complete or forgotten, the
        blocks of its rows belong to it.

        Raises:
            InternalError: the executor is closed.
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
        rows = output.rows
        batch = build_batch(rows, BLOCK_SIZE) if rows else None

        def read(result: StepResult) -> ModelRunnerOutput:
            if batch is None:
                return ModelRunnerOutput([], swap_ms)
            return self._readout.read(rows, batch, result, swap_ms)

        return Execution(self._model, self._cache, batch, read)

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a whole step; see ``Executor.execute``. Modifies pool and swap space only.

        Raises:
            InternalError: the executor is closed, or the step does not fit the model or the pool.
        """
        execution = self.begin(output)
        while not execution.advance():
            pass
        return execution.output()

    @property
    def cost_prior(self) -> Coefficients:
        """A first guess of what a step costs (ms), from the sizes of model and machine."""
        return cost_prior(self.model_config, self.num_threads)

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self.model_config.vocab_size

    @property
    def kernels(self) -> KernelChoice:
        """Which kernels run, and how."""
        return self._choice

    def describe(self) -> dict[str, str]:
        """What runs, for people: label → value."""
        config, tokens = self.model_config, self.num_blocks * BLOCK_SIZE
        pinned = ", each on a processor of its own" if self._choice.pinned else ""
        return {
            "model": f"{config.name} ({config.architecture}, {config.num_layers} layers)",
            "kernels": f"{self._choice.path}, {self.precision} activations",
            "weights": (
                f"{self._weight_bytes / 1e6:,.0f} MB; scratch space up to "
                f"{self._model.scratch_bytes / 1e6:,.0f} MB"
            ),
            "threads": f"{self.num_threads}{pinned}",
            "context": f"{self.max_model_len:,} tokens",
            "KV cache": (
                f"{self.num_blocks:,} blocks of {BLOCK_SIZE} tokens = {tokens:,} tokens, bf16, "
                f"{self.num_blocks * self.bytes_per_block / 1e6:,.0f} MB"
            ),
            "swap space": (
                f"{self.num_swap_blocks:,} blocks, "
                f"{self.num_swap_blocks * self.bytes_per_block / 1e6:,.0f} MB"
            ),
            "results": "do not depend on the load, bit for bit",
        }

    def close(self) -> None:
        """Release memory and threads; idempotent. Not while a step runs."""
        if not self._closed:
            self._closed = True
            self._model.close()
            self._store.close()


def _num_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _checked_context(max_model_len: int | None, config: ModelConfig) -> int:
    context = config.context_length
    if max_model_len is not None and max_model_len > context:
        raise ConfigError(f"max_model_len is {max_model_len}, the model's context is {context}")
    return max_model_len or context


def _ignore(stage: str, fraction: float) -> None:
    """Progress that the caller does not want to hear of."""
