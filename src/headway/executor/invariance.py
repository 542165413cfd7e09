"""Does a sequence's result depend on its company? Asked of the machine, not of a table.

The check compares logits bit by bit: one token after a short context, computed beside other
numbers of sequences and beside a prefill chunk, with the logits of the chunk's own tokens and
without, and a whole prompt, prefilled in different chunks. It takes a few seconds, once per machine
and model: the answer is kept with the converted weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import RatedPrompt, StepRow
from headway.executor.batch import StepBatch, StepResult

__all__ = ["Invariance", "check_batch_invariance", "remembered_invariance"]

FloatArray = npt.NDArray[np.float32]

#: To be raised with every change of what is checked.
_VERSION: Final = 5
_NUM_SEQS: Final = 7
_PROMPT: Final = 40
#: Sequences in a step. Larger than there are: the same ones several times over, which write the
#: same bits to the same places.
_BATCHES: Final = (1, 2, 3, 5, 16, 33, 64)
_CHUNKS: Final = (39, 32, 13)
#: (sequences, tokens of the prefill chunk beside them, whether their logits are wanted, too).
_BESIDE: Final = (
    (1, 1, False),
    (1, 70, False),
    (2, 150, False),
    (40, 30, False),
    (1, 2, True),
    (3, 70, True),
    (40, 150, True),
)

#: Not greedy, so that the graph hands the logits over.
_SAMPLING: Final = SamplingParams(temperature=1.0, prompt_logprobs=0)


class Invariance(NamedTuple):
    """The outcome.

    Attributes:
        batch: the logits of a decoding sequence are the same beside other numbers of sequences.
        beside_prefill: and beside a prefill chunk.
        chunks: the logits of a prompt are the same however it is cut.
        checked: False if the pool was too small to check; the other three are then False, too.
    """

    batch: bool
    beside_prefill: bool
    chunks: bool
    checked: bool = True

    @property
    def holds(self) -> bool:
        """All of it."""
        return self.batch and self.beside_prefill and self.chunks

    @property
    def summary(self) -> str:
        """In one line, for people."""
        if not self.checked:
            return "not checked (the pool is too small)"
        parts = {
            "batch size": self.batch,
            "prefill beside it": self.beside_prefill,
            "prompt chunks": self.chunks,
        }
        missing = [name for name, holds in parts.items() if not holds]
        if not missing:
            return "checked: results do not depend on the batch, bit for bit"
        return f"checked: results vary in the last bits with {', '.join(missing)}"


class _Runner(Protocol):
    """The part of the executor that the check needs."""

    num_blocks: int
    block_size: int
    max_model_len: int

    @property
    def vocab_size(self) -> int: ...

    def batch(self, rows: Sequence[StepRow]) -> StepBatch: ...

    def forward(self, batch: StepBatch) -> StepResult: ...


def remembered_invariance(runner: _Runner, directory: Path, facts: str) -> Invariance:
    """The outcome that ``directory`` has for the same ``facts``, or a new check's."""
    name = hashlib.sha256(f"{_VERSION} {facts}".encode()).hexdigest()[:16]
    file = directory / f"invariance-{name}.json"
    try:
        outcome = json.loads(file.read_text())
        return Invariance(**{part: bool(holds) for part, holds in outcome.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    invariance = check_batch_invariance(runner)
    if invariance.checked:
        with contextlib.suppress(OSError):  # it is checked again next time
            file.write_text(json.dumps(invariance._asdict()))
    return invariance


def check_batch_invariance(runner: _Runner) -> Invariance:
    """Run the check. Overwrites the pool's blocks: for a pool that is not in use yet."""
    check = _Check(runner)
    if not check.fits:
        return Invariance(False, False, False, checked=False)
    check.prefill()
    alone = np.concatenate([check.decode([index]) for index in range(_NUM_SEQS)])
    cycle = np.arange(max(_BATCHES)) % _NUM_SEQS
    orders = [cycle[:size] for size in _BATCHES]
    batch = all(np.array_equal(check.decode(order), alone[order]) for order in orders)
    beside = all(
        np.array_equal(check.decode(cycle[:size], chunk, is_rated), alone[cycle[:size]])
        for size, chunk, is_rated in _BESIDE
    )
    whole = check.chunked(_PROMPT)
    chunks = all(np.array_equal(check.chunked(size), whole) for size in _CHUNKS)
    return Invariance(batch, beside, chunks)


class _Check:
    def __init__(self, runner: _Runner) -> None:
        self._runner = runner
        random = np.random.default_rng(0)
        neighbour_length = max(chunk for _, chunk, _ in _BESIDE) + 1
        per_seq = -(-max(_PROMPT + 1, neighbour_length) // runner.block_size)
        self.fits = (
            runner.num_blocks >= per_seq * (_NUM_SEQS + 1)
            and runner.max_model_len >= neighbour_length
        )
        #: Prompts, each with one token more: the first generated one.
        self._sequences: list[tuple[int, ...]] = []
        self._block_tables: list[tuple[int, ...]] = []
        for index in range(_NUM_SEQS + 1):
            length = neighbour_length if index == _NUM_SEQS else _PROMPT - 3 * index
            self._sequences.append(
                tuple(random.integers(0, runner.vocab_size, length + 1).tolist())
            )
            self._block_tables.append(tuple(range(index * per_seq, (index + 1) * per_seq)))

    def _row(self, index: int, start: int, end: int, is_rated: bool = False) -> StepRow:
        """Computes the positions ``start`` … ``end`` − 1 of a sequence.

        Its logits are handed over where it reaches the sequence's end, and those that tell of its
        prompt's next tokens if it ``is_rated``.
        """
        tokens = self._sequences[index]
        prompt = tokens[:-1]
        told = prompt[start + 1 : end + 1]
        return StepRow(
            f"check-{index}",
            0,
            tokens[start:end],
            start,
            self._block_tables[index],
            len(prompt),
            _SAMPLING,
            seeds=(0,) if end == len(tokens) else (),
            context=tokens[:start],
            rated=RatedPrompt(start + 1, told) if is_rated and told else None,
        )

    def _run(self, rows: Sequence[StepRow]) -> FloatArray:
        """The logits of the rows that reach their sequence's end, then those of rated ones."""
        return np.array(self._runner.forward(self._runner.batch(rows)).logits)

    def prefill(self) -> None:
        self._run(
            [self._row(index, 0, len(self._sequences[index]) - 1) for index in range(_NUM_SEQS)]
        )

    def decode(self, order: Iterable[int], chunk: int = 0, is_rated: bool = False) -> FloatArray:
        """The logits after one more token of these sequences, beside so many prompt tokens."""
        lengths = [(index, len(self._sequences[index])) for index in order]
        rows = [self._row(index, length - 1, length) for index, length in lengths]
        if chunk:
            return self._run([*rows, self._row(_NUM_SEQS, 0, chunk, is_rated)])[: len(rows)]
        return self._run(rows)

    def chunked(self, size: int) -> FloatArray:
        """The logits of a prompt, prefilled in chunks of ``size``, and of the token after it."""
        num_prompt_tokens = len(self._sequences[0]) - 1
        cuts = [*range(0, num_prompt_tokens, size), num_prompt_tokens, num_prompt_tokens + 1]
        return np.concatenate(
            [self._run([self._row(0, *chunk, is_rated=True)]) for chunk in pairwise(cuts)]
        )
