"""How a request's tokens are chosen and what ends its output: what the caller may ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeGuard

from headway.core.errors import InvalidRequest

__all__ = ["SamplingParams", "choice_seed"]

_NUM_SEEDS: Final = 2**64
_MAX_PENALTY: Final = 2.0
_MAX_BIAS: Final = 100.0
_MAX_LOGPROBS: Final = 20
_LARGEST_FLOAT: Final = math.nextafter(math.inf, 0.0)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a request's tokens, and when to stop; vLLM's names and meanings.

    Attributes:
        max_tokens: generate at most this many tokens; at least 1.
        min_tokens: until this many tokens are generated, no end token and no token of
            ``stop_token_ids`` can be chosen, and stop texts that are complete by then do not end
            the output; 0 … ``max_tokens``.
        temperature: 0 chooses the likeliest token; larger flattens the distribution.
        top_p: sample from the smallest set of likeliest tokens with this total probability.
        top_k: sample from this many likeliest tokens; 0 or −1 means all.
        min_p: leave out tokens that are less likely than this fraction of the likeliest token's
            probability; 0 … 1, and 0 leaves none out.
        seed: of the request's own random sequence; None lets the engine draw one. The token
            drawn at a position depends on seed and position only, never on the load.
        stop: texts that end the output; the matched text is not part of it.
        stop_token_ids: tokens that end the output, beside the model's own end tokens.
        ignore_eos: go on past the model's end tokens.
        presence_penalty: taken off the logit of every token that the output has already;
            −2 … 2, and below 0 it attracts.
        frequency_penalty: the same for each time that the output has it.
        repetition_penalty: the logit of every token that the prompt or the output has already is
            divided by it if positive and multiplied by it if not; finite and above 0, 1 changes
            nothing, and below 1 it attracts.
        logit_bias: added to the logits of these tokens; −100 … 100.
        logprobs: with each generated token, report its log-probability and those of this many
            likeliest tokens, 0 … 20; None reports none. They are the model's own: before
            penalties, biases and temperature.
        prompt_logprobs: the same for each token of the prompt, given those before it. The whole
            prompt is then computed, whatever the prefix cache has.

    Raises:
        InvalidRequest: a value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Equal params have equal hashes without it, and mappings have none.
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    #: Whether the choice of some token takes more than knowing the likeliest one; derived. Which
    #: tokens: ``needs_logits_at``.
    needs_logits: bool = field(init=False, repr=False, compare=False)
    #: Whether the choice of a token depends on the tokens before it, beside through the logits;
    #: derived.
    needs_history: bool = field(init=False, repr=False, compare=False)
    _always_needs_logits: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens!r}, must be at least 1")
        if not _is_int(self.min_tokens) or not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens!r}, must be 0 … {self.max_tokens} (max_tokens)"
            )
        if not _is_number(self.temperature) or not 0.0 <= self.temperature <= 100.0:
            raise InvalidRequest(f"temperature is {self.temperature!r}, must be 0 … 100")
        if not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p is {self.top_p!r}, must be above 0 and at most 1")
        if not _is_int(self.top_k) or self.top_k < -1:
            raise InvalidRequest(f"top_k is {self.top_k!r}, must be −1, 0 (all) or positive")
        if not _is_number(self.min_p) or not 0.0 <= self.min_p <= 1.0:
            raise InvalidRequest(f"min_p is {self.min_p!r}, must be 0 … 1")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < _NUM_SEEDS):
            raise InvalidRequest(f"seed is {self.seed!r}, must be 0 … 2**64 − 1")
        _check_penalty("presence_penalty", self.presence_penalty)
        _check_penalty("frequency_penalty", self.frequency_penalty)
        if (
            not _is_number(self.repetition_penalty)
            or not 0.0 < self.repetition_penalty <= _LARGEST_FLOAT
        ):
            raise InvalidRequest(
                f"repetition_penalty is {self.repetition_penalty!r}, must be finite and above 0"
            )
        if self.logprobs is not None:
            _check_logprobs("logprobs", self.logprobs)
        if self.prompt_logprobs is not None:
            _check_logprobs("prompt_logprobs", self.prompt_logprobs)
        logit_bias = _checked_logit_bias(self.logit_bias)
        needs_history = (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )
        always_needs_logits = (
            (self.temperature > 0.0 and self.top_k != 1)
            or needs_history
            or bool(logit_bias)
            or self.logprobs is not None
        )
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_stop_token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", logit_bias)
        object.__setattr__(self, "needs_logits", always_needs_logits or self.min_tokens > 0)
        object.__setattr__(self, "needs_history", needs_history)
        object.__setattr__(self, "_always_needs_logits", always_needs_logits)

    def needs_logits_at(self, num_output_tokens: int) -> bool:
        """Whether the choice of the token after so many takes more than knowing the likeliest one.

        It may for the first ``min_tokens`` of a request that needs no logits otherwise: the
        likeliest token may be one that must not be chosen yet.
        """
        return self._always_needs_logits or num_output_tokens < self.min_tokens


def choice_seed(seed: int, index: int) -> int:
    """The seed of the choice of this index among those of a prompt; the first has ``seed`` itself.

    Neighbouring seeds draw independent random numbers: a seed keys a counter-based generator.
    """
    return (seed + index) % _NUM_SEEDS


def _checked_stop(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if isinstance(texts, Iterable):
        texts = tuple(texts)
        if all(isinstance(text, str) and text for text in texts):
            return texts
    raise InvalidRequest(f"stop is {stop!r}, must be texts of at least one character")


def _checked_stop_token_ids(stop_token_ids: object) -> frozenset[int]:
    if not isinstance(stop_token_ids, Iterable):
        raise InvalidRequest(f"stop_token_ids is {stop_token_ids!r}, must be token ids")
    token_ids = tuple(stop_token_ids)
    for token_id in token_ids:
        if not _is_int(token_id) or token_id < 0:
            raise InvalidRequest(f"stop_token_ids has {token_id!r}, must be token ids from 0 on")
    return frozenset(token_ids)


def _check_penalty(name: str, penalty: object) -> None:
    if not _is_number(penalty) or not -_MAX_PENALTY <= penalty <= _MAX_PENALTY:
        raise InvalidRequest(f"{name} is {penalty!r}, must be −2 … 2")


def _check_logprobs(name: str, count: object) -> None:
    if not _is_int(count) or not 0 <= count <= _MAX_LOGPROBS:
        raise InvalidRequest(f"{name} is {count!r}, must be 0 … {_MAX_LOGPROBS}")


def _checked_logit_bias(logit_bias: Mapping[int, float]) -> dict[int, float]:
    """A copy, which the caller cannot change afterwards. O(tokens)."""
    if not isinstance(logit_bias, Mapping):
        raise InvalidRequest(
            f"logit_bias is of type {type(logit_bias).__name__}, must map token ids to numbers"
        )
    for token_id, bias in logit_bias.items():
        if not _is_int(token_id) or token_id < 0:
            raise InvalidRequest(f"logit_bias is for token {token_id!r}, must be for ids from 0 on")
        if not _is_number(bias) or not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise InvalidRequest(f"logit_bias of token {token_id} is {bias!r}, must be −100 … 100")
    return dict(logit_bias)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
