"""Service level objectives: what a class of requests has been promised.

A class is all requests at least as urgent as its priority, down to the next more urgent class. The
scheduler keeps the promise by bounding what it packs into a step beside such requests.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from headway.core.errors import ConfigError
from headway.core.priority import MAX_PRIORITY, MIN_PRIORITY

__all__ = ["HEADROOM", "SLO", "TTFT_SHARE", "SLOTable"]

#: Of a target, what may be planned.
HEADROOM: Final = 0.9

#: Of a TTFT target, what the step may take that an arrival has to wait for: that step and the
#: arrival's own must fit into the target, and something must be left for the way in and out.
TTFT_SHARE: Final = HEADROOM * 0.4

_MS: Final = {"us": 1e-3, "ms": 1.0, "s": 1e3, "": 1.0}
_NUMBER: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|)")


@dataclass(frozen=True, slots=True)
class SLO:
    """The targets of one class.

    Attributes:
        priority: the least urgent one that belongs to the class.
        ttft_ms: time to first token; None = no target.
        tpot_ms: time per output token after the first; None = no target.

    Raises:
        ConfigError: a value is out of range, or there is no target at all.
    """

    priority: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        if not MIN_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise ConfigError(f"the priority of an SLO is {self.priority}, must be an int64")
        for name, value in (("ttft", self.ttft_ms), ("tpot", self.tpot_ms)):
            if value is not None and not 0 < value < 1e9:
                raise ConfigError(f"{name} of SLO {self.priority} is {value} ms, must be above 0")
        if self.ttft_ms is None and self.tpot_ms is None:
            raise ConfigError(f"SLO {self.priority} has no target, needs ttft or tpot")

    @classmethod
    def parse(cls, text: str) -> SLO:
        """``0:ttft=200ms,tpot=40ms`` → SLO; units are us, ms (the default) and s.

        Raises:
            ConfigError: it is no such text.
        """
        priority, _, targets = text.partition(":")
        found: dict[str, float] = {}
        for target in targets.split(","):
            name, _, value = (part.strip() for part in target.partition("="))
            match = _NUMBER.fullmatch(value)
            if name not in ("ttft", "tpot") or name in found or match is None:
                raise ConfigError(f"SLO {text!r} is not of the form 0:ttft=200ms,tpot=40ms")
            found[name] = float(match[1]) * _MS[match[2]]
        if re.fullmatch(r"[+-]?\d{1,19}", priority.strip()) is None:
            raise ConfigError(f"SLO {text!r} has the priority {priority!r}, must be an int64")
        return cls(int(priority), found.get("ttft"), found.get("tpot"))

    @property
    def max_step_ms(self) -> float:
        """What a step may be planned to take that decodes a request of the class.

        A little less than its time per token: half of all steps take longer than planned.
        """
        return math.inf if self.tpot_ms is None else HEADROOM * self.tpot_ms

    def __str__(self) -> str:
        targets = (("ttft", self.ttft_ms), ("tpot", self.tpot_ms))
        words = [f"{name}={value:g}ms" for name, value in targets if value is not None]
        return f"{self.priority}:{','.join(words)}"


class SLOTable:
    """The classes, and what their targets mean for the time of a step.

    Args:
        slos: the targets of each class.
        max_step_ms: no step is to take longer, targets or not; None = no bound.

    Raises:
        ConfigError: two classes have the same priority.
    """

    def __init__(self, slos: Iterable[SLO] = (), max_step_ms: float | None = None) -> None:
        #: Most urgent first.
        self.slos = tuple(sorted(slos, key=lambda slo: slo.priority))
        self._priorities = [slo.priority for slo in self.slos]
        for priority, following in zip(self._priorities, self._priorities[1:], strict=False):
            if priority == following:
                raise ConfigError(f"there are two SLOs for priority {priority}, must be one")
        bound = math.inf if max_step_ms is None else max_step_ms
        ttfts = [math.inf if slo.ttft_ms is None else slo.ttft_ms for slo in self.slos]
        #: What a step may be predicted to take, whatever is in it (ms); infinite = no bound. An
        #: arrival waits for the step in flight, so the tightest TTFT target decides.
        self.step_limit_ms = min(bound, TTFT_SHARE * min(ttfts, default=math.inf))
        #: Parallel to ``slos``: what the step may take that computes a first token of the class.
        #: Half of the target has been kept for it; but a more urgent arrival has to wait for this
        #: step as for any other.
        self._first_step_ms = [
            self.step_limit_ms
            if slo.ttft_ms is None
            else min(bound, slo.ttft_ms / 2, TTFT_SHARE * min(ttfts[:index], default=math.inf))
            for index, slo in enumerate(self.slos)
        ]

    def of(self, priority: int) -> SLO | None:
        """The class of a request of this priority: that of the next priority at or above it."""
        index = bisect_left(self._priorities, priority)
        return self.slos[index] if index < len(self.slos) else None

    def bounds_of(self, priority: int) -> tuple[SLO | None, float]:
        """Both: its class, and what the step may take that computes its first token (ms)."""
        return self.of(priority), self.first_step_ms(priority)

    def first_step_ms(self, priority: int) -> float:
        """What the step may take that computes the first token of such a request (ms)."""
        index = bisect_left(self._priorities, priority)
        return self._first_step_ms[index] if index < len(self.slos) else self.step_limit_ms
