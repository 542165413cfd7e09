"""A request: what was asked, where it stands, and the only ways it may move.

The life of a request is a small graph (``TRANSITIONS``) and one method that walks it
(``Request.transition``). Everything else in the scheduler asks ``status`` and never assigns it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from headway.core.errors import InvalidRequest, InvalidTransition

if TYPE_CHECKING:
    from headway.core.slo import SLO

__all__ = [
    "MAX_PRIORITY",
    "MIN_PRIORITY",
    "TRANSITIONS",
    "PriorityRequest",
    "Request",
    "RequestStatus",
    "SamplingParams",
    "check_priority",
]

#: Priorities are int64, as in vLLM's API; smaller is more urgent.
MIN_PRIORITY, MAX_PRIORITY = -(2**63), 2**63 - 1

_MAX_SEED = 2**64 - 1
_MAX_PENALTY = 2.0
_MAX_BIAS = 100.0
_MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a request's tokens, and when to stop; vLLM's names and meanings.

    Attributes:
        max_tokens: generate at most this many tokens; at least 1.
        temperature: 0 chooses the likeliest token; larger flattens the distribution.
        top_p: sample from the smallest set of likeliest tokens with this total probability.
        top_k: sample from this many likeliest tokens; 0 or −1 means all.
        seed: of the request's own random sequence; None lets the engine draw one. The token
            drawn at a position depends on seed and position only, never on the load.
        stop: texts that end the output; the matched text is not part of it.
        stop_token_ids: tokens that end the output, beside the model's own end tokens.
        ignore_eos: go on past the model's end tokens.
        presence_penalty: taken off the logit of every token that the output has already;
            −2 … 2, and below 0 it attracts.
        frequency_penalty: the same for each time that the output has it.
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
    #: Whether the choice of a token takes more than knowing the likeliest one; derived.
    needs_logits: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens!r}, must be at least 1")
        if not _is_number(self.temperature) or not 0.0 <= self.temperature <= 100.0:
            raise InvalidRequest(f"temperature is {self.temperature!r}, must be 0 … 100")
        if not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p is {self.top_p!r}, must be above 0 and at most 1")
        if not _is_int(self.top_k) or self.top_k < -1:
            raise InvalidRequest(f"top_k is {self.top_k!r}, must be −1, 0 (all) or positive")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed <= _MAX_SEED):
            raise InvalidRequest(f"seed is {self.seed!r}, must be 0 … 2**64 − 1")
        try:
            stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            are_texts = all(isinstance(text, str) and text for text in stop)
        except TypeError:
            are_texts = False
        if not are_texts:
            raise InvalidRequest(f"stop is {self.stop!r}, must be texts of at least one character")
        try:
            stop_token_ids = frozenset(self.stop_token_ids)
        except TypeError:
            raise InvalidRequest(
                f"stop_token_ids is {self.stop_token_ids!r}, must be token ids"
            ) from None
        has_penalties = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        if has_penalties:
            _check_penalty("presence_penalty", self.presence_penalty)
            _check_penalty("frequency_penalty", self.frequency_penalty)
        if self.logprobs is not None:
            _check_logprobs("logprobs", self.logprobs)
        if self.prompt_logprobs is not None:
            _check_logprobs("prompt_logprobs", self.prompt_logprobs)
        logit_bias = _checked_logit_bias(self.logit_bias)
        needs_logits = (
            (self.temperature > 0.0 and self.top_k != 1)
            or has_penalties
            or bool(logit_bias)
            or self.logprobs is not None
        )
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        object.__setattr__(self, "logit_bias", logit_bias)
        object.__setattr__(self, "needs_logits", needs_logits)


class RequestStatus(Enum):
    """Where a request stands. ``is_finished`` separates the two halves."""

    #: Never scheduled; holds no blocks.
    WAITING = "waiting"
    #: In the step that was scheduled last.
    RUNNING = "running"
    #: Sat the last step out, or forked and not scheduled yet; its blocks are in the pool.
    PAUSED = "paused"
    #: Holds no blocks in the pool; its contents are in the swap space.
    SWAPPED = "swapped"
    #: Holds no blocks in the pool; what is not found in the prefix cache is recomputed.
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH_CAPPED = "finished_length_capped"
    FINISHED_ABORTED = "finished_aborted"
    FINISHED_TIMED_OUT = "finished_timed_out"
    FINISHED_REJECTED = "finished_rejected"

    is_finished: bool
    finish_reason: str | None

    def __init__(self, value: str) -> None:
        self.is_finished = value.startswith("finished")
        self.finish_reason = {
            "finished_stopped": "stop",
            "finished_length_capped": "length",
            "finished_aborted": "abort",
            "finished_timed_out": "timeout",
            "finished_rejected": "rejected",
        }.get(value)


def _transitions() -> dict[RequestStatus, frozenset[RequestStatus]]:
    status = RequestStatus
    unfinished = {
        status.WAITING: {status.RUNNING, status.PAUSED},  # PAUSED: forked from a running one
        status.RUNNING: {status.PAUSED, status.SWAPPED, status.PREEMPTED},
        status.PAUSED: {status.RUNNING, status.SWAPPED, status.PREEMPTED},
        status.SWAPPED: {status.RUNNING, status.PREEMPTED},
        status.PREEMPTED: {status.RUNNING},
    }
    finished = {one for one in status if one.is_finished}
    table = {start: frozenset(ends | finished) for start, ends in unfinished.items()}
    return table | dict.fromkeys(finished, frozenset())


#: Every move that exists: from a status to those it may become.
TRANSITIONS = _transitions()


class Request:
    """One generation request and its progress; compares by rank, most urgent first.

    The scheduler owns everything below "progress"; callers read it.

    Args:
        request_id: unique among unfinished requests.
        priority: int64, smaller is more urgent.
        prompt: text, or token ids. A text without ``prompt_token_ids`` counts as one token per
            UTF-8 byte, so that the scheduler can be used without a tokenizer.
        max_tokens: shorthand for ``SamplingParams(max_tokens=…)``; not together with
            ``sampling_params``.
        prompt_token_ids: the prompt's tokens, where ``prompt`` is the text they came from.
        arrival_time: seconds on the scheduler's clock; None = when it is added.
        deadline: seconds on the same clock by which the first token is due; for the
            ``deadline`` policy.

    Raises:
        InvalidRequest: an empty prompt or id, a token that is no id, a priority that is no int64,
            ``max_tokens`` < 1, a time that is not finite.
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_table",
        "capacity",
        "deadline",
        "finish_time",
        "first_scheduled_time",
        "first_token_time",
        "key",
        "last_step",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recomputed_tokens",
        "num_swapped_tokens",
        "peak_computed_tokens",
        "priority",
        "prompt",
        "request_id",
        "sampling_params",
        "sequence",
        "slo",
        "status",
        "stop_token_ids",
        "swap_table",
        "threshold",
        "token_ids",
        "token_limit",
        "transitions",
    )

    def __init__(
        self,
        request_id: str,
        priority: int = 0,
        prompt: str | Sequence[int] = "",
        max_tokens: int | None = None,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        sampling_params: SamplingParams | None = None,
        arrival_time: float | None = None,
        deadline: float | None = None,
    ) -> None:
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequest(f"request_id is {request_id!r}, must be a non-empty string")
        check_priority(request_id, priority)
        if sampling_params is None:
            sampling_params = (
                SamplingParams() if max_tokens is None else SamplingParams(max_tokens=max_tokens)
            )
        elif max_tokens is not None:
            raise InvalidRequest("give max_tokens or sampling_params, not both")
        if prompt_token_ids is None:
            if isinstance(prompt, str):
                prompt_token_ids = prompt.encode(errors="surrogatepass")
            else:
                prompt_token_ids = prompt
        token_ids = _checked_token_ids(request_id, prompt_token_ids)
        for name, seconds in (("arrival_time", arrival_time), ("deadline", deadline)):
            if seconds is not None and not (_is_number(seconds) and math.isfinite(seconds)):
                raise InvalidRequest(
                    f"{name} of request {request_id!r} is {seconds!r}, must be finite seconds"
                )

        self.request_id = request_id
        #: Smaller is more urgent. Changed through ``PriorityScheduler.set_priority`` only.
        self.priority = priority
        self.prompt = prompt if isinstance(prompt, str) else None
        self.sampling_params = sampling_params
        self.arrival_time = arrival_time
        self.deadline = deadline

        #: The prompt's tokens, then the generated ones.
        self.token_ids: list[int] = token_ids
        self.num_prompt_tokens = len(token_ids)
        #: ``num_tokens`` at which the output is as long as it may get; set when it is added.
        self.token_limit = len(token_ids) + sampling_params.max_tokens
        #: Tokens that end the output; set when it is added.
        self.stop_token_ids: frozenset[int] = sampling_params.stop_token_ids

        # Rank.
        #: Order of arrival at the scheduler; makes keys unique. −1 until added.
        self.sequence = -1
        #: The rank; smaller goes first. Set by the policy when the request is added.
        self.key: tuple[Any, ...] = (priority,)
        #: A waiting request may displace exactly the requests whose key is above this.
        self.threshold: tuple[Any, ...] = (priority,)
        #: What its class has been promised; set when it is added.
        self.slo: SLO | None = None

        # Progress.
        self.status = RequestStatus.WAITING
        #: Every status change as (seconds, new status), oldest first.
        self.transitions: list[tuple[float, RequestStatus]] = []
        #: Tokens whose keys and values are in the pool: 0 ≤ it < num_tokens.
        self.num_computed_tokens = 0
        #: The most it ever was; below it, computing is recomputing.
        self.peak_computed_tokens = 0
        #: Of the prompt, the tokens that the prefix cache held at the first admission.
        self.num_cached_tokens = 0
        self.num_recomputed_tokens = 0
        #: How often its blocks were taken, whole or in part (pauses are not counted).
        self.num_preemptions = 0
        #: Pool blocks, in order of position; the block manager's own list.
        self.block_table: list[int] = []
        #: Tokens that may be written into ``block_table`` without asking for a block.
        self.capacity = 0
        #: Chained hashes of the full blocks of ``token_ids``, as far as computed.
        self.block_hashes: list[bytes] = []
        #: The last step it was in, counted by the scheduler while step time is bounded.
        self.last_step = -1
        #: Swap slots of the blocks that follow ``block_table``, in order of position.
        self.swap_table: list[int] = []
        #: ``num_computed_tokens`` once ``swap_table`` is back in the pool.
        self.num_swapped_tokens = 0
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.finish_time: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's tokens, a copy."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens, a copy."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def max_tokens(self) -> int:
        """The most tokens it may generate."""
        return self.sampling_params.max_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self.status.is_finished

    def transition(self, status: RequestStatus, now: float) -> None:
        """Move to ``status`` at time ``now`` (seconds).

        Raises:
            InvalidTransition: the table has no such move; the message holds the history.
        """
        if status not in TRANSITIONS[self.status]:
            history = " → ".join(f"{one.value}@{time:.3f}" for time, one in self.transitions[-20:])
            raise InvalidTransition(
                f"request {self.request_id!r} cannot go from {self.status.value} to "
                f"{status.value} (history: {history or 'none'})"
            )
        self.status = status
        self.transitions.append((now, status))

    def __lt__(self, other: Request) -> bool:
        return self.key < other.key

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, priority={self.priority}, {self.status.value}, "
            f"tokens={self.num_prompt_tokens}+{self.num_output_tokens}/{self.max_tokens}, "
            f"computed={self.num_computed_tokens})"
        )


#: The roadmap's name for it.
PriorityRequest = Request


def check_priority(request_id: str, priority: object) -> None:
    """Refuse a priority that is no int64.

    Raises:
        InvalidRequest: naming the request, the value and the range.
    """
    if (
        not isinstance(priority, int)
        or isinstance(priority, bool)
        or not (MIN_PRIORITY <= priority <= MAX_PRIORITY)
    ):
        raise InvalidRequest(
            f"priority of request {request_id!r} is {priority!r}, must be an int64 "
            f"({MIN_PRIORITY} … {MAX_PRIORITY})"
        )


def _checked_token_ids(request_id: str, prompt: Sequence[int]) -> list[int]:
    """A copy of the prompt's tokens; they must be what blocks are hashed from. O(tokens)."""
    try:
        token_ids = list(prompt)
        smallest = min(array("q", token_ids), default=None)
    except (TypeError, OverflowError):
        smallest = -1
    if smallest is None:
        raise InvalidRequest(f"prompt of request {request_id!r} is empty, needs 1 token")
    if smallest < 0:
        raise InvalidRequest(
            f"prompt of request {request_id!r} must be a text or token ids of 0 … 2**63 − 1"
        )
    return token_ids


def _check_penalty(name: str, penalty: float) -> None:
    if not _is_number(penalty) or not -_MAX_PENALTY <= penalty <= _MAX_PENALTY:
        raise InvalidRequest(f"{name} is {penalty!r}, must be −2 … 2")


def _check_logprobs(name: str, count: int) -> None:
    if not _is_int(count) or not 0 <= count <= _MAX_LOGPROBS:
        raise InvalidRequest(f"{name} is {count!r}, must be 0 … {_MAX_LOGPROBS}")


def _checked_logit_bias(logit_bias: Mapping[int, float]) -> dict[int, float]:
    """A copy that nobody else has. O(tokens)."""
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


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
