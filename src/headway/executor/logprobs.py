"""How likely a token was, and which were the likeliest, from one row of logits.

The logits are taken as the model gave them (vLLM's ``raw_logprobs``), so the numbers do not depend
on how a token was chosen.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from headway.executor.base import TokenLogprobs
from headway.executor.sampler import likeliest

__all__ = ["LogprobReader"]

#: The largest logits are looked for in blocks of this many.
_BLOCK: Final = 256


class LogprobReader:
    """Rates tokens from rows of one length.

    It keeps the array that it works in, for the reason that ``Sampler`` has, and so serves one
    thread only. Results do not depend on earlier calls.
    """

    def __init__(self, vocab_size: int) -> None:
        self._weights = np.empty(vocab_size, dtype=np.float32)
        self._starts = np.arange(0, vocab_size, _BLOCK)

    def read(self, row: npt.NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
        """The log-probabilities of ``token_id`` and of the likeliest tokens. O(vocabulary).

        Args:
            row: of the vocabulary's length; not modified.
            token_id: in the vocabulary.
            num_top: how many of the likeliest.

        Raises:
            InternalError: no logit is finite, or one is NaN or infinitely large.
        """
        largest = row[likeliest(row)]
        with np.errstate(over="ignore"):  # a difference too large for a float32: no weight
            weights = np.subtract(row, largest, out=self._weights)
        np.exp(weights, out=weights)
        shift = float(largest) + math.log(np.add.reduce(weights, dtype=np.float64))
        top = self._top(row, num_top) if num_top else []
        return TokenLogprobs(
            token_id,
            float(row[token_id]) - shift,
            tuple((likely, float(row[likely]) - shift) for likely in top),
        )

    def _top(self, row: npt.NDArray[np.float32], count: int) -> list[int]:
        """The ``count`` tokens with the largest logits, in order; ties: the smaller id.

        As many blocks have a maximum of at least ``edge``, so as many tokens have, and few others:
        only these candidates are sorted.
        """
        maxima = np.maximum.reduceat(row, self._starts)
        edge = np.partition(maxima, -count)[-count] if count <= maxima.size else row.min()
        candidates = np.flatnonzero(row >= edge)
        order = np.argsort(-row[candidates], kind="stable")[:count]
        return [int(token_id) for token_id in candidates[order]]
