"""Choosing a token from one row of logits.

The draw is a pure function of the logits, the parameters, the seed and the position in the
sequence. There is no generator whose state advances from token to token: the random number of a
position comes from a counter-based generator (Philox: Salmon, Moraes, Dror and Shaw, "Parallel
Random Numbers: As Easy as 1, 2, 3", SC'11), keyed by the seed, its counter the position. So a
request that was paused, swapped out, recomputed or batched with others draws the same tokens as
one that ran alone, and nothing has to be saved when it yields.

The order of the steps is vLLM's (V1 engine):

1. banned tokens get no chance: their logits become −∞;
2. biases are added;
3. penalties: repetition over prompt and output, then frequency and presence over the output;
4. where the choice is greedy, the largest logit is chosen, and the rest does not matter;
5. temperature;
6. min-p;
7. top-k, then top-p over what both left;
8. one of the tokens left is drawn.

One thing is stricter: of tokens with equal logits at the edge of the top k, those with the smaller
ids stay, so that exactly k do, and ``top_k=1`` is the greedy choice. Greedy ties, too, go to the
smaller id.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
import numpy.typing as npt

from headway.core.errors import InternalError
from headway.core.sampling_params import SamplingParams

__all__ = ["Sampler", "TokenIds", "likeliest", "uniform"]

#: Token ids; of a numpy array or an ``array.array``, no element is looked at in Python.
TokenIds = Collection[int] | npt.NDArray[np.int64]

# Below it, division would overflow for logits that differ at all; vLLM's limit for "greedy".
_GREEDY_TEMPERATURE: Final = 1e-5

# Sums over a whole vocabulary go by blocks of this many tokens: a running sum is several times
# slower than a sum, so it is taken over the blocks first and then inside one of them.
_BLOCK: Final = 256

# The buckets of `_nucleus`: the exponent and the five leading bits of the mantissa of a float32.
_BUCKET_SHIFT: Final = np.uint32(18)

_LARGEST: Final = float(np.finfo(np.float32).max)

_MASK64: Final = (1 << 64) - 1


class Sampler:
    """Chooses tokens from rows of one length.

    It keeps the arrays that a choice works in: they are larger than what the allocator hands out
    again without asking the system for fresh pages, and clearing those pages would cost several
    times as much as the choice itself. A sampler may therefore serve one thread only. It has no
    other state: results do not depend on earlier calls.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise InternalError(f"vocab_size is {vocab_size}, must be at least 1")
        self._distance = np.empty(vocab_size, dtype=np.float32)
        self._weights = np.empty(vocab_size, dtype=np.float32)
        self._scratch = np.empty(vocab_size, dtype=np.float32)
        self._wide = np.empty(vocab_size, dtype=np.float64)
        self._buckets = np.empty(vocab_size, dtype=np.intp)

    def sample(
        self,
        logits: npt.NDArray[np.floating],
        params: SamplingParams,
        position: int,
        seed: int | None,
        num_prompt_tokens: int = 0,
        tokens: TokenIds = (),
        banned: Collection[int] = (),
    ) -> int:
        """Choose a token id. O(vocabulary + tokens): nothing of that size is sorted.

        Args:
            logits: one row, of the vocabulary's length; ``-inf`` forbids a token. Not modified.
            params: how to choose; their own ``seed`` is not looked at.
            position: the index in the sequence of the token to be chosen, which makes its random
                number different from that of every other token of the sequence.
            seed: of the sequence; None only where the choice is greedy.
            num_prompt_tokens: of ``tokens``, how many are the prompt.
            tokens: the sequence so far, for penalties; may be empty unless
                ``params.needs_history``.
            banned: tokens that must not be chosen; ids outside of the vocabulary change nothing.

        Raises:
            InternalError: the logits are not such a row, none of them is finite or all that are
                finite are banned, one is NaN or infinitely large, or the seed is missing.
        """
        row = np.asarray(logits, dtype=np.float32)
        if row.shape != self._distance.shape:
            raise InternalError(f"logits of shape {row.shape}, wanted {self._distance.shape}")
        best = likeliest(row)
        if banned or params.logit_bias or params.needs_history:
            row = self._adjusted(row, params, num_prompt_tokens, tokens, banned)
            best = likeliest(row)
        if params.temperature < _GREEDY_TEMPERATURE or params.top_k == 1:
            return best
        if seed is None:
            raise InternalError("a request that samples has no seed")

        # Everything below works on how far a logit lies under the largest one: never negative, so
        # its bits are ordered like its value. An adjusted row is in ``_distance`` already.
        # A difference too large for a float32 becomes infinite: a token of no weight, as it is.
        with np.errstate(over="ignore"):
            # A largest logit of −0 would make distances of −0, whose bits are not in order.
            distance = np.subtract(row[best] + np.float32(0.0), row, out=self._distance)
        # Min-p and top-k both keep a beginning of the ranking, which temperature does not change,
        # so their order does not matter. The cheapest goes first.
        chosen: npt.NDArray[np.intp] | None = None  # the ids left, ascending; None: all of them
        if 0 < params.top_k < row.size:
            chosen = self._nearest(distance, params.top_k)
            distance = distance[chosen]
        with np.errstate(over="ignore"):
            distance /= np.float32(params.temperature)
        weights = np.negative(distance, out=self._weights[: distance.size])
        np.exp(weights, out=weights)
        if params.min_p > 0.0:
            # The largest weight is 1, so the others are what they are relative to it.
            weights *= weights >= np.float32(params.min_p)
        if params.top_p < 1.0:
            weights *= self._nucleus(distance, weights, params.top_p)
        index = _draw(weights, uniform(seed, position))
        return index if chosen is None else int(chosen[index])

    def _adjusted(
        self,
        row: npt.NDArray[np.float32],
        params: SamplingParams,
        num_prompt_tokens: int,
        tokens: TokenIds,
        banned: Collection[int],
    ) -> npt.NDArray[np.float32]:
        """The logits with bans, biases and penalties. O(vocabulary + tokens)."""
        adjusted = self._distance
        adjusted[:] = row
        if banned:
            adjusted[[token_id for token_id in banned if token_id < row.size]] = -np.inf
        if params.logit_bias:
            adjusted[list(params.logit_bias)] += list(params.logit_bias.values())
        if params.needs_history and len(tokens):
            token_ids = np.asarray(tokens, dtype=np.int64)
            if params.repetition_penalty != 1.0:
                # A token that is there several times gets the same new value as often.
                adjusted[token_ids] = _repelled(adjusted[token_ids], params.repetition_penalty)
            if params.frequency_penalty or params.presence_penalty:
                counts = np.bincount(token_ids[num_prompt_tokens:])
                generated = np.flatnonzero(counts)
                penalties = params.frequency_penalty * counts[generated] + params.presence_penalty
                adjusted[generated] -= penalties
        return adjusted

    def _nearest(self, distance: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
        """The indices of the ``count`` smallest distances, ascending; ties: the smaller index."""
        self._scratch[:] = distance
        self._scratch.partition(count - 1)
        edge = self._scratch[count - 1]
        inside = np.flatnonzero(distance < edge)
        on_the_edge = np.flatnonzero(distance == edge)[: count - inside.size]
        indices = np.concatenate((inside, on_the_edge))
        indices.sort()
        return indices

    def _nucleus(
        self, distance: npt.NDArray[np.float32], weights: npt.NDArray[np.float32], top_p: float
    ) -> npt.NDArray[np.bool_]:
        """Marks the smallest set of nearest tokens with at least ``top_p`` of the weight.

        Ties at its edge go to the smaller index. Selection by radix: the weight is summed by bucket
        of equal leading bits of the distance, and only the bucket in which the sum reaches
        ``top_p`` is sorted.
        """
        bits = distance.view(np.uint32)
        buckets, wide = self._buckets[: bits.size], self._wide[: bits.size]
        np.right_shift(bits, _BUCKET_SHIFT, out=buckets, casting="unsafe")
        wide[:] = weights
        reached = np.bincount(buckets, weights=wide).cumsum()
        target = top_p * reached[-1]
        edge = int(np.searchsorted(reached, target))
        keep: npt.NDArray[np.bool_] = buckets < edge
        members = np.flatnonzero(buckets == edge)
        members = members[np.argsort(bits[members], kind="stable")]
        before = float(reached[edge - 1]) if edge else 0.0
        inner = before + wide[members].cumsum()
        keep[members[: int(np.searchsorted(inner, target)) + 1]] = True
        return keep


def likeliest(row: npt.NDArray[np.float32]) -> int:
    """The token with the largest logit; of several, the smallest id.

    Raises:
        InternalError: none is finite, or one is NaN or infinitely large.
    """
    best = int(row.argmax())
    # NaN is the argmax wherever it stands, so this one look finds it.
    if not np.isfinite(row[best]):
        raise InternalError(f"the largest of {row.size} logits is {row[best]}")
    return best


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one position of one request's sequence, with 53 bits.

    The first word of the Philox4x64-10 block of counter ``position`` under key ``seed``. Written
    out, because building a numpy generator for a single number takes three times as long.
    """
    word0, word1, word2, word3 = position & _MASK64, 0, 0, 0
    key0, key1 = seed & _MASK64, 0
    for _ in range(10):
        product0 = 0xD2E7470EE14C6C93 * word0
        product1 = 0xCA5A826395121157 * word2
        word0, word1, word2, word3 = (
            (product1 >> 64) ^ word1 ^ key0,
            product1 & _MASK64,
            (product0 >> 64) ^ word3 ^ key1,
            product0 & _MASK64,
        )
        key0 = (key0 + 0x9E3779B97F4A7C15) & _MASK64
        key1 = (key1 + 0xBB67AE8584CAA73B) & _MASK64
    return (word0 >> 11) * 2.0**-53


def _repelled(logits: npt.NDArray[np.float32], penalty: float) -> npt.NDArray[np.float64]:
    """Positive logits divided by ``penalty``, the others multiplied.

    What a float32 has no number for becomes its largest or smallest finite number: a logit that
    was finite stays so, and one that was not, too.
    """
    wide = logits.astype(np.float64)
    # Of the quotient and the product, it is the lesser one that repels, on both sides of zero.
    choose = np.minimum if penalty > 1.0 else np.maximum
    with np.errstate(over="ignore"):
        repelled: npt.NDArray[np.float64] = choose(wide / penalty, wide * penalty)
    return np.clip(repelled, -_LARGEST, _LARGEST, out=repelled, where=np.isfinite(wide))


def _draw(weights: npt.NDArray[np.float32], point: float) -> int:
    """The index in which the fraction ``point`` of the total weight falls (inverse CDF)."""
    starts = np.arange(0, weights.size, _BLOCK)
    sums = np.add.reduceat(weights, starts, dtype=np.float64)
    reached = sums.cumsum()
    block, before = _locate(reached, point * float(reached[-1]))
    start = int(starts[block])
    inner = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    index, _ = _locate(inner, point * float(reached[-1]) - before)
    return start + index


def _locate(reached: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """The first index whose running sum passes ``target``, and the sum before it.

    Such an index has weight of its own. Rounding may put the target at or past the total; then it
    is the last index with any weight.
    """
    index = int(np.searchsorted(reached, target, side="right"))
    if index >= reached.size:
        index = int(np.searchsorted(reached, reached[-1]))
    return index, float(reached[index - 1]) if index else 0.0
