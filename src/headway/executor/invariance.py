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
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from headway.core.request import Request, SamplingParams
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

_PLAIN: Final = SamplingParams(temperature=1.0, seed=0)
_RATED: Final = SamplingParams(temperature=1.0, seed=0, prompt_logprobs=0)


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

    def batch(self, requests: Sequence[Request], num_tokens: Sequence[int]) -> StepBatch: ...

    def forward(self, batch: StepBatch) -> StepResult: ...


def remembered_invariance(runner: _Runner, directory: Path, facts: str) -> Invariance:
    """The outcome that ``directory`` has for the same ``facts``, or a new check's."""
    name = hashlib.sha256(f"{_VERSION} {facts}".encode()).hexdigest()[:16]
    file = directory / f"invariance-{name}.json"
    try:
        return Invariance(**{key: bool(one) for key, one in json.loads(file.read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    invariance = check_batch_invariance(runner)
    if invariance.checked:
        with contextlib.suppress(OSError):  # it is checked again next time
            file.write_text(json.dumps(invariance._asdict()))
    return invariance


def check_batch_invariance(runner: _Runner) -> Invariance:
    """Run the check. Overwrites the pool's blocks: for a pool that nobody uses yet."""
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
        self._requests = []
        for index in range(_NUM_SEQS + 1):
            length = neighbour_length if index == _NUM_SEQS else _PROMPT - 3 * index
            tokens = random.integers(0, runner.vocab_size, length + 1).tolist()
            request = Request(f"check-{index}", prompt=tokens[:-1], sampling_params=_PLAIN)
            request.block_table = list(range(index * per_seq, (index + 1) * per_seq))
            # One token more than the prompt: the first generated one.
            request.token_ids.append(tokens[-1])
            self._requests.append(request)

    def _run(self, requests: Sequence[Request], counts: Sequence[int]) -> FloatArray:
        """The logits of the requests that reach their last token, then those of rated ones."""
        batch = self._runner.batch(requests, counts)
        return np.array(self._runner.forward(batch).logits)

    def prefill(self) -> None:
        requests = self._requests[:-1]
        self._run(requests, [request.num_prompt_tokens for request in requests])
        for request in requests:
            request.num_computed_tokens = request.num_prompt_tokens

    def decode(self, order: Iterable[int], chunk: int = 0, is_rated: bool = False) -> FloatArray:
        """The logits after one more token of these sequences, beside so many prompt tokens."""
        requests = [self._requests[index] for index in order]
        counts = [1] * len(requests)
        if chunk:
            neighbour = self._requests[-1]
            neighbour.sampling_params = _RATED if is_rated else _PLAIN
            return self._run([*requests, neighbour], [*counts, chunk])[: len(requests)]
        return self._run(requests, counts)

    def chunked(self, size: int) -> FloatArray:
        """The logits of a prompt, prefilled in chunks of ``size``, and of the token after it."""
        request = self._requests[0]
        request.sampling_params = _RATED
        request.num_computed_tokens = 0
        rows = []
        while request.num_computed_tokens < request.num_prompt_tokens:
            count = min(size, request.num_prompt_tokens - request.num_computed_tokens)
            rows.append(self._run([request], [count]))
            request.num_computed_tokens += count
        return np.concatenate([*rows, self._run([request], [1])])
