"""The scheduler's settings, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from headway.core.errors import ConfigError
from headway.core.policy import DeadlinePolicy, SchedulingPolicy, make_policy
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO, SLOTable

__all__ = ["PreemptionMode", "SchedulerConfig"]


class PreemptionMode(Enum):
    """How outranked requests may be made to yield.

    Slots and step time are always taken by pausing: the victim sits the step out and keeps its
    blocks. The modes differ in what happens when *blocks* are short.
    """

    # Members are compared by identity; the hash that enumerations come with is a Python function.
    __hash__ = object.__hash__

    #: A waiting request takes no slot and no block from any (as in vLLM); one that runs
    #: and cannot grow takes the last-ranked one's blocks, which recomputes.
    NONE = "none"
    #: A waiting request takes slots, never blocks; growing as in ``NONE``.
    PAUSE = "pause"
    #: As many blocks as are needed, from the victim's end; the victim recomputes them.
    TAIL = "tail"
    #: All of the victim's blocks, copied to the swap space (recomputed where that is full).
    SWAP = "swap"
    #: All of the victim's blocks; it recomputes what the prefix cache has lost meanwhile.
    RECOMPUTE = "recompute"
    #: As many blocks as are needed, swapped or recomputed: what the cost model says is cheaper.
    AUTO = "auto"

    @property
    def lets_waiting_take_blocks(self) -> bool:
        """Whether a waiting request gets blocks of residents that it may displace."""
        return self not in (PreemptionMode.NONE, PreemptionMode.PAUSE)


@dataclass(frozen=True)
class SchedulerConfig:
    """Budgets and rules of a ``PriorityScheduler``.

    Attributes:
        max_num_seqs: requests in a step, at most (slots).
        max_num_batched_tokens: tokens in a step, at most; bounds the prefill chunk.
        num_blocks: KV blocks in the pool.
        block_size: tokens in a block.
        num_swap_blocks: blocks the swap space can hold.
        max_model_len: longest context in tokens; None = what the pool can hold.
        policy: a name (``fcfs``, ``priority``, ``aging``, ``deadline``) or a policy object.
        preemption_mode: see ``PreemptionMode``; its value as a string will do.
        enable_prefix_caching: find the blocks of equal prefixes and share them.
        max_step_ms: no step is predicted to take longer; None = no bound.
        slos: targets of classes of requests, which bound the steps they are in.
        sharing: what less urgent work gets beside more urgent work.
        eos_token_ids: the model's end tokens.

    Raises:
        ConfigError: a value is out of range.
    """

    max_num_seqs: int = 4
    max_num_batched_tokens: int = 512
    num_blocks: int = 1024
    block_size: int = 16
    num_swap_blocks: int = 0
    max_model_len: int | None = None
    policy: str | SchedulingPolicy = "priority"
    preemption_mode: PreemptionMode | str = PreemptionMode.AUTO
    enable_prefix_caching: bool = True
    max_step_ms: float | None = None
    slos: tuple[SLO, ...] = ()
    sharing: SharingRules = field(default_factory=SharingRules)
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        minimums = {
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
            "num_blocks": 1,
            "block_size": 1,
            "num_swap_blocks": 0,
        }
        if self.max_model_len is not None:
            minimums["max_model_len"] = 2
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name} is {value!r}, must be an integer of at least {minimum}")
        if self.max_step_ms is not None and not 0 < self.max_step_ms < math.inf:
            raise ConfigError(f"max_step_ms is {self.max_step_ms}, must be above 0")
        object.__setattr__(self, "eos_token_ids", frozenset(self.eos_token_ids))
        try:
            mode = PreemptionMode(self.preemption_mode)
        except ValueError:
            names = ", ".join(mode.value for mode in PreemptionMode)
            raise ConfigError(
                f"preemption_mode is {self.preemption_mode!r}, must be one of {names}"
            ) from None
        object.__setattr__(self, "preemption_mode", mode)
        slo_table = SLOTable(self.slos, self.max_step_ms)
        object.__setattr__(self, "slos", slo_table.slos)
        policy = make_policy(self.policy)
        if self.policy == DeadlinePolicy.name:
            policy = DeadlinePolicy(slos=slo_table)
        object.__setattr__(self, "policy", policy)

    @cached_property
    def slo_table(self) -> SLOTable:
        """The classes, and what their targets mean for the time of a step."""
        return SLOTable(self.slos, self.max_step_ms)

    @property
    def step_limit_ms(self) -> float:
        """What no step may be predicted to take; infinite = no bound."""
        return self.slo_table.step_limit_ms

    @cached_property
    def is_timed(self) -> bool:
        """Whether steps are bounded in time at all."""
        return bool(self.slos) or self.step_limit_ms < math.inf or self.sharing.is_timed

    @cached_property
    def max_request_tokens(self) -> int:
        """The longest a request may get: the context, and what the whole pool holds."""
        pool = self.num_blocks * self.block_size
        return pool if self.max_model_len is None else min(pool, self.max_model_len)

    @cached_property
    def max_num_choices(self) -> int:
        """The most choices that a request may have: they are in a step together."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)
