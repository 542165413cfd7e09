"""Which kernels run here, and whether their threads are pinned: found by trying, and remembered.

A processor that has the wider vectors is not always faster with them, and pinning helps on a
machine of one's own and hurts on a shared one. So each candidate computes a few steps of the model
at hand. That takes a second or two, once for a machine, a model and a number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np

from headway.core.errors import KernelError
from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import StepRow
from headway.executor.base import ModelRunnerOutput
from headway.executor.batch import StepResult, build_batch
from headway.executor.execution import Execution
from headway.executor.native_model import BLOCK_SIZE, NativeModel
from headway.kernels.library import Cache

__all__ = ["KernelChoice", "choose_kernels"]

#: To be raised with every change of what is tried.
_VERSION: Final = 1
#: (sequences, tokens of each): decoding alone, in a batch, and a prompt.
_STEPS: Final = ((1, 1), (16, 1), (1, 96))
_CONTEXT: Final = 64
_ROUNDS: Final = 5
#: Pinning must be so much faster to be chosen: a machine's other work may come later.
_WORTH_PINNING: Final = 0.97


class KernelChoice(NamedTuple):
    """The fastest on this machine.

    Attributes:
        path: of the kernels.
        pinned: whether threads are bound to processors.
    """

    path: str
    pinned: bool


def choose_kernels(
    paths: Sequence[str], make: Callable[[str], NativeModel], facts: str, directory: Path
) -> tuple[KernelChoice, NativeModel]:
    """The fastest of ``paths``, and the model made with it.

    Args:
        paths: names of the candidates, at least one.
        make: makes the model with the kernels of a path.
        facts: all that the choice depends on beside the paths: model, machine, threads.
        directory: where choices are remembered.

    Raises:
        KernelError: none of them can be compiled. One that cannot is passed over: a compiler may be
            older than the processor.
    """
    key = hashlib.sha256(f"{_VERSION} {' '.join(paths)} {facts}".encode()).hexdigest()[:16]
    file = directory / f"choice-{key}.json"
    choice = _remembered(file, paths)
    if choice is None:
        choice = _tried(paths, make)
        with contextlib.suppress(OSError):  # it is tried again next time
            directory.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(choice._asdict()))
    model = make(choice.path)
    model.pin(choice.pinned)
    return choice, model


def _tried(paths: Sequence[str], make: Callable[[str], NativeModel]) -> KernelChoice:
    times: dict[KernelChoice, float] = {}
    failure: KernelError | None = None
    for path in paths:
        try:
            model = make(path)
        except KernelError as error:
            failure = failure or error
            continue
        for pinned in (False, True):
            model.pin(pinned)
            times[KernelChoice(path, pinned)] = _time(model) / (_WORTH_PINNING if pinned else 1.0)
        model.close()
    if failure is not None and not times:
        raise failure
    return min(times, key=lambda each: times[each])


def _remembered(file: Path, paths: Sequence[str]) -> KernelChoice | None:
    try:
        choice = KernelChoice(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return choice if choice.path in paths and isinstance(choice.pinned, bool) else None


def _time(model: NativeModel) -> float:
    """The geometric mean of the steps' shortest times (s): a neighbour's work only adds to them."""
    product = 1.0
    for most_seqs, most_tokens in _STEPS:
        num_tokens = min(most_tokens, model.max_tokens, model.max_model_len)
        num_seqs = min(most_seqs, model.max_tokens // num_tokens)
        context = min(_CONTEXT, model.max_model_len - num_tokens)
        blocks_each = math.ceil((context + num_tokens) / BLOCK_SIZE)
        pool = np.zeros(num_seqs * blocks_each * model.block_bytes, np.uint8)
        cache = Cache(pool.ctypes.data, num_seqs * blocks_each)
        rows = [
            StepRow(
                str(index),
                0,
                (0,) * num_tokens,
                context,
                tuple(range(index * blocks_each, (index + 1) * blocks_each)),
                context + num_tokens,
                SamplingParams(temperature=0.0),
                seeds=(None,),
            )
            for index in range(num_seqs)
        ]
        batch = build_batch(rows, BLOCK_SIZE)
        shortest = math.inf
        for _ in range(_ROUNDS):
            execution = Execution(model, cache, batch, _unread)
            started = perf_counter()
            execution.advance()
            shortest = min(shortest, perf_counter() - started)
        product *= shortest
    return float(product ** (1 / len(_STEPS)))


def _unread(result: StepResult) -> ModelRunnerOutput:
    raise AssertionError("a trial's results are not read")
