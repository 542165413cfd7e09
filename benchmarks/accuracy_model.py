"""Does the executor compute the model, or something that reads like it?

A language model whose arithmetic is wrong still answers in good English. So its distribution over
the next token is compared, position by position, with that of ``transformers`` in float32 on the
weights of the same file, over real text with contexts up to 2,000 tokens. What is compared goes
through the executor, with block tables and steps as requests have them, in the two ways in which a
position can be computed: in prefill chunks of many sizes, and by decoding in a batch. Both must
give the same logits, bit for bit.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from native_steps import compute

from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import RatedPrompt, StepRow
from headway.engine.tokenizer import Tokenizer
from headway.executor.native import NativeExecutor

__all__ = [
    "CONTEXT",
    "STREAMS",
    "Digests",
    "Measured",
    "decode",
    "prefill",
    "reference_logits",
    "sequences",
]

Logits = npt.NDArray[np.float32]
Advance = Callable[[int], None]
#: Of the logits' bits, by (text, position).
Digests = dict[tuple[int, int], bytes]

#: Tokens of a sequence, and so the longest context.
CONTEXT = 2_000
#: Sequences that decode together.
STREAMS = 8
#: Sizes of prefill chunks, in turn: small and large, multiples of a block and not.
_CHUNKS = (128, 5, 32, 3, 64, 17, 2, 48, 96, 1)

#: Their documentation comes with Python: prose, lists, examples and some code.
_MODULES: tuple[str, ...] = ("argparse", "typing", "collections", "logging", "pickle", "statistics")
_MODULES += (
    "random",
    "datetime",
    "decimal",
    "asyncio",
    "tarfile",
    "threading",
    "string",
    "textwrap",
)
_MODULES += ("subprocess", "zipfile", "csv", "json", "heapq", "enum", "socketserver", "turtle")


class Measured(NamedTuple):
    """What was found, one element a position.

    Attributes:
        kl: Kullback-Leibler divergence from the reference's distribution to ours, in nats.
        nll_reference: negative log-likelihood, under the reference, of the token that follows.
        nll_headway: the same, under ours.
        top1: whether both have the same likeliest token.
    """

    kl: npt.NDArray[np.float64]
    nll_reference: npt.NDArray[np.float64]
    nll_headway: npt.NDArray[np.float64]
    top1: npt.NDArray[np.bool_]

    def summary(self) -> dict[str, float]:
        """The figures of merit over all positions."""
        reference, headway = float(self.nll_reference.mean()), float(self.nll_headway.mean())
        return {
            "positions": len(self.kl),
            "mean_kl": float(self.kl.mean()),
            "max_kl": float(self.kl.max()),
            "nll_reference": reference,
            "nll_headway": headway,
            "nll_difference": headway - reference,
            "top1_agreement": float(self.top1.mean()),
        }


def sequences(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """``count`` sequences of ``CONTEXT`` + 1 tokens, evenly spread over the text."""
    token_ids = tokenizer.encode("".join(_real_text()), add_special_tokens=False)
    room = len(token_ids) - CONTEXT - 1
    starts = [index * room // max(1, count - 1) for index in range(count)]
    return [token_ids[start : start + CONTEXT + 1] for start in starts]


def _real_text() -> Iterator[str]:
    for module_name in _MODULES:
        module = import_module(module_name)
        yield f"{module_name}\n\n{inspect.getdoc(module) or ''}\n\n"
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            member = getattr(module, name, None)
            own = getattr(member, "__module__", None) == module_name
            if own and (documentation := inspect.getdoc(member)):
                yield f"{name}\n\n{documentation}\n\n"


def reference_logits(path: Path, texts: Sequence[Sequence[int]], advance: Advance) -> list[Logits]:
    """The reference's logits at every position of each sequence."""
    import torch  # noqa: PLC0415 (extras, and slow to import)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    found = []
    for token_ids in texts:
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([token_ids[:CONTEXT]]), use_cache=False)
        found.append(output.logits[0].numpy())
        advance(CONTEXT)
    return found


def prefill(
    executor: NativeExecutor,
    texts: Sequence[Sequence[int]],
    reference: Sequence[Logits],
    positions: int,
    advance: Advance,
) -> tuple[Measured, Digests]:
    """Prefill each sequence in chunks of many sizes, and look at ``positions`` of them in all.

    Returns:
        What was found, and the digests of all positions.
    """
    stride = max(1, len(texts) * CONTEXT // positions)
    found = []
    digests: Digests = {}
    for index, (token_ids, expected) in enumerate(zip(texts, reference, strict=True)):
        (text,) = _texts(executor, [token_ids])
        start = turn = 0
        while start < CONTEXT:
            size = min(_CHUNKS[turn % len(_CHUNKS)], CONTEXT - start)
            turn += 1
            logits = compute(executor, [text.row(start, size)]).logits
            for row in range(size):
                digests[index, start + row] = _digest(logits[row])
            looked_at = np.arange(-start % stride, size, stride)
            following = [token_ids[start + row + 1] for row in looked_at]
            found.append(_measure(expected[start + looked_at], logits[looked_at], following))
            start += size
            advance(len(looked_at))
    return _concatenate(found), digests


def decode(
    executor: NativeExecutor,
    texts: Sequence[Sequence[int]],
    reference: Sequence[Logits],
    positions: int,
    digests: Digests,
    advance: Advance,
) -> tuple[Measured, int]:
    """Decode the texts' own tokens in a batch of streams, each beginning at another context.

    Returns:
        What was found, and at how many positions the logits are those with the given digests.
    """
    steps = min(CONTEXT - 1, -(-positions // STREAMS))
    of_text = [stream % len(texts) for stream in range(STREAMS)]
    starts = [1 + stream * (CONTEXT - 1 - steps) // (STREAMS - 1) for stream in range(STREAMS)]
    streams = _texts(executor, [texts[index] for index in of_text])
    for stream, length in zip(streams, starts, strict=True):
        for start in range(0, length, 128):
            compute(executor, [stream.row(start, min(128, length - start))])
    found = []
    num_equal = 0
    for step in range(steps):
        at = [start + step for start in starts]
        rows = [stream.row(position, 1) for stream, position in zip(streams, at, strict=True)]
        logits = compute(executor, rows).logits
        expected = [reference[index][position] for index, position in zip(of_text, at, strict=True)]
        following = [texts[index][n + 1] for index, n in zip(of_text, at, strict=True)]
        found.append(_measure(np.stack(expected), logits, following))
        num_equal += sum(
            digests[place] == _digest(line)
            for place, line in zip(zip(of_text, at, strict=True), logits, strict=True)
        )
        advance(STREAMS)
    return _concatenate(found), num_equal


def _digest(logits: Logits) -> bytes:
    return hashlib.blake2b(logits.tobytes(), digest_size=16).digest()


class _Text(NamedTuple):
    """A sequence in the pool.

    Attributes:
        token_ids: all of them, one more than the context has.
        block_table: for a whole context.
    """

    token_ids: Sequence[int]
    block_table: tuple[int, ...]

    def row(self, start: int, size: int) -> StepRow:
        """A step's row that computes so many tokens, and the logits after each of them."""
        following = tuple(self.token_ids[start + 1 : start + size + 1])
        return StepRow(
            "text",
            0,
            tuple(self.token_ids[start : start + size]),
            start,
            self.block_table,
            len(self.token_ids),
            SamplingParams(prompt_logprobs=0),
            rated=RatedPrompt(start + 1, following),
        )


def _texts(executor: NativeExecutor, texts: Sequence[Sequence[int]]) -> list[_Text]:
    """Texts with blocks for a whole context each; they lie interleaved in the pool."""
    needed = -(-CONTEXT // executor.block_size) * len(texts)
    if needed > executor.num_blocks:
        raise SystemExit(f"the pool has {executor.num_blocks} blocks, {needed} are needed")
    return [
        _Text(token_ids, tuple(range(index, needed, len(texts))))
        for index, token_ids in enumerate(texts)
    ]


def _measure(reference: Logits, ours: Logits, following: Sequence[int]) -> Measured:
    rows = np.arange(len(following))
    expected, actual = _log_softmax(reference), _log_softmax(ours)
    return Measured(
        kl=(np.exp(expected) * (expected - actual)).sum(axis=-1),
        nll_reference=-expected[rows, following],
        nll_headway=-actual[rows, following],
        top1=reference.argmax(axis=-1) == ours.argmax(axis=-1),
    )


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    if not shifted.size:
        return shifted
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _concatenate(found: Sequence[Measured]) -> Measured:
    columns: list[Any] = [np.concatenate(column) for column in zip(*found, strict=True)]
    return Measured(*columns)
