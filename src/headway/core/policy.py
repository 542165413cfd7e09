"""Who goes first, and who may displace whom: the ranking as static keys.

A policy is two functions of a request, both evaluated once, when the request is added (or its
priority changed). Keys do not change with time, so the heap never needs re-sorting; that
includes ageing, because "priority minus waited time over τ" orders requests the same way at
every instant: the clock cancels out of the comparison.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from headway.core.errors import ConfigError
from headway.core.ranking import Ranked
from headway.core.slo import SLOTable

if TYPE_CHECKING:
    from headway.core.request import Request

__all__ = [
    "NOBODY",
    "POLICIES",
    "AgingPolicy",
    "BuiltinPolicy",
    "DeadlinePolicy",
    "FCFSPolicy",
    "Key",
    "PriorityPolicy",
    "Rankable",
    "SchedulingPolicy",
    "make_policy",
    "may_preempt",
]

#: A rank: smaller goes first. The scheduler appends the order of arrival, so that all differ.
Key = tuple[Any, ...]

#: The threshold of a request that displaces none.
NOBODY: Key = (math.inf,)


class Rankable(Protocol):
    """What the policies below look at in a request, be it Headway's own or another engine's."""

    #: Smaller is more urgent.
    @property
    def priority(self) -> int: ...

    #: In seconds, on the clock of the engine.
    @property
    def arrival_time(self) -> float | None: ...

    #: When the first token is due, on the same clock; None = the request says nothing.
    @property
    def deadline(self) -> float | None: ...


@runtime_checkable
class SchedulingPolicy(Protocol):
    """The seam for further policies (fairness, say): any object with these three.

    ``arrival_time`` of the request is set before either function is called. A policy may keep
    state of its own, but must return the same key for the same request until it is re-ranked. A
    policy that also has ``serve(request, num_tokens)`` is told, after each step, how many tokens
    were computed for each request in it.
    """

    #: The name it is chosen by.
    name: str

    def key(self, request: Request) -> Key:
        """The rank of ``request``; smaller goes first."""
        ...

    def threshold(self, request: Request) -> Key:
        """While waiting, ``request`` may displace exactly the requests whose key is above this.

        Never below ``key(request)``: no request displaces a more urgent one. And thresholds must
        ascend with keys: of two requests, the one that goes first must not have the larger
        threshold, or the places of the requests that may be displaced could not be found by
        bisection. ``headway.core.invariants`` checks both.
        """
        ...


def may_preempt(a: Ranked, b: Ranked) -> bool:
    """Whether ``a``, waiting, may take slots and blocks from ``b``; both must be ranked.

    The definition; the scheduler finds all such ``b`` at once, by bisection.
    """
    return a.displaces < b.key


class FCFSPolicy:
    """First come, first served; no request displaces another. The baseline."""

    name = "fcfs"

    def key(self, request: Rankable) -> Key:
        return (request.arrival_time,)

    def threshold(self, request: Rankable) -> Key:
        return NOBODY


class PriorityPolicy:
    """By priority, then arrival; only a strictly more urgent request displaces another."""

    name = "priority"

    def key(self, request: Rankable) -> Key:
        return (request.priority, request.arrival_time)

    def threshold(self, request: Rankable) -> Key:
        return (request.priority, math.inf)


class AgingPolicy:
    """Priority that waiting improves: one level for every ``tau`` seconds.

    The key is ``arrival + priority·τ``. Hence the starvation bound: a request of priority p is
    overtaken only by requests of priority p′ < p that arrive less than (p − p′)·τ after it.

    Args:
        tau: seconds of waiting that are worth one level of priority; above 0.
        margin: seconds by which a waiting request's key must be ahead before it displaces
            another; None = τ/2, so that one level displaces at equal arrival, and a request
            does not displace another over a blink. At least 0.
    """

    name = "aging"

    def __init__(self, tau: float = 30.0, margin: float | None = None) -> None:
        if not tau > 0 or not math.isfinite(tau):
            raise ConfigError(f"tau is {tau} s, must be above 0")
        self.tau = tau
        self.margin = _checked_margin(tau / 2 if margin is None else margin)

    def key(self, request: Rankable) -> Key:
        assert request.arrival_time is not None
        return (request.arrival_time + request.priority * self.tau,)

    def threshold(self, request: Rankable) -> Key:
        return (self.key(request)[0] + self.margin, math.inf)


class DeadlinePolicy:
    """Earliest deadline of the first token goes first (EDF).

    A request that brings no deadline gets ``arrival + TTFT target`` of its class.

    Args:
        slos: the classes and their targets.
        default_target: seconds until the first token is due for a request without a target.
        margin: seconds by which a waiting request's deadline must be ahead before it
            displaces another; at least 0.

    Raises:
        ConfigError: a number of seconds is out of range.
    """

    name = "deadline"

    def __init__(
        self,
        slos: SLOTable | None = None,
        default_target: float = 60.0,
        margin: float = 1.0,
    ) -> None:
        self.slos = slos or SLOTable()
        self.default_target = default_target
        if not default_target >= 0 or not math.isfinite(default_target):
            raise ConfigError(f"default_target is {default_target} s, must be at least 0")
        self.margin = _checked_margin(margin)

    def _deadline(self, request: Rankable) -> float:
        if request.deadline is not None:
            return request.deadline
        assert request.arrival_time is not None
        slo = self.slos.of(request.priority)
        if slo is None or slo.ttft_ms is None:
            return request.arrival_time + self.default_target
        return request.arrival_time + slo.ttft_ms / 1e3

    def key(self, request: Rankable) -> Key:
        return (self._deadline(request), request.arrival_time)

    def threshold(self, request: Rankable) -> Key:
        return (self._deadline(request) + self.margin, math.inf)


#: The policies of this module: they rank other engines' requests, too.
BuiltinPolicy: TypeAlias = FCFSPolicy | PriorityPolicy | AgingPolicy | DeadlinePolicy

#: Those that can be chosen by name, with their defaults.
POLICIES: dict[str, type[BuiltinPolicy]] = {
    policy.name: policy for policy in (FCFSPolicy, PriorityPolicy, AgingPolicy, DeadlinePolicy)
}


def make_policy(policy: str | SchedulingPolicy) -> SchedulingPolicy:
    """The policy of this name, or the policy itself.

    Raises:
        ConfigError: no policy has this name, or the object is no policy.
    """
    if isinstance(policy, str):
        try:
            return POLICIES[policy]()
        except KeyError:
            raise ConfigError(
                f"scheduling policy is {policy!r}, must be one of {', '.join(POLICIES)}"
            ) from None
    if not isinstance(policy, SchedulingPolicy):
        raise ConfigError(f"scheduling policy is {policy!r}, must have name, key and threshold")
    return policy


def _checked_margin(margin: float) -> float:
    if not margin >= 0 or not math.isfinite(margin):
        raise ConfigError(f"margin is {margin} s, must be at least 0")
    return margin
