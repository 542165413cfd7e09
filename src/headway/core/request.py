"""A request: what was asked, how it ranks, its sequences, and its life.

A *request* is what a client asked; a *sequence* is one line of tokens with a block table. A request
of ``n`` choices is a group of n sequences: it is ranked, admitted, preempted and ended as one. Its
prompt is computed once, by the first sequence; with the first tokens, the others fork from it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Final

from headway.core.errors import InvalidRequest
from headway.core.life import Life, RequestStatus
from headway.core.priority import MAX_PRIORITY, MIN_PRIORITY, check_priority
from headway.core.sampling_params import SamplingParams, choice_seed
from headway.core.scheduler_output import RowFacts
from headway.core.sequence import Sequence
from headway.core.slo import SLO

__all__ = [
    "MAX_CACHE_SALT",
    "MAX_PRIORITY",
    "MIN_PRIORITY",
    "PriorityRequest",
    "Request",
    "RequestStatus",
    "SamplingParams",
    "check_priority",
]

#: Characters of a ``cache_salt``.
MAX_CACHE_SALT: Final = 256


class Request:
    """One generation request and its progress; compares by rank, most urgent first.

    The scheduler owns everything below "how it ranks"; callers read it.

    Args:
        request_id: unique among unfinished requests.
        priority: int64, smaller is more urgent.
        prompt: text, or token ids. A text without ``prompt_token_ids`` counts as one token per
            UTF-8 byte, so that the scheduler can be used without a tokenizer.
        max_tokens: shorthand for ``SamplingParams(max_tokens=…)``; not together with
            ``sampling_params``.
        prompt_token_ids: the prompt's tokens, where ``prompt`` is the text they came from.
        n: choices: so many sequences continue the prompt, each with draws of its own.
        arrival_time: seconds on the scheduler's clock; None = when it is added.
        deadline: seconds on the same clock by which the first token is due; for the
            ``deadline`` policy.
        tenant: whose it is; requests of different tenants find no blocks of each other's.
        cache_salt: at most 256 characters; requests with different salts find no blocks of each
            other's either.
        cache_group: tenants of one group find each other's blocks; None = a group of the tenant's
            own.

    Raises:
        InvalidRequest: an empty prompt or id, a token that is no id, a priority that is no int64,
            ``max_tokens`` or ``n`` below 1, a time that is not finite, a salt that is too long.
    """

    __slots__ = (
        "arrival_order",
        "arrival_time",
        "cache_root",
        "deadline",
        "displaces",
        "first_step_ms",
        "is_plain",
        "key",
        "last_step",
        "leader",
        "life",
        "live",
        "n",
        "num_cached_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recomputed_tokens",
        "priority",
        "prompt",
        "request_id",
        "sampling_params",
        "sequences",
        "slo",
        "stop_token_ids",
        "tenant",
        "threshold",
        "token_limit",
    )

    def __init__(
        self,
        request_id: str,
        priority: int = 0,
        prompt: str | Seq[int] = "",
        max_tokens: int | None = None,
        *,
        prompt_token_ids: Seq[int] | None = None,
        sampling_params: SamplingParams | None = None,
        n: int = 1,
        arrival_time: float | None = None,
        deadline: float | None = None,
        tenant: str = "",
        cache_salt: str = "",
        cache_group: str | None = None,
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
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise InvalidRequest(f"n of request {request_id!r} is {n!r}, must be at least 1")
        if len(cache_salt) > MAX_CACHE_SALT:
            raise InvalidRequest(
                f"cache_salt of request {request_id!r} has {len(cache_salt)} characters, "
                f"may have at most {MAX_CACHE_SALT}"
            )
        if prompt_token_ids is None:
            if isinstance(prompt, str):
                prompt_token_ids = prompt.encode(errors="surrogatepass")
            else:
                prompt_token_ids = prompt
        token_ids = _checked_token_ids(request_id, prompt_token_ids)
        for name, seconds in (("arrival_time", arrival_time), ("deadline", deadline)):
            if seconds is not None and not (
                isinstance(seconds, (int, float))
                and not isinstance(seconds, bool)
                and math.isfinite(seconds)
            ):
                raise InvalidRequest(
                    f"{name} of request {request_id!r} is {seconds!r}, must be finite seconds"
                )

        # What was asked. Only the priority may change, and a seed may be drawn.
        self.request_id = request_id
        #: Smaller is more urgent. Changed by ``PriorityScheduler.set_priority`` only.
        self.priority = priority
        #: The prompt's text, if it came as text.
        self.prompt = prompt if isinstance(prompt, str) else None
        self.num_prompt_tokens = len(token_ids)
        self.sampling_params = sampling_params
        #: Choices.
        self.n = n
        self.arrival_time = arrival_time
        self.deadline = deadline
        #: Whose it is; empty = no tenant's in particular.
        self.tenant = tenant
        #: What the hashes of its blocks begin with: requests share blocks only if it is equal.
        self.cache_root = _cache_root(tenant, cache_group, cache_salt)

        # How it ranks; set when it is added, and when its priority changes.
        #: Order of arrival at the scheduler; makes keys unique. −1 until added.
        self.arrival_order = -1
        #: The rank; smaller goes first.
        self.key: tuple[Any, ...] = (priority,)
        #: It outranks, by enough to displace them, exactly the requests whose key is above this.
        self.threshold: tuple[Any, ...] = (priority,)
        #: While it waits, it may displace exactly the requests with keys above this: its threshold,
        #: unless the preemption mode lets no waiting request displace any.
        self.displaces: tuple[Any, ...] = (priority,)
        #: What its class has been promised.
        self.slo: SLO | None = None
        #: What the step may take that computes its first token (ms); infinite = no bound.
        self.first_step_ms = math.inf

        # Its sequences.
        #: The choices, by index; the first alone until the prompt has been computed.
        self.sequences: list[Sequence] = [Sequence(self, 0, token_ids)]
        #: Those that are unfinished.
        self.live: list[Sequence] = self.sequences.copy()
        #: The first unfinished sequence, or the first of all: the one that computes the prompt.
        self.leader: Sequence = self.sequences[0]
        #: ``num_tokens`` at which the output of a sequence is as long as it may get.
        self.token_limit = len(token_ids) + sampling_params.max_tokens
        #: Tokens that end the output.
        self.stop_token_ids: frozenset[int] = sampling_params.stop_token_ids
        #: Whether rows of single tokens need nothing but the token (see ``decode_row``).
        self.is_plain = False

        # Its life.
        #: Its status, and when it changed.
        self.life = Life()
        #: Of the prompt, the tokens that the prefix cache held at the first admission.
        self.num_cached_tokens = 0
        self.num_recomputed_tokens = 0
        #: How often its blocks were taken, whole or in part (pauses are not counted).
        self.num_preemptions = 0
        #: The last step it was in, counted by the scheduler while step time is bounded.
        self.last_step = -1

    @classmethod
    def resume(
        cls,
        request_id: str,
        priority: int = 0,
        prompt: str | Seq[int] = "",
        *,
        outputs: Mapping[int, Seq[int]],
        sampling_params: SamplingParams,
        **others: Any,
    ) -> Request:
        """A request that has begun elsewhere and goes on here as if it had never moved.

        It computes its tokens again, and continues each choice with the draws that this would have
        had there.

        Args:
            request_id, priority, prompt: as of a new request.
            outputs: the tokens that each unfinished choice has so far, by index; choices that
                have ended are left out. With no tokens at all the request is as a new one.
            sampling_params: those that it began with; where it draws, with their seed.
            others: as of a new request.

        Raises:
            InvalidRequest: as for a new request; an output is as long as ``max_tokens``; no choice
                is left; an index is not below ``n``; or the seed is missing.
        """
        request = cls(request_id, priority, prompt, sampling_params=sampling_params, **others)
        request._take_outputs(outputs)
        return request

    def _take_outputs(self, outputs: Mapping[int, Seq[int]]) -> None:
        max_tokens = self.max_tokens
        if not any(outputs.values()) and len(outputs) == self.n:
            return
        if not outputs or not all(0 <= index < self.n for index in outputs):
            raise InvalidRequest(
                f"request {self.request_id!r} resumes the choices {sorted(outputs)}, must be one "
                f"or more of 0 … {self.n - 1}"
            )
        if self.sampling_params.temperature > 0 and self.sampling_params.seed is None:
            raise InvalidRequest(f"request {self.request_id!r} resumes without its seed")
        prompt_token_ids = self.sequences[0].token_ids
        self.live = []
        for index, output in sorted(outputs.items()):
            if not 0 < len(output) < max_tokens:
                raise InvalidRequest(
                    f"choice {index} of request {self.request_id!r} resumes with {len(output)} "
                    f"tokens, must be 1 … {max_tokens - 1} (max_tokens is {max_tokens})"
                )
            tokens = prompt_token_ids + _checked_token_ids(self.request_id, output)
            self.live.append(Sequence(self, index, tokens))
        by_index = {sequence.index: sequence for sequence in self.live}
        self.sequences = []
        for index in range(self.n):
            sequence = by_index.get(index)
            if sequence is None:
                sequence = Sequence(self, index, prompt_token_ids.copy())
                sequence.finish_status = RequestStatus.FINISHED_STOPPED
            self.sequences.append(sequence)
        self.leader = self.live[0]

    # ------------------------------------------------------------------ reading

    @property
    def status(self) -> RequestStatus:
        """Where it stands."""
        return self.life.status

    @property
    def is_running(self) -> bool:
        """Whether it is in the step that was scheduled last."""
        return self.life.status is RequestStatus.RUNNING

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self.life.status.is_finished

    @property
    def max_tokens(self) -> int:
        """The most tokens that each choice may have."""
        return self.sampling_params.max_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's tokens, a copy."""
        return self.sequences[0].token_ids[: self.num_prompt_tokens]

    @property
    def awaits_first_token(self) -> bool:
        """Whether no token has been generated."""
        return len(self.leader.token_ids) == self.num_prompt_tokens

    @property
    def num_rows(self) -> int:
        """The slots that it takes in a step once its prompt has been computed."""
        return len(self.live) if len(self.sequences) == self.n else self.n

    @property
    def holds_blocks(self) -> bool:
        """Whether an unfinished sequence of it has blocks in the pool."""
        return any(sequence.block_table for sequence in self.live)

    @property
    def status_outside(self) -> RequestStatus:
        """Where it stands once it has begun and holds no blocks in the pool."""
        is_swapped = any(sequence.swap_table for sequence in self.live)
        return RequestStatus.SWAPPED if is_swapped else RequestStatus.PREEMPTED

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens so far, of all choices."""
        return sum(len(each.token_ids) for each in self.sequences) - self.num_prompt_tokens * len(
            self.sequences
        )

    # The first sequence's, for requests of one choice.

    @property
    def token_ids(self) -> list[int]:
        """The first sequence's tokens."""
        return self.sequences[0].token_ids

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens of the first sequence."""
        return len(self.sequences[0].token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The first sequence's generated tokens, a copy."""
        return self.sequences[0].output_token_ids

    @property
    def num_computed_tokens(self) -> int:
        """The leader's tokens whose keys and values are in the pool."""
        return self.leader.num_computed_tokens

    @property
    def block_table(self) -> tuple[int, ...]:
        """The leader's blocks, in order of position."""
        return self.leader.block_table

    @property
    def arrival(self) -> float:
        """When it arrived; for requests that have been added."""
        assert self.arrival_time is not None
        return self.arrival_time

    @property
    def first_token_time(self) -> float | None:
        """When the step ended that sampled its first token."""
        return self.life.first_token_time

    @property
    def finish_time(self) -> float | None:
        """When it ended."""
        return self.life.finish_time

    # ------------------------------------------------------------------ the scheduler's

    def begin(self, token_limit: int, eos_token_ids: frozenset[int]) -> None:
        """The request is added to a scheduler: its limits and seeds are settled.

        Args:
            token_limit: the longest that each of its sequences may get.
            eos_token_ids: the model's end tokens.
        """
        params = self.sampling_params
        self.token_limit = token_limit
        if params.ignore_eos:
            self.stop_token_ids = params.stop_token_ids
        elif params.stop_token_ids:
            self.stop_token_ids = params.stop_token_ids | eos_token_ids
        else:
            self.stop_token_ids = eos_token_ids
        for sequence in self.sequences:
            self._settle(sequence)
        self.is_plain = self.n == 1 and not params.needs_history and not params.min_tokens

    def _settle(self, sequence: Sequence) -> None:
        index, params = sequence.index, self.sampling_params
        seeds = (self.seed_of(index),)
        sequence.facts = RowFacts(self.request_id, index, self.num_prompt_tokens, params, seeds)
        sequence.stop_token_ids = self.stop_token_ids
        sequence.num_logit_rows = int(self.sampling_params.needs_logits)

    def fork(self, token_id: int) -> Sequence:
        """The next choice, which continues the prompt with ``token_id``."""
        token_ids = self.sequences[0].token_ids[: self.num_prompt_tokens]
        sequence = Sequence(self, len(self.sequences), token_ids)
        self._settle(sequence)
        sequence.token_ids.append(token_id)
        self.sequences.append(sequence)
        self.live.append(sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """One of its sequences has ended."""
        self.live.remove(sequence)
        self.leader = self.live[0] if self.live else self.sequences[0]

    def draw_seed(self, seed: int) -> None:
        """Take ``seed`` if it draws and has none; before it is added."""
        params = self.sampling_params
        if params.seed is None and params.temperature > 0:
            self.sampling_params = replace(params, seed=seed)

    def seed_of(self, index: int) -> int | None:
        """The seed of the choice ``index``; None for a request that does not draw."""
        seed = self.sampling_params.seed
        return None if seed is None else choice_seed(seed, index)

    def __lt__(self, other: Request) -> bool:
        return self.key < other.key

    def __repr__(self) -> str:
        leader = self.leader
        choices = f", n={self.n}" if self.n > 1 else ""
        return (
            f"Request({self.request_id!r}, priority={self.priority}, {self.status.value}, "
            f"tokens={self.num_prompt_tokens}+{leader.num_output_tokens}/{self.max_tokens}, "
            f"computed={leader.num_computed_tokens}{choices})"
        )


#: The roadmap's name for it.
PriorityRequest = Request


def _cache_root(tenant: str, group: str | None, salt: str) -> bytes:
    """Empty for requests of no tenant without a salt, whose blocks hash as their tokens alone.

    A tenant's own group is apart from a group of the same name, or the tenant would belong to it.
    """
    if not tenant and group is None and not salt:
        return b""
    kind, name = ("tenant", tenant) if group is None else ("group", group)
    content = f"{kind}:{len(name)}:{name}{salt}".encode(errors="surrogatepass")
    return blake2b(content, digest_size=16).digest()


def _checked_token_ids(request_id: str, prompt: Seq[int]) -> list[int]:
    """A copy of the tokens; they must be what blocks are hashed from. O(tokens)."""
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
